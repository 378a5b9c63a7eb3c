"""Two evaluations of the same cases side by side: what fell and what rose, case by case."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from anygen.errors import ConfigError
from anygen.training.evaluation_report import EvaluationResult, Row

if TYPE_CHECKING:
    from rich.table import Table

WORST = 1.0
"""Points that a row may lose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One row before and after."""

    before: Row
    after: Row

    @property
    def points(self) -> float:
        """What was gained: hundredths of a share, or units of what has one; where less is better, what it fell by."""
        difference = (self.after.value - self.before.value) * (1 if self.after.unit else 100)
        return -difference if self.after.less_is_better else difference

    @property
    def worse(self) -> bool:
        """Whether it lost more than `WORST` points."""
        return self.points < -WORST

    @property
    def lost(self) -> int:
        """Cases that counted before and no longer do; 0 where cases are not told one by one."""
        return sum(one > two for one, two in zip(self.before.hits, self.after.hits, strict=True))

    @property
    def won(self) -> int:
        """Cases that count now and did not before."""
        return sum(one < two for one, two in zip(self.before.hits, self.after.hits, strict=True))

    @property
    def chance(self) -> float | None:
        """How often chance would tell cases lost and won at least as far apart, if each went either way as easily.

        McNemar's test in its exact form, of both sides; None where cases are not told one by one.
        """
        if not self.before.hits:
            return None
        from scipy.stats import binomtest

        moved = self.lost + self.won
        return float(binomtest(self.lost, moved).pvalue) if moved else 1.0


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """Rows of both, in the order of `after`; those that only one has are left out.

    Raises:
        ConfigError: a row was measured on other cases, or there is no row in common.
    """
    known = {row.name: row for row in before}
    changes = [Change(before=known[row.name], after=row) for row in after if row.name in known]
    for change in changes:
        old, new = change.before, change.after
        if (old.cases, old.seed, len(old.hits)) != (new.cases, new.seed, len(new.hits)):
            told = [f"{row.cases} cases of seed {row.seed}" for row in (old, new)]
            raise ConfigError(f"'{new.name}' was measured on {told[0]} before and on {told[1]} now: compare the same")
    if after and not changes:
        raise ConfigError(f"nothing was measured both times; before: {', '.join(known) or 'nothing'}")
    return changes


def check_comparable(path: Path, before: EvaluationResult, *, limit: int | None, seed: int) -> None:
    """Before anything takes long: whether what is to be measured will be measured on the cases of `before`.

    Args:
        path: where `before` was read.
        before: what was measured.
        limit: the most cases of a row that is to be measured.
        seed: of its cases.

    Raises:
        ConfigError: it will not; what to give instead.
    """
    seeds = {row.seed for row in before.rows}
    if before.limit != limit or seeds - {seed}:
        bound = "without --limit" if before.limit is None else f"with --limit {before.limit}"
        drawn = " and ".join(f"--seed {one}" for one in sorted(seeds))
        raise ConfigError(
            f"{path} was measured {bound} and with {drawn}: give the same, so that the cases are the same"
        )


def together(rows: Iterable[Row], name: str | None = None) -> Row:
    """Several rows as one, each case counting alike.

    Args:
        rows: at least one, of one unit.
        name: of what comes of it; by default that of the first.
    """
    rows = tuple(rows)
    cases = sum(row.cases for row in rows)
    value = sum(row.value * row.cases for row in rows) / max(1, cases)
    told = all(len(row.hits) == row.cases for row in rows)
    hits = "".join(row.hits for row in rows) if told else ""
    return replace(rows[0], name=name or rows[0].name, cases=cases, value=value, hits=hits)


def read_result(path: Path) -> EvaluationResult:
    """What `anygen eval SUITE --json` printed.

    Raises:
        ConfigError: the file is not there, cannot be read or holds something else.
    """
    try:
        return parse_result(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); make it with: anygen eval … --json") from None
    except ValueError as error:  # ConfigError is one, as is what UTF-8 cannot be
        raise ConfigError(f"{path} holds no evaluation as `anygen eval … --json` prints it: {error}") from None


def parse_result(text: str) -> EvaluationResult:
    """The same of its text.

    Raises:
        ConfigError: it is something else; the first fault is named.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(EvaluationResult).validate_python(json.loads(text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"it is not JSON ({error})") from None
    except ValidationError as error:
        fault = error.errors()[0]
        raise ConfigError(f"{'.'.join(str(step) for step in fault['loc']) or 'it'}: {fault['msg']}") from None


def comparison_table(title: str, changes: Sequence[Change], caption: str | None = None) -> "Table":
    """For `rich.print`; what lost more than `WORST` points is red."""
    from rich.table import Table

    table = Table(title=title, caption=caption)
    for heading in ("what", "cases", "before", "now", "points", "lost", "won", "by chance"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for change in changes:
        chance = change.chance
        cases = ["", "", ""] if chance is None else [str(change.lost), str(change.won), f"{chance:.2f}"]
        values = [str(change.after.cases), change.before.figure, change.after.figure, f"{change.points:+.1f}"]
        table.add_row(change.after.name, *values, *cases, style="red" if change.worse else "")
    return table
