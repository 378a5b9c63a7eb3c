"""`docs/new-modality.md` from its first block to its last: an empty folder becomes an installed package, a trained
adapter, a saved model, and the same model loaded again. On a tiny model, with few steps."""

import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from anygen import extension, registry
from anygen.cli import main
from anygen.errors import UnknownComponentError
from anygen.media_base import MEDIA
from anygen.messages import MediaPart
from anygen.pipeline import AnyGenPipeline
from anygen.reply import PlannedPart, Reply

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
QUICK = {
    "read.yaml": ["name_steps=60", "steps=4", "batch_size=4"],
    "make.yaml": ["steps=4", "batch_size=4", "kept=4", "fit_steps=200"],
}
"""Recipe -> what the test replaces; the tiny model takes the place of anygen-mini as well."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; what the package registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    monkeypatch.setattr(extension, "_inputs", {})
    monkeypatch.setattr(extension, "_outputs", {})
    media = dict(MEDIA)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "work"
    MEDIA.clear()
    MEDIA.update(media)
    for name in [name for name in sys.modules if name.partition(".")[0] == "anygen_wave"]:
        del sys.modules[name]


def run(line: str, site: Path, model: Path) -> None:
    """One line of a shell block."""
    match shlex.split(line):
        case ["mkdir", "-p", path]:
            Path(path).mkdir(parents=True)
        case ["pip", "install", "-e", "."]:
            quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
            command = [sys.executable, "-m", "pip", "install", *quiet, "--target", str(site), "."]
            subprocess.run(command, check=True, env=os.environ | {"PIP_NO_INPUT": "1"})
        case ["python", script]:
            runpy.run_path(script, run_name="__main__")
        case ["anygen", "train", recipe]:
            replaced = QUICK[recipe] + ([] if "model:" in Path(recipe).read_text() else [f"model={model}"])
            assert main(["train", recipe, *replaced]) == 0
        case ["anygen", *arguments]:
            assert main(arguments) == 0
        case _:
            raise AssertionError(f"the tutorial has a line that nobody runs: {line}")


def test_the_tutorial_goes_from_an_empty_folder_to_a_model_that_is_loaded_again(
    folder: Path,
    tmp_path: Path,
    anything_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    document = (ROOT / "docs/new-modality.md").read_text(encoding="utf-8")
    for language, text in BLOCK.findall(document):
        if language in ("toml", "python", "yaml"):
            name = text.splitlines()[0].removeprefix("# ")
            assert re.fullmatch(r"[\w/]+\.(py|toml|yaml)", name), "a file's block begins with its name"
            Path(name).write_text(text, encoding="utf-8")
        elif language == "bash":
            for line in text.splitlines():
                run(line, site, anything_directory)
    said = capsys.readouterr().out
    assert "anygen-wave 0.1.0 (anygen_wave) brings encoder spectrum, generator dials" in said
    assert "named: " in said and "cases: 48" in said and "kept: " in said

    pipe = AnyGenPipeline.from_pretrained(folder / "runs/make/model", device="cpu")
    first = AnyGenPipeline.from_pretrained(folder / "runs/read/model", device="cpu")
    assert list(pipe.model.settings.outputs) == ["image", "video", "audio", "wave"]
    assert pipe.model.settings.plugins == {"anygen-wave": ("encoder spectrum", "generator dials")}
    log = [json.loads(line) for line in Path("runs/read/new_input.jsonl").read_text().splitlines()]
    assert next(row["nearest"] for row in log if "nearest" in row) == 1.0, "every wave's words are found"

    wave = MEDIA["wave"].from_path("data/held_out/100-0.csv")
    messages = [
        {"role": "user", "content": [{"type": "wave", "wave": wave}, {"type": "text", "text": "What is this?"}]}
    ]
    assert pipe(messages, max_new_tokens=8).text == first(messages, max_new_tokens=8).text
    with torch.no_grad():
        parts = [MediaPart("wave", wave)]
        tokens = [p.model.media_tokens("wave", p.model.encode_parts(parts)["wave"]) for p in (pipe, first)]
    torch.testing.assert_close(tokens[0], tokens[1], rtol=0, atol=0)

    condition = pipe.generator("wave").encode_text(["a fast big square wave"])
    plan = Reply(content=(PlannedPart("wave", condition, "a fast big square wave"),), seed=3)
    (path,) = pipe.render(plan).save(folder / "out")
    assert path.name == "01-a-fast-big-square-wave.csv" and len(path.read_text().splitlines()) == 256

    monkeypatch.setattr(sys, "stdin", io.StringIO("/wave data/held_out/100-0.csv\nWhat is this?\n/quit\n"))
    assert main(["chat", "--model", "runs/make/model", "--max-new-tokens", "4", "--device", "cpu"]) == 0

    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(site)])
    with pytest.raises(UnknownComponentError, match="the plugin 'anygen-wave' is not installed, which brings the enc"):
        AnyGenPipeline.from_pretrained(folder / "runs/make/model", device="cpu")
    assert "brings the encoder 'spectrum' of wave: pip install anygen-wave" in document.replace("\n", " ")
