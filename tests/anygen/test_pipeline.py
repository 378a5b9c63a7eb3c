"""The whole path on the tiny model of `conftest.py`."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from anygen import AnyGenPipeline
from anygen.errors import (
    CheckpointError,
    ConfigError,
    HubError,
    MediaError,
    MessageError,
    ModalityError,
    OutOfMemoryError,
    OutputError,
)
from anygen.generators.base import Generator
from anygen.manifest import verify
from anygen.media import Audio, Image, MediaLimits
from anygen.messages import TextPart
from anygen.reply import MadePart, PlannedPart, Reply

PROMPTS = ["Draw", "Hello", "Play", "Draw and play", "Draw three", "What is this?"]
PICTURE = Image.from_any(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))


def kinds(reply: Reply) -> list[str]:
    """The modalities of a reply's parts."""
    return ["text" if isinstance(part, TextPart) else part.modality for part in reply.content]


def same(ours: Reply, theirs: Reply) -> None:
    """Equal but for the last bit of a batch's arithmetic."""
    assert kinds(ours) == kinds(theirs) and len(ours.content) > 0
    assert (ours.text, ours.prompt, ours.seed, ours.finish) == (theirs.text, theirs.prompt, theirs.seed, theirs.finish)
    for a, b in zip(ours.images, theirs.images, strict=True):
        np.testing.assert_allclose(a.array.astype(int), b.array.astype(int), atol=1)
    for a, b in zip(ours.audios, theirs.audios, strict=True):
        np.testing.assert_allclose(a.samples, b.samples, atol=1e-4)
    for a, b in zip(ours.content, theirs.content, strict=True):
        if isinstance(a, MadePart):
            assert isinstance(b, MadePart) and (a.seed, a.caption) == (b.seed, b.caption)


def test_the_answer_has_what_was_asked_for_in_order(pipe: AnyGenPipeline) -> None:
    made = pipe("Draw and play", seed=3, max_new_tokens=5)
    assert kinds(made)[:2] == ["image", "audio"]
    assert isinstance(made.images[0], Image) and isinstance(made.audios[0], Audio)
    assert made.images[0].size == (16, 16) and made.prompt == "Draw and play" and made.model == "tiny"
    assert kinds(pipe("Hello", max_new_tokens=5)) == ["text"]
    assert set(made.timings) == {"llm", "generators"} and all(seconds > 0 for seconds in made.timings.values())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_call_is_the_rendering_of_its_plan(pipe: AnyGenPipeline, prompt: str) -> None:
    options: Any = {"seed": 5, "max_new_tokens": 12}
    plan = pipe.plan(prompt, **options)
    assert all(isinstance(part, TextPart | PlannedPart) for part in plan.content)
    assert pipe.render(plan, steps=3) == pipe(prompt, steps=3, **options)


def test_a_plan_renders_the_same_in_another_process(pipe: AnyGenPipeline, tiny_directory: Path, tmp_path: Path) -> None:
    plan = pipe.plan("Draw and play", seed=5, max_new_tokens=5)
    path = plan.save_plan(tmp_path / "plan.safetensors")
    again = AnyGenPipeline.from_pretrained(tiny_directory, device="cpu").render(Reply.load_plan(path))
    assert again == pipe.render(plan)


def test_a_plan_holds_what_the_output_projector_makes_of_the_states(pipe: AnyGenPipeline) -> None:
    from anygen.messages import parse_one

    plan = pipe.plan("Draw", max_new_tokens=3)
    part = cast(PlannedPart, plan.content[0])
    signals = pipe.model.signal_tokens
    run = list(signals.runs["image"])
    ids = torch.tensor([[*pipe.model.prompts.prompt(parse_one("Draw")).ids, signals.media_id, *run]])
    with torch.no_grad():
        wanted = pipe.model.project("image", pipe.model(input_ids=ids).hidden_states[:, -3:])
    torch.testing.assert_close(part.condition.tensors, wanted.tensors, rtol=1e-4, atol=1e-5)
    assert part.caption == "Draw" and plan.content[1:] == ()


@pytest.mark.parametrize("batch_size", [16, 2])
def test_a_batch_answers_as_each_prompt_alone(pipe: AnyGenPipeline, batch_size: int) -> None:
    batched = pipe(PROMPTS, seed=3, max_new_tokens=20, batch_size=batch_size)
    alone = [pipe(prompt, seed=3, max_new_tokens=20) for prompt in PROMPTS]
    for ours, theirs in zip(batched, alone, strict=True):
        same(ours, theirs)
    assert len({len(reply.content) for reply in alone}) > 2  # unequal numbers of runs
    # words are not in need of an exception: each of a batch's forms is told apart
    assert [reply.text for reply in pipe([["Hello"], ["What is this?"]], max_new_tokens=5)] == [
        pipe(prompt, max_new_tokens=5).text for prompt in ("Hello", "What is this?")
    ]


def test_media_of_a_batch_are_made_together(pipe: AnyGenPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, sizes = pipe.generator("image"), []
    generate = type(generator).generate

    def counting(self: Any, condition: Any, **options: Any) -> Any:
        sizes.append(len(condition))
        return generate(self, condition, **options)

    monkeypatch.setattr(type(generator), "generate", counting)
    plans = pipe.plan(["Draw", "Draw three", "Draw and play"], seed=1, max_new_tokens=9)
    count = sum(kinds(plan).count("image") for plan in plans)
    pipe.render(plans)
    assert sizes == [count] and count >= 5
    sizes.clear()
    pipe.render(plans, batch_size=2)
    assert sizes == [2] * (count // 2) + [1] * (count % 2)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_ends_in_what_a_call_returns(pipe: AnyGenPipeline, prompt: str) -> None:
    from anygen.streaming import Finished, MediaDone, MediaStarted, MediaStep, TextDelta

    called = pipe(prompt, seed=9, steps=3, max_new_tokens=20)
    events = list(pipe.stream(prompt, seed=9, steps=3, max_new_tokens=20))
    assert isinstance(finished := events[-1], Finished)
    same(finished.reply, called)
    assert finished.reply.options == called.options
    parts: list[Any] = []
    begun, steps = ("", -1, ""), 0
    for event in events[:-1]:
        match event:
            case TextDelta(text=text):
                parts.append(text)
            case MediaStarted(modality=modality, index=index, caption=caption):
                begun, steps = (modality, index, caption), 0
            case MediaStep(index=index, done=done, total=total):
                steps += 1
                assert (index, done, total) == (begun[1], steps, 3)
            case MediaDone(index=index, part=part):
                assert steps == 3 and begun == (part.modality, index, part.caption)
                parts.append(part)
    together: list[Any] = []
    for part in parts:
        if isinstance(part, str) and together and isinstance(together[-1], str):
            together[-1] += part
        else:
            together.append(part)
    assert together == [part.text if isinstance(part, TextPart) else part for part in finished.reply.content]


def test_a_medium_is_begun_before_the_rest_is_said(pipe: AnyGenPipeline) -> None:
    from anygen.streaming import MediaDone, TextDelta

    events = list(pipe.stream("Draw", seed=9, max_new_tokens=12))
    first = next(n for n, event in enumerate(events) if isinstance(event, MediaDone))
    assert any(isinstance(event, TextDelta) for event in events[first:])


def test_a_consumer_that_leaves_stops_the_generator(pipe: AnyGenPipeline) -> None:
    import threading

    from anygen.streaming import MediaStep

    events = pipe.stream("Draw", seed=9, steps=500)
    assert any(isinstance(event, MediaStep) for event in events)
    cast(Any, events).close()
    assert not any(thread.name == "anygen-generator" for thread in threading.enumerate())


def test_medium_k_is_made_with_seed_plus_k(pipe: AnyGenPipeline) -> None:
    made = pipe("Draw three", seed=40, max_new_tokens=9)
    assert [part.seed for part in made.content if isinstance(part, MadePart)][:3] == [40, 41, 42]
    plan = pipe.plan("Draw three", max_new_tokens=9)
    parts = [part for part in plan.content if isinstance(part, PlannedPart)]
    second = pipe.generator("image").generate(parts[1].condition, seeds=[41], on_step=lambda *_: None)[0]
    np.testing.assert_allclose(made.images[1].array.astype(int), second.array.astype(int), atol=1)


def test_a_seed_repeats_and_another_differs(pipe: AnyGenPipeline) -> None:
    first, again, other = (pipe("Draw", seed=seed, max_new_tokens=3) for seed in (1, 1, 2))
    assert first == again and first.images != other.images
    drawn = pipe("Draw", max_new_tokens=3)
    assert pipe("Draw", max_new_tokens=3).seed != drawn.seed
    assert pipe("Draw", seed=drawn.seed, max_new_tokens=3) == drawn
    plan = pipe.plan("Draw", seed=1, max_new_tokens=3)
    assert pipe.render(plan, seed=2).images == other.images
    for batch_size in (1, 16):
        both = pipe(["Draw", "Draw"], seed=[1, 2], max_new_tokens=3, batch_size=batch_size)
        same(both[0], first)
        same(both[1], other)


def test_words_may_be_drawn_by_seed(pipe: AnyGenPipeline) -> None:
    options: Any = {"temperature": 1.5, "max_new_tokens": 20}
    texts = {pipe("Hello", seed=seed, **options).text for seed in (1, 1, 2)}
    assert len(texts) == 2
    assert pipe("Hello", seed=1, **options).text in texts


def test_options_reach_the_generator(pipe: AnyGenPipeline) -> None:
    plan = pipe.plan("Draw", seed=1, max_new_tokens=3)
    plain, more, weak = pipe.render(plan), pipe.render(plan, steps=5), pipe.render(plan, guidance_scale=1.0)
    assert len({plain, more, weak}) == 3
    assert (plain.options, more.options, weak.options) == ({}, {"steps": 5}, {"guidance_scale": 1.0})
    condition = cast(PlannedPart, plan.content[0]).condition
    wanted = pipe.generator("image").generate(condition, seeds=[1], steps=5, guidance_scale=None)
    assert more.images == wanted


def test_a_picture_changes_the_answer(pipe: AnyGenPipeline) -> None:
    asked = [
        pipe(["What is this?", picture], max_new_tokens=12) for picture in (PICTURE, Image(PICTURE.pil.rotate(90)))
    ]
    assert asked[0].content != asked[1].content and "encoders" in asked[0].timings
    assert asked[0].prompt == "What is this?"
    batched = pipe([["What is this?", PICTURE], ["Hello"]], seed=asked[0].seed, max_new_tokens=12)
    same(batched[0], asked[0])


def test_generators_are_loaded_when_needed_and_once(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anygen.generators.stable_diffusion import StableDiffusionGenerator

    loads = []
    load = StableDiffusionGenerator.from_pretrained.__func__  # type: ignore[attr-defined]

    def counting(cls: Any, *args: Any, **options: Any) -> Any:
        loads.append(options["device"])
        return load(cls, *args, **options)

    monkeypatch.setattr(StableDiffusionGenerator, "from_pretrained", classmethod(counting))
    pipe = AnyGenPipeline.from_pretrained(tiny_directory, device="cpu")
    pipe("Hello", max_new_tokens=3)
    assert loads == []
    for _ in range(2):
        pipe("Draw", max_new_tokens=3)
        list(pipe.stream("Draw", max_new_tokens=3))
    assert loads == [torch.device("cpu")]


def test_some_generators_may_be_left_out(tiny_directory: Path, pipe: AnyGenPipeline) -> None:
    pictures = AnyGenPipeline.from_pretrained(tiny_directory, device="cpu", generators=["image"])
    made = pictures(["Draw and play", "Play"], max_new_tokens=12)
    assert "audio" not in kinds(made[0]) + kinds(made[1]) and "image" in kinds(made[0])
    with pytest.raises(ModalityError, match="there is no generator for audio in this pipeline; it has: image"):
        pictures.render(pipe.plan("Play", max_new_tokens=3))
    with pytest.raises(ModalityError, match="the model has no generator for video; it has: image, audio"):
        AnyGenPipeline.from_pretrained(tiny_directory, device="cpu", generators=["video"])


def test_a_pipeline_without_generators_plans(tiny_directory: Path, pipe: AnyGenPipeline) -> None:
    planner = AnyGenPipeline.from_pretrained(tiny_directory, device="cpu", generators=False)
    plan = planner.plan("Draw and play", seed=1, max_new_tokens=5)
    assert pipe.render(plan) == pipe("Draw and play", seed=1, max_new_tokens=5)
    with pytest.raises(ModalityError, match="there is no generator for image in this pipeline; it has: none"):
        planner("Draw", max_new_tokens=3)


def test_a_round_trip_through_disk_answers_the_same(pipe: AnyGenPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "copy")
    verify(tmp_path / "copy")
    again = AnyGenPipeline.from_pretrained(tmp_path / "copy", device="cpu")
    options: Any = {"seed": 2, "max_new_tokens": 12}
    assert again(PROMPTS, **options) == pipe(PROMPTS, **options)
    assert again(["Hello", PICTURE], **options) == pipe(["Hello", PICTURE], **options)
    assert (tmp_path / "copy" / "README.md").read_text().startswith("---\nlicense: apache-2.0")
    assert not list(tmp_path.glob(".*"))


def test_a_model_is_not_written_over_anything(pipe: AnyGenPipeline, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty; choose another directory, or pass overwrite=True"):
        pipe.save_pretrained(tmp_path)
    with pytest.raises(OutputError, match="is not empty and holds no model, so it is not replaced"):
        pipe.save_pretrained(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(OutputError, match="notes.txt cannot be a directory, a file is in the way"):
        pipe.save_pretrained(tmp_path / "notes.txt")


def test_a_model_replaces_a_model_even_itself(tiny_directory: Path, pipe: AnyGenPipeline, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_directory, tmp_path / "model")
    own = AnyGenPipeline.from_pretrained(tmp_path / "model", device="cpu")
    own.save_pretrained(tmp_path / "model", overwrite=True)
    again = AnyGenPipeline.from_pretrained(tmp_path / "model", device="cpu")
    assert again("Draw", seed=1, max_new_tokens=3) == pipe("Draw", seed=1, max_new_tokens=3)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_that_fails_leaves_nothing_behind(
    pipe: AnyGenPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, told in (
        (OSError(28, "No space left on device"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def full(_: Path, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("anygen.saving.write_manifest", full)
        with pytest.raises(told):
            pipe.save_pretrained(tmp_path / "copy")
        assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from anygen.saving import replacing

    (tmp_path / "model").mkdir()
    (tmp_path / "model/anygen.json").write_text("old")
    rename = os.rename

    def fail_into_place(source: Any, target: Any) -> None:
        if Path(target).name == "model" and (Path(source) / "anygen.json").read_text() == "new":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_into_place)
    with pytest.raises(OutputError, match="model cannot be written: Input/output error"):
        with replacing(tmp_path / "model", overwrite=True) as temporary:
            (temporary / "anygen.json").write_text("new")
    assert (tmp_path / "model/anygen.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_generator_that_runs_out_of_memory_says_what_helps(
    pipe: AnyGenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(type(pipe.generator("image")), "sampling", fail)
        for use in (lambda: pipe("Draw", max_new_tokens=3), lambda: list(pipe.stream("Draw", max_new_tokens=3))):
            with pytest.raises(OutOfMemoryError, match=r"not enough memory \(.*\); lower batch_size, pass dtype="):
                use()


def test_ctrl_c_in_a_step_comes_through(pipe: AnyGenPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(pipe.generator("image")), "sampling", interrupt)
    for use in (lambda: pipe("Draw", max_new_tokens=3), lambda: list(pipe.stream("Draw", max_new_tokens=3))):
        with pytest.raises(KeyboardInterrupt):
            use()


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", MessageError, "the prompt is empty"),
        ("  \n", MessageError, "the prompt is empty"),
        ([], MessageError, "the prompt is an empty list"),
        (["Draw", ""], MessageError, "the prompt is empty"),
        ([{"type": "hologram", "hologram": 1}], MessageError, "is of the unknown type 'hologram'"),
        ([{"role": "assistant", "content": "Hi"}], MessageError, "ends with the user's"),
        (["What is this?", Path("nowhere.png")], MediaError, r"there is no file nowhere\.png"),
        (
            ["Listen", Audio(np.zeros((1, 4), np.float32), 4)],
            ModalityError,
            "the model cannot read audio; it reads text",
        ),
        ("apple " * 300, MessageError, r"the conversation has \d+ tokens, and the LLM reads at most 256"),
    ],
)
def test_bad_prompts_are_told(pipe: AnyGenPipeline, prompt: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipe(prompt)
    with pytest.raises(error, match=message):
        pipe.plan(prompt)


def test_a_stream_checks_its_prompt_before_it_is_asked_for_events(pipe: AnyGenPipeline) -> None:
    with pytest.raises(MessageError, match="the prompt is empty"):
        pipe.stream("")
    with pytest.raises(ModalityError, match="the model cannot read audio"):
        pipe.stream(["Listen", Audio(np.zeros((1, 4), np.float32), 4)])
    with pytest.raises(ConfigError, match="steps is at least 1"):
        pipe.stream("Draw", steps=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, r"a seed is a whole number from 0 to 2\^63 - 1, got -1"),
        ({"seed": "abc"}, "a seed is a whole number .*, got 'abc'"),
        ({"seed": 1.5}, r"a seed is a whole number .*, got 1\.5"),
        ({"seed": True}, "a seed is a whole number .*, got True"),
        ({"seed": 2**63}, "a seed is a whole number"),
        ({"seed": [1, 2]}, "1 prompts need one seed or 1, got 2"),
        ({"steps": 0}, "steps is at least 1, got 0"),
        ({"seconds": 0.0}, "seconds is a positive number, got 0"),
        ({"seconds": float("nan")}, "seconds is a positive number, got nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is at least 1, got 0"),
        ({"max_media": -1}, "max_media is not negative, got -1"),
        ({"temperature": -1.0}, r"temperature is not negative, got -1\.0"),
        ({"batch_size": 0}, "batch_size is at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_told(pipe: AnyGenPipeline, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipe("Draw", **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"offload": "cpu"}, ConfigError, "one of auto, resident, after_use, model_offload, sequential; got 'cpu'"),
        ({"quantization": "int8"}, ConfigError, "quantization is one of 8bit, 4bit, or left out; got 'int8'"),
        ({"device": "tpu"}, ConfigError, "there is no device 'tpu'; here there are: .*cpu"),
        ({"device": "cuda:99"}, ConfigError, "the device 'cuda:99' is not available; here there are: .*cpu"),
        ({"dtype": "int4"}, ConfigError, "dtype 'int4' is not one of float32, bfloat16, float16"),
        ({"dtype": torch.int8}, ConfigError, "dtype 'torch.int8' is not one of float32, bfloat16, float16"),
    ],
)
def test_what_cannot_be_loaded_is_told(tiny_directory: Path, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        AnyGenPipeline.from_pretrained(tiny_directory, **options)


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        HubError, match=r"there is no model 'anygen-mni' \(did you mean 'anygen-mini'\?\); known: anygen-mini"
    ):
        AnyGenPipeline.from_pretrained("anygen-mni")
    with pytest.raises(HubError, match="the model directory .*nowhere does not exist"):
        AnyGenPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is not an anygen model: it has no anygen.json"):
        AnyGenPipeline.from_pretrained(tmp_path)


def test_a_damaged_model_names_the_file(tiny_directory: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_directory, model)
    unet = next((model / "generators/image/unet").glob("*.safetensors"))
    data = bytearray(unet.read_bytes())
    data[-1] ^= 1
    unet.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"generators/image/unet/.*\.safetensors has another content than"):
        AnyGenPipeline.from_pretrained(model)
    unet.unlink()
    (model / "projectors.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"unet/.*\.safetensors is missing; projectors\.safetensors is missing"):
        AnyGenPipeline.from_pretrained(model)


def test_a_missing_generator_is_told_before_anything_is_answered(tiny_directory: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_directory, tmp_path / "model")
    shutil.rmtree(tmp_path / "model/generators")
    (tmp_path / "model/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="there is no directory .*generators/image; load without it"):
        AnyGenPipeline.from_pretrained(tmp_path / "model")
    assert AnyGenPipeline.from_pretrained(tmp_path / "model", device="cpu", generators=False)("Hello").text


def test_a_plan_for_another_generator_is_refused(pipe: AnyGenPipeline) -> None:
    plan = pipe.plan("Draw", max_new_tokens=3)
    part = cast(PlannedPart, plan.content[0])
    wrong = replace(plan, content=(PlannedPart("audio", part.condition, part.caption),))
    with pytest.raises(ConfigError, match=r"a condition of .*pitch.* is wanted, got .*prompt_embeds"):
        pipe.render(wrong)


def test_limits_and_addresses_are_the_pipelines_to_set(pipe: AnyGenPipeline) -> None:
    pipe.limits = MediaLimits(max_pixels=100)
    with pytest.raises(MediaError, match="at most 100 are decoded"):
        pipe([{"type": "image", "image": PICTURE._repr_png_()}])
    with pytest.raises(MediaError, match="is a URL, and fetching is off"):
        pipe([{"type": "image", "url": "http://127.0.0.1:9/x.png"}])
    pipe.allow_urls = True
    with pytest.raises(MediaError, match="cannot be fetched"):
        pipe([{"type": "image", "url": "http://127.0.0.1:9/x.png"}])


def test_a_pipeline_put_together_in_code_works(pipe: AnyGenPipeline) -> None:
    own: dict[str, Generator] = {"image": pipe.generator("image")}
    assert AnyGenPipeline(pipe.model, own)("Draw", seed=1, max_new_tokens=3) == pipe("Draw", seed=1, max_new_tokens=3)


def test_bfloat16_draws_nearly_the_same(tiny_directory: Path, pipe: AnyGenPipeline) -> None:
    half = AnyGenPipeline.from_pretrained(tiny_directory, device="cpu", dtype="bf16")
    ours, theirs = (p("Draw", seed=1, max_new_tokens=3).images[0].array.astype(float) for p in (half, pipe))
    assert half.generator("image").unet.dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert np.abs(ours - theirs).mean() < 8
