"""`benchmarks/caption_alignment.py` at tiny size: the same code, equal gradients, and rows that mean what they say."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("caption_alignment")


def test_one_table_with_both_ways_as_json(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--tiny", "--json", "--captions", "2", "--batches", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = {row["what"]: row for row in told["rows"]}
    assert told["captions"] == 2 and told["machine"]["torch"] == torch.__version__
    fast = "+ one caption for all modalities: the fast way"
    assert rows["faster than plain"]["value"] == pytest.approx(rows[fast]["value"] / rows["plain"]["value"])
    assert rows["faster than plain"]["least"] == 3 and rows["activation memory, of plain's"]["met"]
    for what in ("gradient, float32, fast against plain", "gradient, float64, 2 layers, fast against plain"):
        assert rows[what]["met"], rows[what]
    for what in ("the fast way, 8 captions a step", "trained LoRA, faster than plain"):
        assert rows[what]["value"] > 0
    least = rows["faster than plain, in no more memory"]
    assert least["value"] >= rows["faster than plain"]["value"] and least["least"] == 3
    measures = [what for what in rows if " -> " in what]
    assert len(measures) == 5 + 4 and all(rows[what]["value"] > 0 for what in measures)


def test_every_way_has_the_gradient_of_the_plain_one(script: Any) -> None:
    bench = script.Bench(script.TINY, torch.device("cpu"), captions=4, batches=1, even=False)
    rows = [0, 1, 2, 3]
    plain = bench.gradient(bench.model, script.PLAIN, rows)
    for name, way in (script.LADDER | script.WITHOUT).items():
        if way.cached:
            assert script.difference(bench.gradient(bench.model, way, rows), plain) < 1e-4, name
    assert plain.norm() > 0


def test_memory_that_does_not_suffice_makes_steps_smaller(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = script.Bench(script.TINY, torch.device("cpu"), captions=8, batches=1, even=True)

    def measure(way: Any, *, captions: int | None = None, passes: int = 2) -> tuple[float, float]:
        if (captions or bench.captions) > 3:
            raise torch.OutOfMemoryError
        return 1.0, 1.0

    monkeypatch.setattr(bench, "measure", measure)
    rows = {row.what: row for row in bench.rows(["speed", "large"], budget=100)}
    assert bench.captions == 2 and "6 pairs a step" in rows["plain"].note
    assert rows["the fast way, 8 captions a step"].note == "memory does not suffice"
    rows = {row.what: row for row in bench.rows(["lora"], budget=-1)}
    assert rows["lora"].note == "left out: the budget of -1 s is spent"


def test_bad_use_is_refused(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        (["--only", "speed,all"], "--only is of speed, large, gradients, lora, trained; got 'all'"),
        (["--device", "cpu"], "a 7B-shaped LLM needs a GPU; --tiny runs on a CPU"),
        (["--captions", "1"], "--captions at least 2"),
    ):
        with pytest.raises(SystemExit) as stop:
            script.main(arguments)
        assert stop.value.code == 2 and told in capsys.readouterr().err


def test_it_runs_where_little_more_than_transformers_and_peft_is(tmp_path: Path) -> None:
    absent = ["diffusers", "gguf", "soundfile", "av", "rich", "scipy", "platformdirs", "einops"]
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"
        f"sys.path[:0] = [{str(BENCHMARKS)!r}, {str(BENCHMARKS.parent)!r}]\n"
        "import caption_alignment\n"
        "caption_alignment.main(['--tiny', '--json', '--captions', '2', '--batches', '1', '--only', 'gradients'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][1]["met"]
