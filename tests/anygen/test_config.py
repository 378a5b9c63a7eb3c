import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from anygen.config import Config
from anygen.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner(Config):
    depth: int = 2

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ConfigError(f"Inner: depth must be positive, got {self.depth}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer(Config):
    name: str
    inner: Inner = Inner()
    table: dict[str, Inner | None] = field(default_factory=dict)
    row: tuple[Inner, ...] = ()
    rate: float = 0.5


FULL = Outer(name="ä", inner=Inner(depth=3), table={"a": Inner(), "b": None}, row=(Inner(), Inner(depth=9)), rate=1e-4)


def test_it_round_trips_through_json(tmp_path: Path) -> None:
    FULL.save(tmp_path / "config.json")
    assert Outer.load(tmp_path / "config.json") == FULL
    assert Outer.from_dict(json.loads(json.dumps(FULL.to_dict()))) == FULL
    assert Outer.from_dict({"name": "a"}) == Outer(name="a")
    assert FULL.to_dict()["row"] == [{"depth": 2}, {"depth": 9}], "plain JSON types only"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "Outer: key 'name' is missing"),
        ({"name": "a", "nmae": 1}, "Outer: unknown key 'nmae', did you mean 'name'?"),
        ({"name": "a", "zzz": 1}, "Outer: unknown key 'zzz'; known: name, inner, table, row, rate"),
        ({"name": "a", "inner": {"depht": 1}}, "Outer: unknown key 'inner.depht', did you mean 'depth'?"),
        ({"name": "a", "table": {"x": {"zzz": 1}}}, "Outer: unknown key 'table.x.zzz'; known: depth"),
        ({"name": "a", "row": [{}, {"depht": 1}]}, "Outer: unknown key 'row.1.depht', did you mean 'depth'?"),
        ({"name": "a", "inner": {"depth": 0}}, "Outer: 'inner': Inner: depth must be positive, got 0"),
        ({"name": "a", "inner": {"depth": "x"}}, "Outer: 'inner.depth': Input should be a valid integer"),
        ({"rate": "fast", "x": 1}, "Outer: key 'name' is missing; 'rate': Input should be a valid number"),
        ([1], "Outer: Input should be a dictionary or an instance of Outer"),
    ],
)
def test_every_fault_is_named_by_its_place(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Outer.from_dict(data)
    assert message in str(raised.value)


def test_a_class_checks_itself_in_code_too() -> None:
    with pytest.raises(ConfigError, match="Inner: depth must be positive, got 0"):
        Inner(depth=0)
    with pytest.raises(AttributeError):
        FULL.name = "b"  # type: ignore[misc]


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Inner: there is no file .*none\.json"):
        Inner.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"Inner: .*bad\.json is not JSON \(Expecting property name"):
        Inner.load(tmp_path / "bad.json")
