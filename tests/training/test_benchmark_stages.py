"""`benchmarks/stages.py`: its data are seeded, its commands recipes, and what changed decides what is measured."""

import json
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from anygen.messages import MediaPart, Message, TextPart
from anygen.training.evaluation_report import EvaluationResult, Rows
from anygen.training.icons import IconSet
from anygen.training.recipes import read
from anygen.training.sounds import SoundBank
from anygen.training.wishes import ImageWishes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("stage_data")


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("stages")


def test_media_and_captions_are_seeded(data: Any, icons: IconSet, bank: SoundBank, tmp_path: Path) -> None:
    made = [
        data.make_media(tmp_path / name, icons, bank, 8) for name in ("one", "two") if not (tmp_path / name).mkdir()
    ]
    assert made[0] == made[1] and {m: len(seen) for m, seen in made[0].items()} == {"image": 8, "video": 8, "audio": 8}
    for seen in (seen for some in made[0].values() for seen in some):
        one, two = (tmp_path / name / data._file(seen) for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    words = data.captions(ImageWishes(icons.concepts), icons, 12)
    assert words == data.captions(ImageWishes(icons.concepts), icons, 12) and len(set(words)) == 12


def test_pairs_prefer_what_was_asked_for(data: Any) -> None:
    draw = Message("user", (TextPart("Draw a dog."),))
    medium: Any = MediaPart("image", "a dog")  # type: ignore[arg-type]
    shown = [draw, Message("assistant", (TextPart("Here is a dog."), medium))]
    plain = [Message("user", (TextPart("Hello"),)), Message("assistant", (TextPart("Good day."),))]
    other = Message("assistant", (TextPart("Here is a cat."), MediaPart("image", "a cat")))  # type: ignore[arg-type]
    rng, kinds = random.Random(0), set[str]()
    for chat in (shown, plain):
        for _ in range(40):
            pair = data.pair(chat, other, rng)
            assert pair["chosen"][0] != pair["rejected"][0] and pair["prompt"][0]["role"] == "user"
            kinds.add(json.dumps(pair["rejected"]))
    good, bye = ([{"role": "assistant", "content": words}] for words in ("Good day.", "Goodbye."))
    assert not data.teaches({"prompt": [{"role": "user", "content": "Hello"}], "chosen": good, "rejected": bye})
    assert data.teaches(data.pair(shown, other, rng))
    assert len(kinds) == 3 + 3 + 1  # no medium or a wrong one of two; one of three where there was none; something else


def test_what_changed_by_value_decides_what_is_measured(stages: Any, tmp_path: Path) -> None:
    def model(name: str, dtype: torch.dtype, **changes: float) -> dict[str, str]:
        values = {"input.image.weight": 1.0, "output.image.weight": 2.0, "output.audio.weight": 3.0} | changes
        (tmp_path / name).mkdir()
        tensors = {key.replace("__", "."): torch.full((2,), value, dtype=dtype) for key, value in values.items()}
        save_file(tensors, tmp_path / name / "projectors.safetensors")
        return stages.digests(tmp_path / name)

    before = model("before", torch.float32)
    assert stages.touched(before, model("same", torch.bfloat16)) == ([], [])
    changed, rows = stages.touched(before, model("drawn", torch.float32, **{"output.image.weight": 5.0}))
    assert changed == ["output.image"] and set(rows) == {"image", "controls", "video", "matrix"}
    changed, rows = stages.touched(before, model("seen", torch.float32, **{"input.image.weight": 5.0}))
    assert changed == ["input"] and set(rows) == {"modality", "naming", "matrix"}
    assert set(stages.touched(before, before | {"unheard.of": "1"})[1]) >= set(stages.EVERYTHING)


def test_every_command_is_a_recipe_that_reads(stages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(stages.STAGES) == 5
    for stage in stages.STAGES.values():
        command = stage.command(tmp_path / "data", tmp_path / "out", 7)
        assert command[0] == "train"
        (run,) = read(Path(command[1]), command[2:])
        assert run.recipe.to_dict()["steps"] == 7 and str(run.out).startswith(str(tmp_path / "out"))


def test_seeds_are_counted_together_and_a_stage_that_fails_leaves_the_others(
    stages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands themselves are not run; what they would print and write is."""
    calls: list[list[str]] = []

    def anygen(self: Any, arguments: list[str], log: Path) -> str:
        calls.append(list(arguments))
        if arguments[0] == "train":
            out = Path(next(word for word in arguments if word.startswith("out="))[4:])
            if "preference" in arguments[1]:
                raise SystemExit("preference tuning failed")
            (out / "model").mkdir(parents=True)
            (out / "training.jsonl").write_text('{"final": true, "loss": 0.5}\n')
            return ""
        log.parent.mkdir(parents=True, exist_ok=True)
        if calls.count(calls[-1]) == 1 and "anygen-mini" in arguments:
            log.write_text("anygen: not enough memory (CUDA out of memory.); lower --batch-size 16\n")
            raise SystemExit("beside others")
        rows, seed = Rows(int(arguments[arguments.index("--seed") + 1])), arguments[arguments.index("--seed") + 1]
        before, after = {"0": ("1110", "0110"), "1": ("10", "00")}[seed]
        hits = before if "anygen-mini" in arguments else after
        rows.share("any to any: text -> text", [hit == "1" for hit in hits])
        rows.add("noise", 0.5, 3, less_is_better=True)
        result = EvaluationResult(suite="mini", model="m", icons="c", device="cpu", rows=tuple(rows.found))
        return json.dumps(result.to_dict())

    monkeypatch.setattr(stages, "make_data", lambda *_: None)
    monkeypatch.setattr(stages.Bench, "anygen", anygen)
    monkeypatch.setattr(stages, "digests", lambda folder: {"adapter": str("runs" in str(folder))})
    told = [
        "--run",
        "encoder_alignment,preference_tuning",
        "--only",
        "talk",
        "--seeds",
        "1",
        "--seeds",
        "talk=2",
        "--json",
    ]
    assert stages.main([*told, "--out", str(tmp_path / "runs")]) == 1
    printed = capsys.readouterr()
    (found,) = json.loads(printed.out)["stages"]
    assert "preference tuning failed" in printed.err and found["stage"] == "encoder_alignment"
    row, noise, pairs = found["rows"]
    assert row["cases"] == 6 and row["before"] == pytest.approx(4 / 6) and row["after"] == pytest.approx(2 / 6)
    assert row["points"] == pytest.approx(-100 * 2 / 6) and (row["lost"], row["won"], row["chance"]) == (2, 0, 0.5)
    assert noise["points"] == 0 and noise["cases"] == 6 and noise["chance"] is None and not noise["worse"]
    assert pairs == row | {"row": "any to any: all pairs"}
    assert [call[0] for call in calls].count("eval") == 4 + 2 and printed.err.count("beside others") == 2


@pytest.mark.parametrize(("told", "said"), [("tlak=2", "there is no row 'tlak'"), ("talk=none", "got 'none'")])
def test_seeds_of_no_row_are_refused(stages: Any, told: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stages.main(["--seeds", told])
    assert said in capsys.readouterr().err


def test_commands_are_spread_over_the_gpus(stages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for count, expected in ((0, [""]), (2, ["0", "1"])):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert stages.places(None) == [{"CUDA_VISIBLE_DEVICES": number} for number in expected]
    assert stages.places("cpu") == [{"CUDA_VISIBLE_DEVICES": ""}] and stages.places("cuda:1") == [{}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert stages.places("cuda") == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"}]
