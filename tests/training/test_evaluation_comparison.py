"""Comparing evaluations: points, cases lost and won, what chance would tell, and what cannot be compared."""

import json
from dataclasses import replace
from io import StringIO
from math import comb
from pathlib import Path

import pytest

from anygen.errors import ConfigError
from anygen.training.evaluation_comparison import (
    Change,
    check_comparable,
    compare,
    comparison_table,
    parse_result,
    read_result,
    together,
)
from anygen.training.evaluation_report import EvaluationResult, Row, Rows


def row(name: str, hits: str, seed: int = 0) -> Row:
    rows = Rows(seed)
    rows.share(name, [hit == "1" for hit in hits])
    return rows.found[0]


def change(before: str, after: str) -> Change:
    return compare([row("a", before)], [row("a", after)])[0]


def test_cases_are_compared_one_by_one() -> None:
    found = change("1100101010", "1011101000")
    assert (found.lost, found.won, found.points, found.worse) == (2, 2, 0, False)
    found = change("11111", "01110")
    assert (found.lost, found.won, found.worse) == (2, 0, True) and found.points == pytest.approx(-40)
    assert found.chance == 0.5


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 3), (0, 6), (9, 2), (40, 61), (700, 600)])
def test_chance_counts_the_splits_that_are_as_uneven(lost: int, won: int) -> None:
    moved = lost + won
    splits = [comb(moved, one) for one in range(moved + 1) if abs(2 * one - moved) >= abs(lost - won)]
    found = change("1" * lost + "0" * won + "1", "0" * lost + "1" * won + "1")
    assert (found.lost, found.won) == (lost, won)
    assert found.chance == pytest.approx(sum(splits) / 2**moved, rel=1e-9)


def test_decibels_are_points_and_less_may_be_better() -> None:
    rows = [Rows(0), Rows(0)]
    for one, (psnr, error) in zip(rows, ((28.0, 0.20), (26.5, 0.22)), strict=True):
        one.add("VAE", psnr, 64, unit="dB", bar=28)
        one.add("noise", error, 64, less_is_better=True)
    sharp, noise = compare(rows[0].found, rows[1].found)
    assert sharp.points == pytest.approx(-1.5) and sharp.worse and sharp.chance is None
    assert noise.points == pytest.approx(-2) and noise.worse and (noise.lost, noise.won) == (0, 0)


def test_other_cases_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match="'a' was measured on 2 cases of seed 0 before and on 3 cases of seed 0 now"):
        compare([row("a", "11")], [row("a", "110")])
    with pytest.raises(ConfigError, match="2 cases of seed 0 before and on 2 cases of seed 7 now"):
        compare([row("a", "11")], [row("a", "11", seed=7)])
    with pytest.raises(ConfigError, match="nothing was measured both times; before: a, b"):
        compare([row("a", "1"), row("b", "1")], [row("c", "1")])
    assert [one.after.name for one in compare([row("a", "1"), row("b", "1")], [row("b", "0"), row("c", "1")])] == ["b"]


def test_what_will_be_of_other_cases_is_told_before_it_is_measured(tmp_path: Path) -> None:
    before = EvaluationResult(suite="mini", model="m", icons="c", device="cpu", rows=(row("a", "1"),), limit=8)
    check_comparable(tmp_path / "b.json", before, limit=8, seed=0)
    for limit, seed in ((None, 0), (8, 1)):
        with pytest.raises(ConfigError, match=r"b\.json was measured with --limit 8 and with --seed 0: give the same"):
            check_comparable(tmp_path / "b.json", before, limit=limit, seed=seed)
    check_comparable(tmp_path / "b.json", replace(before, rows=()), limit=8, seed=5)


def test_rows_together_count_each_case_alike() -> None:
    both = together([row("a", "1000"), row("a", "11", seed=1)])
    assert (both.name, both.cases, both.value, both.hits) == ("a", 6, 0.5, "100011")
    ratio = Row(name="b", value=1.0, cases=2, seed=0)
    assert together([row("a", "0"), ratio], "all") == Row(name="all", value=2 / 3, cases=3, seed=0)


def test_what_was_printed_is_read_again(tmp_path: Path) -> None:
    result = EvaluationResult(suite="mini", model="m", icons="c", device="cpu", rows=(row("a", "101"),))
    file = tmp_path / "before.json"
    file.write_text(json.dumps(result.to_dict()), encoding="utf-8")
    assert read_result(file) == result


def test_a_file_that_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone.json cannot be read .*; make it with: anygen eval … --json"):
        read_result(tmp_path / "gone.json")
    for name, text, said in (
        ("table", "┏━━━┓", "it is not JSON"),
        ("other", '{"suite": "mini"}', "model: Field required"),
        ("rows", '{"suite": "mini", "model": "m", "icons": "", "device": "", "rows": [{"name": 3}]}', r"rows\.0\."),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=f"{name} holds no evaluation .*{said}"):
            read_result(tmp_path / name)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="bytes holds no evaluation"):
        read_result(tmp_path / "bytes")
    with pytest.raises(ConfigError, match="it: "):
        parse_result("[]")


def test_the_table_tells_what_fell() -> None:
    from rich.console import Console

    screen = StringIO()
    rows = [change("1" * 50, "1" * 48 + "00"), change("01", "11")]
    Console(file=screen, width=100).print(comparison_table("since", rows))
    assert "│    50 │  1.000 │ 0.960 │   -4.0 │    2 │   0 │      0.50 │" in screen.getvalue()
    assert "│     2 │  0.500 │ 1.000 │  +50.0 │    0 │   1 │      1.00 │" in screen.getvalue()
