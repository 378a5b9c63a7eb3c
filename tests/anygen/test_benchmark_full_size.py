"""`benchmarks/full_size.py` at tiny size: the same code, and rows that mean what they say."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from anygen.features import Condition

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    made: Any = import_module("full_size")
    monkeypatch.setattr(made, "FEW", 2)
    monkeypatch.setattr(made, "MANY", 4)
    return made


@pytest.fixture
def bench(script: Any, tmp_path: Path) -> Any:
    return script.Bench(script.TINY, tmp_path, torch.device("cpu"), script.Speed(), repeats=1)


def test_one_table_for_both_ways_as_json(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "--device", "cpu", "--quick", "--json", "--only", "llm,image,request,plain"]
    assert script.main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    rows = {row["what"]: row for row in told["rows"]}
    assert told["speed"] == {"graphs": False, "compile": False} and told["machine"]["torch"] == torch.__version__
    for what in (
        "LLM, decoding",
        "picture, batch 1",
        "picture, batch 4",
        "request, 2 steps",
        "request, plain, 4 steps",
    ):
        assert rows[what]["value"] > 0
    ratio, slow, fast = (
        rows[what] for what in ("faster, 2 steps against 4", "request, plain, 4 steps", "request, 2 steps")
    )
    assert ratio["value"] == pytest.approx(slow["value"] / fast["value"]) and ratio["least"] == 6
    assert "reading from disk" in slow["note"] and "generators" in fast["note"]
    assert "clip, batch 1" not in rows


def test_the_fast_side_is_the_pipeline_and_its_answer_is_whole(bench: Any) -> None:
    reply = bench.answer(2)
    assert [medium.modality for medium in reply.media] == ["image", "video", "audio"]
    assert reply.text == "a" * 64 and len(reply.videos[0].frames) == 3
    assert bench.model.memories is not None and len(bench.model.memories._idle) == 1  # it went the fast way
    assert reply == bench.answer(2)


def test_the_plain_side_speaks_as_long_and_makes_the_same_kinds(bench: Any, script: Any) -> None:
    states = script.plain.states(bench.model, [5, 6, 7], script.TEXT)
    assert {m: tuple(s.shape) for m, s in states.items()} == {m: (1, count, 32) for m, count in script.SIGNALS.items()}
    ids = bench.model.llm.tokenizer("aa")["input_ids"]
    laps = script.plain.request(bench.model, bench.folder, bench.size, ids, text=4, steps=2, dtype=torch.float32)
    assert list(laps) == ["LLM", "reading from disk", "image", "video", "audio"] and min(laps.values()) > 0


def test_work_is_counted_as_a_real_call_has_it(bench: Any) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for modality in ("image", "video", "audio"):
        generator: Any = bench.pipe.generator(modality)
        condition = generator.condition_spec.shapes
        parts = {name: torch.randn(1, *shape) for name, shape in condition.items()}
        counted = []
        hook = generator.unet.register_forward_hook(lambda *_, c=counted: c.append(1))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # else attention is not counted
            generator.sample(Condition(parts), [0], 2, 4.0)
        hook.remove()
        assert len(counted) == 2
        assert bench.work(modality, 1) == pytest.approx(counter.get_total_flops() / 2, rel=0.01), modality


def test_what_would_begin_after_the_budget_is_left_out_and_said(bench: Any) -> None:
    rows = {row.what: row for row in bench.rows(["llm", "plain"], budget=-1)}
    assert rows["llm"].value is None and rows["llm"].note == "left out: the budget of -1 s is spent"
    assert "faster, 2 steps against 4" not in rows


def test_the_small_plan_says_what_it_lacks_or_takes(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from anygen import quantization

    monkeypatch.setattr(quantization, "_installed", lambda module: False)
    rows = {row.what: row for row in bench.rows(["small"], budget=100)}
    row = rows["4 bits and offload"]
    assert row.value is None and row.bar == 16 and "pip install torchao" in row.note
    predicted = rows["memory that `anygen info nextgpt-7b --memory` tells, of what is here"]
    assert 20 < predicted.value < 30


def test_an_unknown_part_is_refused(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["--only", "llm,everything"])
    assert stop.value.code == 2 and "--only is of ceilings, llm, image" in capsys.readouterr().err


def test_a_row_may_want_at_least_so_much(script: Any) -> None:
    row = script.Row
    assert row("a", 7.0, "times", least=6.0).met and not row("a", 5.0, "times", least=6.0).met
    assert (
        row("a", None, "times", least=6.0).met is None
        and row("a", 1.0, "s", 2.0).met
        and row("a", 1.0, "s").met is None
    )
