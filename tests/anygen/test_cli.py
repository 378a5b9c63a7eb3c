"""The command line, in this process: exit codes, what goes to stdout and stderr, and which files are left."""

import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from anygen import __version__
from anygen.cli import main
from anygen.media import Image, read_metadata

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Runs `anygen …` in an empty folder; returns exit code, stdout, stderr. Models default to the tiny one."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards
        monkeypatch.delenv(name)

    def call(*arguments: str, stdin: str = "", model: bool = True) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        given = [*arguments, "--model", str(tiny_directory), "--device", "cpu"] if model else list(arguments)
        capfd.readouterr()
        try:
            code = main(given)
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, error = capfd.readouterr()
        return code, out, error

    with warnings.catch_warnings():
        yield call


def draw(path: Path) -> Path:
    PIL.Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)).save(path)
    return path


def files(folder: str = ".") -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def test_an_answer_goes_to_stdout_and_its_media_to_a_folder(run: Run) -> None:
    code, out, error = run("generate", "Draw", "--seed", "4", "--max-new-tokens", "3")
    assert (code, out, error) == (0, "anygen-out/01-draw.png\n", "")
    assert files() == ["anygen-out/01-draw.png"]
    assert Image.from_path("anygen-out/01-draw.png").size == (16, 16)
    told = read_metadata("anygen-out/01-draw.png")
    assert (told["prompt"], told["seed"], told["model"]) == ("Draw", 4, "tiny")
    code, out, error = run("generate", "Hello", "--out", "words")
    assert code == 0 and out.strip() and error == "" and not Path("words").exists()


def test_json_is_one_object_and_nothing_else(run: Run) -> None:
    code, out, error = run("generate", "Draw and play", "--json", "--seed", "4", "--max-new-tokens", "30")
    assert (code, error) == (0, "")
    answer = json.loads(out)
    assert list(answer) == ["text", "content", "seed", "timings"] and answer["seed"] == 4
    assert [part["type"] for part in answer["content"][:2]] == ["image", "audio"]
    assert answer["content"][1]["seed"] == 5
    assert all(Path(part["path"]).is_file() for part in answer["content"] if part["type"] != "text")
    words = [part["text"] for part in answer["content"] if part["type"] == "text"]
    assert words and answer["text"].split() == " ".join(words).split()
    assert set(answer["timings"]) == {"llm", "generators"}
    assert len(out.splitlines()) == 1


def test_the_answer_is_that_of_the_pipeline(run: Run, pipe: Any) -> None:
    run("generate", "Draw", "--seed", "4", "--steps", "3", "--guidance", "1.5", "--max-new-tokens", "3")
    wanted = pipe("Draw", seed=4, steps=3, guidance_scale=1.5, max_new_tokens=3).images[0]
    made = Image.from_path("anygen-out/01-draw.png")
    np.testing.assert_allclose(made.array.astype(int), wanted.array.astype(int), atol=1)
    drawn = json.loads(run("generate", "Hello", "--seed", "4", "--temperature", "2", "--json")[1])
    assert drawn["text"] == pipe("Hello", seed=4, temperature=2.0).text


def test_nothing_is_overwritten_unless_asked_for(run: Run) -> None:
    for seed in ("1", "2"):
        run("generate", "Draw", "--seed", seed, "--max-new-tokens", "3")
    assert files() == ["anygen-out/01-draw.png", "anygen-out/02-draw.png"]
    before = Path("anygen-out/01-draw.png").read_bytes()
    run("generate", "Draw", "--seed", "2", "--max-new-tokens", "3", "--overwrite")
    assert files() == ["anygen-out/01-draw.png", "anygen-out/02-draw.png"]
    assert Path("anygen-out/01-draw.png").read_bytes() != before


def test_the_prompt_may_come_through_a_pipe(run: Run) -> None:
    assert run("generate", "--max-new-tokens", "3", stdin="Draw\n")[1] == "anygen-out/01-draw.png\n"
    code, out, error = run("generate", stdin="")
    assert (code, out) == (2, "")
    assert error == 'anygen: the prompt is empty; say something: anygen generate "Draw a red apple"\n'


def test_pictures_go_with_the_prompt(run: Run, tmp_path: Path) -> None:
    picture = str(draw(tmp_path / "a.png"))
    code, out, error = run("generate", "What is this?", "--image", picture, "--image", picture, "--json", "--seed", "1")
    assert (code, error) == (0, "") and "encoders" in json.loads(out)["timings"]
    alone = json.loads(run("generate", "--image", picture, "--json", "--seed", "1")[1])
    assert alone["content"] != json.loads(out)["content"]


def test_a_warning_is_one_line(run: Run, tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.webp", save_all=True, append_images=frames[1:])
    code, out, error = run("generate", "Hello", "--image", str(tmp_path / "two.webp"), "--json")
    assert code == 0 and json.loads(out)
    assert error == (
        "anygen: warning: two.webp is animated (2 frames); only the first is used; pass it as a video for all\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", ""], 'the prompt is empty; say something: anygen generate "Draw a red apple"'),
        (["generate", " \n "], "the prompt is empty; say something, or pass media"),
        (["generate", "Hi", "--image", "nowhere.png"], "there is no file nowhere.png"),
        (["generate", "Hi", "--image", "folder"], "folder is a directory; a file is wanted"),
        (["generate", "Hi", "--image", "text.png"], "text.png is not a picture that can be read: its content is text"),
        (["generate", "Hi", "--image", "cut.png"], "cut.png is damaged or cut short"),
        (["generate", "Hi", "--video", "nowhere.mp4"], "the model cannot read video; it reads text, image"),
        (["generate", "Hi", "--audio", "nowhere.wav"], "the model cannot read audio; it reads text, image"),
        (["generate", "Hi", "--out", "text.png"], "--out text.png cannot be a directory: text.png is a file"),
        (["generate", "Hi", "--out", "text.png/a"], "--out text.png/a cannot be a directory: text.png is a file"),
        (["generate", "Hi", "--temperature", "-1"], "temperature is not negative, got -1.0"),
        (["generate", "Hi", "--device", "tpu"], "there is no device 'tpu'; here there are: "),
        (["generate", "apple " * 300], "tokens, and the LLM reads at most 256"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, arguments: list[str], message: str, tmp_path: Path) -> None:
    Path("folder").mkdir()
    Path("text.png").write_text("not a picture")
    Path("cut.png").write_bytes(draw(tmp_path / "whole.png").read_bytes()[:-60])
    before = files()
    if "--device" in arguments:
        code, out, error = run(*arguments, model=False)
    else:
        code, out, error = run(*arguments)
    assert (code, out) == (2, "")
    assert message in error and error.startswith("anygen: ") and error.count("\n") == 1
    assert files() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--seed", "abc"], "argument --seed: 'abc' is not a whole number from 0 to 2^63 - 1"),
        (["generate", "x", "--seed", "-1"], "argument --seed: '-1' is not a whole number from 0"),
        (["generate", "x", "--seed", str(2**63)], "is not a whole number from 0 to 2^63 - 1"),
        (["generate", "x", "--steps", "0"], "argument --steps: '0' is not a whole number above 0"),
        (["generate", "x", "--guidance", "much"], "argument --guidance: 'much' is not a number"),
        (["generate", "Draw", "a", "cat"], "unrecognized arguments: a cat"),
        (["generat"], "invalid choice: 'generat' (choose from 'generate', 'chat', 'info', 'train', 'eval', 'data',"),
        ([], "the following arguments are required: COMMAND"),
        (["data"], "the following arguments are required: ACTION"),
        (["data", "build", "icons"], "the following arguments are required: --out"),
        (["train"], "the following arguments are required: RECIPE.yaml"),
        (["convert"], "anygen convert: the following arguments are required: KIND"),
        (["convert", "gpt", "a", "--out", "b"], "invalid choice: 'gpt' (choose from 'nextgpt', 'imagebind')"),
        (["convert", "nextgpt", "a"], "the following arguments are required: --out"),
        (["convert", "nextgpt", "a", "--out", "b", "--lora-alpha", "0"], "'0' is not a whole number above 0"),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(run: Run, arguments: list[str], message: str) -> None:
    code, out, error = run(*arguments, model=False)
    assert (code, out) == (2, "")
    assert message.replace("'", "") in error.replace("'", "") and error.count("\n") == 1
    assert error.startswith("anygen")


@pytest.mark.parametrize("command", ["generate", "info", "chat", "eval"])
def test_an_unknown_model_lists_the_known_ones(run: Run, command: str) -> None:
    arguments = {"generate": ["x", "--model"], "info": [], "chat": ["--model"], "eval": ["mini", "--model"]}[command]
    code, out, error = run(command, *arguments, "anygen-mni", model=False)
    assert (code, out) == (2, "")
    assert error == (
        "anygen: there is no model 'anygen-mni' (did you mean 'anygen-mini'?); known: anygen-mini, "
        "smollm2-135m-instruct, a directory, or a repository of the Hugging Face hub (org/name); presets to train: "
        "nextgpt-7b-v1, nextgpt-7b, smollm3-3b, qwen3-4b, llama-3-8b\n"
    )


def test_a_damaged_model_names_the_file(run: Run, tiny_directory: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_directory, model)
    (model / "generators/audio/model.safetensors").unlink()
    code, out, error = run("generate", "x", "--model", str(model), model=False)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert f"anygen: {model} is damaged: generators/audio/model.safetensors is missing" in error


@pytest.mark.parametrize("json_too", [False, True])
def test_ctrl_c_while_a_picture_is_made_leaves_nothing(
    run: Run, pipe: Any, monkeypatch: pytest.MonkeyPatch, json_too: bool
) -> None:
    from diffusers import UNet2DConditionModel

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(UNet2DConditionModel, "forward", interrupt)
    code, out, error = run("generate", "Draw", "--max-new-tokens", "3", *["--json"] * json_too)
    assert (code, out, error) == (130, "", "anygen: interrupted\n")
    assert list(Path().iterdir()) == []


def test_ctrl_c_while_a_file_is_written_leaves_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Image, path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "_write", interrupt)
    code, out, _ = run("generate", "Draw", "--max-new-tokens", "3")
    assert (code, out, files()) == (130, "", [])


def test_a_fault_of_ours_shows_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("anygen.cli_info.info", fail)
    with pytest.raises(ZeroDivisionError):  # the interpreter prints it and exits with 1
        run("info", model=False)


def test_what_a_library_prints_is_kept_off_stdout(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from anygen.generators.stable_diffusion import StableDiffusionGenerator

    decode = StableDiffusionGenerator.decode

    def chatty(self: Any, latents: Any) -> Any:
        print("a library's note")
        return decode(self, latents)

    monkeypatch.setattr(StableDiffusionGenerator, "decode", chatty)
    code, out, error = run("generate", "Draw", "--max-new-tokens", "3", "--json")
    assert code == 0 and json.loads(out) and "a library's note" in error


def test_info_tells_a_model_and_a_file(run: Run, tiny_directory: Path, tmp_path: Path) -> None:
    code, out, error = run("info", str(tiny_directory), model=False)
    assert (code, error) == (0, "") and "tiny (apache-2.0)" in out and "in \\ out" in out
    told = json.loads(run("info", str(tiny_directory), "--json", model=False)[1])
    assert told["makes"] == ["text", "image", "audio"]
    run("generate", "Draw", "--seed", "4", "--max-new-tokens", "3")
    code, out, _ = run("info", "anygen-out/01-draw.png", model=False)
    assert code == 0 and "prompt   Draw\n" in out and "seed     4\n" in out
    assert json.loads(run("info", "anygen-out/01-draw.png", "--json", model=False)[1])["seed"] == 4
    code, out, error = run("info", str(draw(tmp_path / "a.png")), model=False)
    assert (code, out) == (2, "") and "a.png holds nothing that anygen wrote" in error
    code, _, error = run("info", str(tmp_path), model=False)
    assert code == 2 and "is not an anygen model: it has no anygen.json" in error


def test_a_chat_remembers_and_writes_media_as_they_come(run: Run, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    lines = [
        "Draw",
        f"/image {tmp_path / 'a.png'}",
        "What is this?",
        "/save",
        "/seed 5",
        "/reset",
        "/help",
        "Draw",
        "/save talk/of us.md",
        "/quit",
        "Draw",
    ]
    code, out, error = run("chat", "--seed", "4", "--max-new-tokens", "3", stdin="\n".join(lines))
    assert code == 0 and f"[image with the next message: {tmp_path / 'a.png'}]" in error
    assert "/image FILE" in out
    pictures = sorted(Path("anygen-out").glob("*-draw.png"))
    assert len(pictures) == 2 and [read_metadata(path)["seed"] for path in pictures] == [4, 5]
    saved = next(Path("anygen-out").glob("*-chat.md"))
    assert str(saved) in out and "talk/of us.md" in out
    first, second = saved.read_text(), Path("talk/of us.md").read_text()
    assert f"![image](<{pictures[0].name}>)" in first and "a.png>)" in first and "What is this?" in first
    assert f"![image](<../{pictures[1]}>)" in second and "What is this?" not in second


def test_a_chat_goes_on_after_bad_input_and_says_so_at_the_end(run: Run) -> None:
    lines = ["/image nowhere.png", "/video x.mp4", "/image", "/seed abc", "/frob", "/save", "", "Hello"]
    code, out, error = run("chat", "--max-new-tokens", "5", stdin="\n".join(lines))
    assert code == 2 and out.strip()
    assert error.splitlines() == [
        "anygen: there is no file nowhere.png",
        "anygen: the model cannot read video; it reads text, image",
        "anygen: /image wants a file: /image picture.png",
        "anygen: /seed wants a whole number from 0 to 2^63 - 1, got 'abc'",
        "anygen: there is no command /frob; /help lists them",
        "anygen: nothing was said yet, so there is nothing to save",
    ]


def test_a_chat_streams_what_a_call_returns(run: Run, pipe: Any) -> None:
    code, out, _ = run("chat", "--seed", "4", "--max-new-tokens", "30", stdin="Hello\n")
    assert code == 0 and out.strip() == pipe("Hello", seed=4, max_new_tokens=30).text.strip()


def test_ctrl_c_ends_a_piped_chat(run: Run, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(pipe.generator("image")), "sampling", interrupt)
    code, _, error = run("chat", "--max-new-tokens", "3", stdin="Draw\nHello\n")
    assert code == 130 and error.endswith("anygen: interrupted\n") and files() == []


def test_train_runs_a_recipe_and_prints_its_figures(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, error = run("train", "nowhere.yaml", model=False)
    assert (code, out, error) == (2, "", "anygen: there is no recipe nowhere.yaml\n")
    Path("bad.yaml").write_text("kind: frob\nout: runs\n")
    code, _, error = run("train", "bad.yaml", model=False)
    assert code == 2 and "bad.yaml: kind is 'frob'; known kinds: autoencoder" in error
    given: list[Any] = []

    def train(path: Path, overrides: Any) -> dict[str, float]:
        given.extend([path, overrides])
        print("a library's note")
        return {"loss": 0.125}

    monkeypatch.setattr("anygen.training.recipes.run", train)
    code, out, _ = run("train", "a.yaml", "steps=3", "optimizer.rate=1e-3", model=False)
    assert (code, out) == (0, "loss: 0.125\n")
    assert given == [Path("a.yaml"), ["steps=3", "optimizer.rate=1e-3"]]
    tried: list[Any] = []
    monkeypatch.setattr("anygen.training.recipes.dry_run", lambda *told: tried.extend(told))
    assert run("train", "a.yaml", "steps=3", "--dry-run", "out=x", model=False)[0] == 0
    assert tried == [Path("a.yaml"), ["steps=3", "out=x"]]
    code, _, error = run("train", "a.yaml", "--dry", "out", "--fast=1", model=False)
    assert code == 2 and "unrecognized arguments: " in error


def test_eval_prints_a_table_or_json(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anygen.training.evaluation_report import EvaluationResult, Row

    row = Row(name="text -> image", value=0.5, cases=3, seed=0, bar=0.9)
    given: dict[str, Any] = {}

    def measure(model: Any, generators: Any, icons: Path, **options: Any) -> EvaluationResult:
        given.update(options, icons=icons, makes=list(generators))
        return EvaluationResult(suite="mini", model="tiny", icons="0" * 64, device="cpu", rows=(row,))

    monkeypatch.setattr("anygen.training.evaluation.evaluate", measure)
    code, out, _ = run(
        "eval",
        "mini",
        "--limit",
        "3",
        "--data",
        "somewhere",
        "--report",
        "sheet",
        "--only",
        "talk",
        "--batch-size",
        "4",
    )
    assert code == 0 and "text -> image" in out and "0.500" in out
    assert given == {
        "icons": Path("somewhere"),
        "makes": ["image", "audio"],
        "suite": "mini",
        "only": ["talk"],
        "batch_size": 4,
        "limit": 3,
        "seed": 0,
        "report": Path("sheet"),
    }
    code, out, error = run("eval", "mini", "--json")
    assert (code, error) == (0, "") and json.loads(out)["rows"][0]["met"] is False

    before = tmp_path / "before.json"
    before.write_text(out, encoding="utf-8")
    row = replace(row, value=0.25, hits="")
    code, out, _ = run("eval", "mini", "--compare", str(before))
    assert code == 0 and "0.9" in out and re.search(r"since .*0\.500 │ 0\.250 │\s+-25\.0", out, re.DOTALL)
    code, out, error = run("eval", "mini", "--compare", str(before), "--json")
    assert json.loads(out)["rows"][0]["value"] == 0.25 and "-25.0" in error
    row = replace(row, cases=4)
    code, out, error = run("eval", "mini", "--compare", str(before))
    assert code == 2 and "0.250" in out and "on 3 cases of seed 0 before and on 4 cases" in error

    def full(*_: Any, **__: Any) -> EvaluationResult:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90.00 MiB.\nProcess 7")

    with monkeypatch.context() as patched:
        patched.setattr("anygen.training.evaluation.evaluate", full)
        code, _, error = run("eval", "mini")
    told = "not enough memory (CUDA out of memory. Tried to allocate 90.00 MiB.); lower --batch-size 16"
    assert code == 2 and told in error
    given.clear()
    code, _, error = run("eval", "mini", "--compare", str(before), "--limit", "3", "--seed", "1")
    assert code == 2 and "before.json was measured without --limit and with --seed 0: give the same" in error
    code, _, error = run("eval", "mini", "--compare", str(tmp_path / "gone"))
    assert code == 2 and "gone cannot be read" in error and not given


def test_eval_without_data_says_how_to_make_them(run: Run) -> None:
    code, _, error = run("eval", "mini")
    assert code == 2
    assert error.endswith(
        "anygen: there is no icon set in data/icons: make it with 'anygen data build icons --out DIR'\n"
    )
    assert "there is no suite 'maxi'; known: mini" in run("eval", "maxi")[2]
    known = "known: image, modality, naming, talk, controls, audio, video, retrieval, matrix"
    assert f"there are no rows smell; {known}" in run("eval", "mini", "--only", "smell")[2]


def test_data_build_makes_what_it_is_asked_for(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, error = run("data", "build", "cats", "--out", "x", model=False)
    assert (code, error) == (2, "anygen: there is no dataset 'cats'; known: icons, animations, sounds\n")
    monkeypatch.setenv("ANYGEN_HOME", str(tmp_path / "home"))
    given: list[Path] = []
    monkeypatch.setattr("anygen.training.icons.build", lambda *paths: given.extend(paths) or "abc123")
    code, out, _ = run("data", "build", "icons", "--out", "icons", model=False)
    assert (code, out) == (0, "icons: checksum abc123\n")
    assert given == [Path("icons"), tmp_path / "home" / "npm"]


def test_help_and_version_import_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "diffusers", "numpy", "PIL", "rich", "pydantic")
    code = (
        "import sys\nfrom anygen.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        f"    assert not end.code\nprint([name for name in {heavy} if name in sys.modules])"
    )
    for option, wanted in (("--help", "generate"), ("--version", f"anygen {__version__}")):
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True)
        assert wanted in done.stdout and done.stdout.endswith("[]\n")


def test_the_module_runs_as_a_script() -> None:
    done = subprocess.run([sys.executable, "-m", "anygen", "frob"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and "invalid choice" in done.stderr


def test_a_reader_that_leaves_is_no_fault(tiny_directory: Path) -> None:
    command = [sys.executable, "-m", "anygen", "info", str(tiny_directory)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
