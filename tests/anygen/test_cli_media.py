"""The command line with media of every modality, on the tiny model of all of them in `conftest.py`."""

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anygen.cli import main
from anygen.media import Audio, Media, Video, read_metadata

pytest.importorskip("av", reason="MP4 needs PyAV")
pytest.importorskip("soundfile", reason="WAV needs soundfile")

Run = Callable[..., tuple[int, str, str]]
SHORT = ("--seed", "4", "--max-new-tokens", "9")


@pytest.fixture
def run(
    anything_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Runs `anygen …` in an empty folder on the tiny model; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # set by the command, put back afterwards
        monkeypatch.delenv(name)

    def call(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capfd.readouterr()
        with warnings.catch_warnings():
            code = main([*arguments, "--model", str(anything_directory), "--device", "cpu"])
        out, error = capfd.readouterr()
        return code, out, error

    return call


@pytest.fixture
def given(run: Run, examples: dict[str, Media]) -> dict[str, str]:
    """Modality -> a file of it in the folder."""
    names = {"image": "a picture.png", "video": "clip.mp4", "audio": "sound.wav"}
    return {modality: str(medium.save(names[modality])) for modality, medium in examples.items()}


def test_one_answer_writes_a_picture_a_clip_and_a_sound(run: Run) -> None:
    code, out, error = run("generate", "All three", "--json", *SHORT)
    assert (code, error) == (0, "")
    content = json.loads(out)["content"]
    assert [part["type"] for part in content[:3]] == ["image", "video", "audio"]
    paths = [part["path"] for part in content[:3]]
    assert paths == ["anygen-out/01-all-three.png", "anygen-out/02-all-three.mp4", "anygen-out/03-all-three.wav"]
    assert [read_metadata(path).get("media", 0) for path in paths] == [0, 1, 2]


def test_several_files_of_each_modality_go_with_a_prompt(run: Run, given: dict[str, str], anything: Any) -> None:
    files = [f"--{modality}={path}" for modality, path in given.items() for _ in range(2)]
    code, out, error = run("generate", "Say", *files, "--json", *SHORT)
    assert (code, error) == (0, "")
    kinds = {"image": Path, "video": Path, "audio": Path}
    prompt: list[Any] = ["Say", *(kinds[m](path) for m, path in given.items() for _ in range(2))]
    assert json.loads(out)["text"] == anything(prompt, seed=4, max_new_tokens=9).text


def test_a_length_and_a_policy_may_be_asked_for(run: Run) -> None:
    code, _, error = run("generate", "All three", "--seconds", "0.5", "--offload", "after_use", "--out", "out", *SHORT)
    assert (code, error) == (0, "")
    assert len(Video.from_path("out/02-all-three.mp4").frames) == 3
    assert Audio.from_path("out/03-all-three.wav").seconds == 0.5
    assert read_metadata("out/03-all-three.wav")["seconds"] == 0.5


def test_bits_and_compiling_may_be_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from anygen import compiling, quantization

    compiled: list[Any] = []
    monkeypatch.setattr(compiling, "BACKEND", lambda module, _: compiled.append(module) or module.forward)
    assert run("generate", "Say", "--compile", *SHORT)[0] == 0 and compiled
    monkeypatch.setattr(quantization, "_installed", lambda module: False)
    code, _, error = run("generate", "Say", "--quantization", "4bit", "--device", "cpu", *SHORT)
    assert (code, error.count("\n")) == (2, 1) and "pip install torchao" in error


def test_longer_clips_and_sounds_are_read_if_they_are_asked_to_be(run: Run) -> None:
    Audio(np.zeros(100 * 700, np.float32), 100).save("long.wav")
    code, out, error = run("generate", "Say", "--audio", "long.wav", *SHORT)
    assert (code, out) == (2, "") and "long.wav has 700 seconds, at most 600 are decoded (max_seconds)" in error
    assert run("generate", "Say", "--audio", "long.wav", "--max-seconds", "700", *SHORT)[0] == 0
    code, _, error = run("chat", "--max-seconds", "10", stdin="/audio long.wav\n")
    assert code == 2 and "long.wav has 700 seconds, at most 10 are decoded" in error
    code, _, error = run("generate", "Say", "--audio", "long.wav", "--max-seconds", "-1")
    assert (code, error) == (2, "anygen: --max-seconds is a positive number, got -1\n")
    flicker = np.repeat((np.arange(2000) % 2 * 255).astype(np.uint8), 12).reshape(2000, 2, 2, 3)
    Video(flicker, 10).save("long.gif")
    assert "has 2,000 frames, at most 1,800" in run("generate", "Say", "--video", "long.gif", *SHORT)[2]
    assert run("generate", "Say", "--video", "long.gif", "--max-seconds", "200", *SHORT)[0] == 0


@pytest.mark.parametrize(
    ("option", "name", "content", "message"),
    [
        ("--audio", "notes.wav", b"I am text.", "notes.wav is not a sound that can be read"),
        ("--audio", "empty.wav", b"", "empty.wav is empty (0 bytes)"),
        ("--video", "notes.mp4", b"I am text.", "notes.mp4 is not a video that can be read"),
        ("--video", "empty.mp4", b"", "empty.mp4 is empty (0 bytes)"),
        ("--video", "cut.mp4", None, "cut.mp4 is not a video that can be read"),
        ("--audio", "nowhere.wav", None, "there is no file nowhere.wav"),
    ],
)
def test_bad_media_are_one_line_and_exit_code_2(
    run: Run, given: dict[str, str], option: str, name: str, content: bytes | None, message: str
) -> None:
    if name == "cut.mp4":
        content = Path(given["video"]).read_bytes()[:200]
    if content is not None:
        Path(name).write_bytes(content)
    code, out, error = run("generate", "Say", option, name)
    assert (code, out) == (2, "") and message in error and error.count("\n") == 1
    assert not Path("anygen-out").exists()


def test_a_chat_takes_attachments_of_every_modality(run: Run, given: dict[str, str], anything: Any) -> None:
    attached = [f"/{modality} {path}" for modality, path in given.items()]
    lines = [*attached, "Say", "All three", "/save talk.md"]
    code, out, error = run("chat", *SHORT, stdin="\n".join(lines))
    assert code == 0, error
    assert [line for line in error.splitlines() if line.startswith("[")] == [
        f"[{modality} with the next message: {path}]" for modality, path in given.items()
    ]
    chat = anything.chat(seed=4, max_new_tokens=9)
    first = chat.send([*(Path(path) for path in given.values()), "Say"])
    second = chat.send("All three")
    assert [line for line in out.splitlines() if line.startswith("anygen-out/")] == sorted(
        str(path) for path in Path("anygen-out").iterdir()
    )
    saved = Path("talk.md").read_text()
    assert "![image](<a picture.png>)" in saved
    assert "\n[video](<clip.mp4>)" in saved and "\n[audio](<sound.wav>)" in saved
    assert saved.count("(<anygen-out/") == len(first.media) + len(second.media)
    for path in Path("anygen-out").iterdir():
        told = read_metadata(path)
        assert (told["model"], told["seed"]) == ("anything", 4) and told["prompt"] in ("Say", "All three")


def test_media_of_a_chat_are_written_as_they_come(run: Run) -> None:
    code, out, _ = run("chat", "--seed", "4", "--max-new-tokens", "14", "--seconds", "0.5", stdin="All three")
    assert code == 0
    lines = out.splitlines()
    assert lines[:3] == [f"anygen-out/0{n}-all-three.{suffix}" for n, suffix in enumerate(("png", "mp4", "wav"), 1)]
    assert len(lines) > 3  # words came after the media, and after their paths
    told = read_metadata(lines[2])
    assert (told["prompt"], told["seed"], told["media"], told["seconds"]) == ("All three", 4, 2, 0.5)


@pytest.mark.parametrize("spelling", ["a picture.png", "'a picture.png'", '"a picture.png"', r"a\ picture.png"])
def test_a_file_may_be_named_as_terminals_do(run: Run, given: dict[str, str], spelling: str) -> None:
    code, _, error = run("chat", "--max-new-tokens", "3", stdin=f"/image {spelling}\nSay\n")
    assert (code, error) == (0, f"[image with the next message: {spelling}]\n")


def test_what_a_chat_cannot_attach_is_told(run: Run) -> None:
    code, _, error = run("chat", stdin="/video\n/audio\n/audio it's.wav\n/audio 'no such.wav'\n")
    assert code == 2 and error.splitlines() == [
        "anygen: /video wants a file: /video clip.mp4",
        "anygen: /audio wants a file: /audio sound.wav",
        "anygen: there is no file it's.wav",
        "anygen: there is no file no such.wav",
    ]
