"""Typed configuration: frozen dataclasses that round-trip through JSON and refuse what they do not know.

A component declares its configuration right above its class:

    @dataclass(frozen=True, kw_only=True, slots=True)
    class MLPProjectorConfig(Config):
        depth: int = 2
        \"\"\"Linear layers; 1 is a plain linear map.\"\"\"
"""

import dataclasses
import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from anygen.errors import ConfigError


class Config:
    """Base of every configuration dataclass; parsing and validation are pydantic's."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, nested configurations included."""
        plain = json.dumps(dataclasses.asdict(cast(Any, self)))  # tuples become lists, as in a file
        return json.loads(plain)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Validates `data` against the fields of this class.

        Raises:
            ConfigError: an unknown key (with the nearest known one), a missing key or a wrong type.
        """
        from pydantic import TypeAdapter, ValidationError  # 0.2 s, and not needed to build a config in code

        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            known = [field.name for field in dataclasses.fields(cast(Any, cls))]
            raise ConfigError(f"{cls.__name__}: {_explain(error.errors(), known)}") from None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a JSON file.

        Raises:
            ConfigError: the file is not there, is not JSON or does not fit this class.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ConfigError(f"{cls.__name__}: there is no file {path}") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{cls.__name__}: {path} is not JSON ({error})") from None

    def save(self, path: Path) -> None:
        """Writes a JSON file that `load` reads back to an equal value."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def _explain(problems: list[Any], known: list[str]) -> str:
    lines = []
    for problem in problems:
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            near = get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f", did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(known)}"
            lines.append(f"unknown key '{where}'{hint}")
        elif problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            lines.append(f"key '{where}' is missing")
        else:
            lines.append(f"'{where}': {problem['msg']}")
    return "; ".join(lines)
