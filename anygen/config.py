"""Typed configuration: frozen dataclasses that round-trip through JSON and refuse what they do not know.

A component declares its configuration right above its class:

    @dataclass(frozen=True, kw_only=True, slots=True)
    class MLPProjectorConfig(Config):
        depth: int = 2
        \"\"\"Linear layers; 1 is a plain linear map.\"\"\"
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, cast, get_args, get_type_hints

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
            ConfigError: an unknown key (with the nearest known one), a missing key, a wrong type, or a value that
                the class itself refuses; each fault is named by its place.
        """
        from pydantic import TypeAdapter, ValidationError  # 0.2 s, and not needed to build a config in code

        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            raise ConfigError(f"{cls.__name__}: {'; '.join(_explained(error.errors(), cls, data))}") from None

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


_KINDS = {
    "string_type": "a text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table of keys and values",
    "dataclass_type": "a table of keys and values",
}
"""pydantic's faults -> what was wanted, in the words of who writes YAML or JSON."""


_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")


def _explained(faults: Iterable[Any], root: type, data: Any) -> Iterator[str]:
    """One line for each place where something is wrong; pydantic tells every kind that a value could have been."""
    places: dict[tuple[int | str, ...], list[Any]] = {}
    for fault in faults:
        steps = fault["loc"]
        depth, missing = _depth(steps, data), fault["type"] in _MISSING
        if depth < len(steps) - missing:  # the next step is no key, but one of the kinds that a value may have
            fault = fault | {"loc": (*steps[:depth], *steps[depth + 1 :])}
        places.setdefault(steps[: depth + missing], []).append(fault)
    for place, found in places.items():
        within = [fault for fault in found if fault["type"] not in _KINDS]
        if len(found) == 1 or within:
            yield from (_explain(fault, root) for fault in (within or found))
        else:
            kinds = list(dict.fromkeys(_KINDS[fault["type"]] for fault in found))
            yield f"'{'.'.join(map(str, place))}': should be {' or '.join(kinds)}, got {found[0]['input']!r}"


def _depth(steps: Sequence[int | str], data: Any) -> int:
    """How many steps lead through `data`."""
    for depth, step in enumerate(steps):
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return depth
    return len(steps)


def _explain(fault: Any, root: type) -> str:
    """One line for one of pydantic's error records."""
    where = ".".join(str(step) for step in fault["loc"])
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _keys_at(root, fault["loc"][:-1])
        near = get_close_matches(str(fault["loc"][-1]), known, n=1)
        if near:
            return f"unknown key '{where}', did you mean '{near[0]}'?"
        return f"unknown key '{where}'" + (f"; known: {', '.join(known)}" if known else "")
    if fault["type"] in _MISSING:
        return f"key '{where}' is missing"
    if where and (kind := _KINDS.get(fault["type"])) is not None:
        return f"'{where}': should be {kind}, got {fault['input']!r}"
    # What a class's own check says, names the class and the field already.
    told = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else fault["msg"]
    return f"'{where}': {told}" if where else told


def _keys_at(root: Any, path: Sequence[int | str]) -> list[str]:
    """The keys of the configuration class that `path` leads to, through fields, tables, lists and unions."""
    try:
        for step in path:
            if dataclasses.is_dataclass(root):
                root = get_type_hints(root)[str(step)]
            else:  # dict[str, X], list[X], tuple[X, ...]: the members' type
                root = next(inner for inner in get_args(root)[::-1] if inner is not Ellipsis)
            if isinstance(root, UnionType):  # X | None
                root = next(inner for inner in get_args(root) if inner is not NoneType)
        return [field.name for field in dataclasses.fields(root)]
    except (KeyError, StopIteration, TypeError):  # a union of several classes: which one was meant is unknown
        return []
