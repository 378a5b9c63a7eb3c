"""Stages on a user's model and data: what moves, what they learn, what is in memory, what bad input gets."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anygen.component import read_safetensors
from anygen.errors import ConfigError, OutOfMemoryError
from anygen.messages import MediaPart, Message, TextPart
from anygen.model import AnyGenModel
from anygen.training import decoder_alignment, encoder_alignment, instruction_tuning, precompute
from anygen.training.chat_rows import Shown, conversation
from anygen.training.data_rows import read
from anygen.training.decoder_alignment import DecoderAlignmentRecipe
from anygen.training.encoder_alignment import EncoderAlignmentRecipe
from anygen.training.instruction_tuning import InstructionTuningRecipe
from anygen.training.kept_states import KeptStates, constant_states
from anygen.training.stage import llm_dtype, make_ready
from anygen.training.stage_data import Collator, Item, Mixed, arguments, learn
from anygen.training.stage_trainer import StageTrainer
from anygen.training.trainable import PeftSettings

QUICK: dict[str, Any] = dict(steps=12, batch_size=4, report_to=(), learning_rate=1e-2, held_out=0.2)


def quick(changes: dict[str, Any]) -> dict[str, Any]:
    return QUICK | changes


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Everything that a model's directory holds, by file and name."""
    found = {}
    for path in sorted(directory.rglob("*.safetensors")):
        stem = path.name.removesuffix(".safetensors").split("-0000")[0]
        place = path.parent.relative_to(directory).as_posix()
        found |= {f"{place}/{stem}:{name}": value for name, value in read_safetensors(path.parent, stem).items()}
    return found


def moved(before: Path, after: Path) -> set[str]:
    """The names of the weights that differ, without those that only one has."""
    old, new = weights(before), weights(after)
    return {name for name in old.keys() & new.keys() if not torch.equal(old[name], new[name])}


def report(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]


def test_encoder_alignment_moves_the_projector_alone_and_learns(
    user_model: Path, user_data: Path, tmp_path: Path
) -> None:
    recipe = EncoderAlignmentRecipe(
        model=str(user_model), data={"image": str(user_data / "pairs.jsonl")}, **quick({"steps": 40})
    )
    figures = encoder_alignment.train(recipe, tmp_path)
    assert figures["held_out"] < 0.9 * figures["held_out_before"] and figures["steps"] == 40
    changed = moved(user_model, tmp_path / "model")
    assert changed and all(":input.image." in name for name in changed)
    assert weights(user_model).keys() == weights(tmp_path / "model").keys()


def test_decoder_alignment_learns_the_conditions_and_leaves_words_alone(
    user_model: Path, user_data: Path, tmp_path: Path
) -> None:
    captions: dict[str, Any] = {"video": str(user_data / "captions.txt"), "audio": str(user_data / "captions.txt")}
    recipe = DecoderAlignmentRecipe(model=str(user_model), captions=captions, **quick({"steps": 40}))
    figures = decoder_alignment.train(recipe, tmp_path)
    assert figures["held_out"] < 0.8 * figures["held_out_before"]
    assert all(":output." in name for name in moved(user_model, tmp_path / "model"))
    losses = [row for row in report(tmp_path) if "alignment_loss" in row]
    assert losses and not any("lm_loss" in row for row in losses)


def test_training_needs_neither_encoders_nor_generators_once_they_are_cached(
    user_model: Path, user_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = InstructionTuningRecipe(
        model=str(user_model),
        data=str(user_data / "chats.jsonl"),
        cache=str(tmp_path / "cache"),
        peft=PeftSettings(kind="lora", rank=2),
        **QUICK,
    )
    first = instruction_tuning.train(recipe, tmp_path / "a")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(precompute, "load_encoder", refuse)
    monkeypatch.setattr(precompute, "load_generator", refuse)
    monkeypatch.setattr("anygen.model.load_encoder", refuse)
    assert instruction_tuning.train(recipe, tmp_path / "b") == first, "and the same recipe gives the same numbers"


def test_a_loss_from_caches_is_the_loss_of_the_model_with_its_parts(user_model: Path, user_data: Path) -> None:
    """The reference is the model's own forward pass on media that its own encoder and generator read."""
    from anygen.loading import load_generator

    recipe = InstructionTuningRecipe(
        model=str(user_model),
        data=str(user_data / "chats.jsonl"),
        cache=str(user_data / "cache"),
        peft=PeftSettings(kind="lora", rank=2),
        held_out=0,
    )
    ready = make_ready(recipe, user_data, lambda config: instruction_tuning.prepare(recipe, config), ["llm"])
    items = [{"learned": ready.make(one.talk(None))} for one in ready.train[:3]]  # type: ignore[arg-type]
    with torch.no_grad():
        ours = ready.model.eval()(**arguments(Collator(ready.features, ready.conditions)(items)))
    model = AnyGenModel.from_pretrained(user_model)
    model.metrics, sound = ready.model.metrics, load_generator(
        user_model, model.settings.outputs["audio"], torch.device("cpu"), torch.float32
    )  # fmt: skip
    losses = []
    for messages in read(str(user_data / "chats.jsonl"), conversation)[:3]:
        one = learn(model.prompts, messages, own_words=False)
        read_media = [MediaPart(p.modality, p.media.load(p.modality)) for p in one.read]  # type: ignore[attr-defined]
        said = [p.media.caption for p in one.made]  # type: ignore[attr-defined]
        with torch.no_grad():
            output = model(
                torch.tensor([one.ids]),
                labels=torch.tensor([one.labels]),
                media=model.encode_parts(read_media),
                conditions={"audio": sound.encode_text(said).tensors} if said else None,
            )
        losses.append((output, sum(label >= 0 for label in one.labels), len(said)))
    words = sum(float(o.lm_loss) * n for o, n, _ in losses) / sum(n for _, n, _ in losses)
    aligned = [float(o.alignment_loss) for o, _, said in losses if said]
    assert float(ours.lm_loss) == pytest.approx(words, rel=1e-3)
    assert float(ours.alignment_loss) == pytest.approx(sum(aligned) / len(aligned), rel=1e-2)


def test_kept_states_give_the_loss_and_the_gradient_of_the_model_and_are_read_once(
    user_model: Path, user_data: Path, tmp_path: Path
) -> None:
    captions: dict[str, Any] = {"video": str(user_data / "captions.txt"), "audio": str(user_data / "captions.txt")}
    recipe = DecoderAlignmentRecipe(model=str(user_model), captions=captions, cache=str(user_data / "cache"))
    trains = decoder_alignment.trains(recipe)
    ready = make_ready(recipe, tmp_path, lambda config: decoder_alignment.prepare(recipe, config), trains)
    model, rng = ready.model, random.Random(0)
    items = [{"learned": ready.make(one.talk(rng))} for one in ready.train]
    batch = Collator({}, ready.conditions, words=False)(items)
    assert constant_states(model)
    theirs = model(**arguments(batch))
    assert theirs.loss is not None
    theirs.loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    contexts = [item["learned"].ids for item in items]
    for limit in (2**30, 2 * 4 * 32 * 4):
        states = KeptStates(model)
        states.fill(contexts * 2 + contexts[:1], batch_size=5, limit=limit)
        read = states.read
        for _ in range(2):
            model.zero_grad()
            ours = states.output(batch)
            torch.testing.assert_close(ours.loss, theirs.loss)
            assert ours.loss is not None
            ours.loss.backward()
            for name, gradient in wanted.items():
                torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)
        assert (read, states.read - read) == ((len(items), 0) if limit == 2**30 else (2, 2 * (len(items) - 2)))
    model.signal_tokens.requires_grad_(True)
    assert not constant_states(model)


def test_every_answer_of_a_conversation_is_learned_as_it_would_be_generated(
    tiny_model: Callable[..., AnyGenModel],
) -> None:
    prompts = tiny_model().prompts
    picture = MediaPart("image", Shown("a red apple"))  # type: ignore[arg-type]
    talk = [
        Message("user", (TextPart("Draw it."),)),
        Message("assistant", (TextPart("Here."), picture)),
        Message("user", (TextPart("What is this?"), MediaPart("image", Shown(key="k")))),  # type: ignore[arg-type]
        Message("assistant", (TextPart("An apple."),)),
        Message("user", (TextPart("Thanks."),)),
        Message("assistant", (TextPart("Hello."),)),
    ]
    learned = learn(prompts, talk, own_words=False)
    wanted = [label for end in (2, 4) for label in prompts.example(talk[:end]).labels if label >= 0]
    route = prompts.signal_tokens.words_id
    assert [label for label in learned.labels if label >= 0] == [*wanted, route], "of the last answer the route alone"
    assert all(label in (token, -100) for token, label in zip(learned.ids, learned.labels, strict=True))
    assert learned.made == [picture] and len(learned.read) == 1
    last = learn(prompts, talk, own_words=False, all_turns=False)
    assert [label for label in last.labels if label >= 0] == [route]
    assert last.labels.index(route) == prompts.example(talk).labels.index(route)


def items(count: int, name: str) -> list[Item]:
    return [Item(lambda rng, n=n: [n, rng.random()], name, n, length=n) for n in range(count)]  # type: ignore[misc]


def test_text_is_mixed_in_by_its_share_and_every_item_comes_once_a_pass() -> None:
    def order(seed: int, window: int = 1) -> Mixed:
        return Mixed(
            items(30, "media"),
            lambda messages: messages,  # type: ignore[arg-type,return-value]
            count=1000,
            batch_size=4,
            seed=seed,
            text=items(7, "text"),
            share=0.25,
            window=window,
            lengths=lambda item: item.length,
        )

    mixed = order(0)
    places = [(item.source, item.place) for item, _ in mixed.order]
    assert sum(source == "text" for source, _ in places) / 1000 == pytest.approx(0.25, abs=0.04)
    media = [place for source, place in places if source == "media"]
    assert all(sorted(media[n : n + 30]) == list(range(30)) for n in range(0, 600, 30))
    assert [mixed[n] for n in range(9)] == [order(0)[n] for n in range(9)] != [order(1)[n] for n in range(9)]
    bucketed = order(0, window=16).order
    spread = [
        max(item.length for item, _ in part) - min(item.length for item, _ in part)
        for part in (bucketed[n : n + 4] for n in range(0, 1000, 4))
    ]
    assert sum(spread) / len(spread) < 4 and {d for _, d in bucketed} == set(range(1000))


def test_media_that_cannot_be_read_are_bad_rows(user_model: Path, user_data: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    good = user_data / "0.png"
    rows = [{"image": str(good), "caption": "red"}] * 3 + [{"image": "broken.png", "caption": "blue"}]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = EncoderAlignmentRecipe(model=str(user_model), data={"image": str(tmp_path / "r.jsonl")}, **QUICK)
    with pytest.raises(ConfigError, match=r"1 of 4 rows do not fit \(line 4\): .*broken.png"):
        encoder_alignment.train(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()
    figures = encoder_alignment.train(replace(recipe, bad_rows=0.3, steps=1), tmp_path / "out")
    assert figures["steps"] == 1


def test_conversations_that_are_too_long_are_bad_rows(user_model: Path, user_data: Path, tmp_path: Path) -> None:
    data = str(user_data / "chats.jsonl")
    recipe = InstructionTuningRecipe(
        model=str(user_model), data=data, max_tokens=60, trains=("signal_tokens",), **QUICK
    )
    with pytest.raises(ConfigError, match=r"6 of 12 rows do not fit \(lines 1, 3, 5, .* tokens; max_tokens is 60"):
        instruction_tuning.train(recipe, tmp_path)


def test_a_loss_that_is_no_number_names_the_rows(user_model: Path, user_data: Path, tmp_path: Path) -> None:
    recipe = EncoderAlignmentRecipe(
        model=str(user_model),
        data={"image": str(user_data / "pairs.jsonl")},
        **quick({"learning_rate": 1e30, "warmup": 0.0, "max_grad_norm": 1e30, "save_every": 1}),
    )
    with pytest.raises(ConfigError) as caught:
        encoder_alignment.train(recipe, tmp_path)
    told = str(caught.value)
    assert "the loss is no number at step" in told and "pairs.jsonl, line" in told
    assert "lower the learning rate" in told and told.endswith("checkpoint-1 is good")


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
    ],
)
def test_too_little_memory_says_what_to_lower(
    fault: Exception, user_model: Path, user_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any, **__: Any) -> torch.Tensor:
        raise fault

    monkeypatch.setattr(StageTrainer, "training_step", step)
    recipe = EncoderAlignmentRecipe(model=str(user_model), data={"image": str(user_data / "pairs.jsonl")}, **QUICK)
    with pytest.raises(
        OutOfMemoryError, match=r"not enough memory \(.*\); lower batch_size \(4\) and raise accumulate"
    ):
        encoder_alignment.train(recipe, tmp_path)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda d: EncoderAlignmentRecipe(data={"video": d}), "data: the model does not read video, only image"),
        (lambda d: DecoderAlignmentRecipe(captions={"image": d}), "the model does not make image, only video, audio"),
        (lambda d: InstructionTuningRecipe(data=d), "trains names llm, which has no adapter; start one"),
        (lambda d: InstructionTuningRecipe(data=d, trains=("llm.layers",)), "trains: llm is its adapter, whole"),
        (
            lambda d: InstructionTuningRecipe(data=d, trains=("signal_tokens",), unfreeze=("generators.*",)),
            "unfreeze: generators stand still",
        ),
        (
            lambda d: InstructionTuningRecipe(data=d, report_to=("tensorbord",)),
            "report_to: .* did you mean 'tensorboard'",
        ),
        (
            lambda d: InstructionTuningRecipe(data=d, trains=("signal_tokens",), diffusion_weight=1.0),
            "diffusion_weight: the answers of the data hold captions alone",
        ),
        (
            lambda d: EncoderAlignmentRecipe(
                data={"image": d.replace("chats", "pairs")}, trains=("output_projectors",), steps=1
            ),
            r"nothing that trains \(output_projectors.audio, .*\) takes part in the batch of .*pairs.jsonl, line",
        ),
        (
            lambda d: EncoderAlignmentRecipe(data={"image": d.replace("chats", "pairs")}, max_tokens=5),
            "12 of 12 rows do not fit .* tokens; max_tokens is 5",
        ),
        (
            lambda d: InstructionTuningRecipe(data=d, text_data=d, text_share=0.5),
            "it holds media, which text_data must",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_told(
    make: Callable[[str], Any], told: str, user_model: Path, user_data: Path, tmp_path: Path
) -> None:
    recipe = replace(make(str(user_data / "chats.jsonl")), model=str(user_model), cache=str(user_data / "cache"))
    with pytest.raises(ConfigError, match=told):
        {
            EncoderAlignmentRecipe: encoder_alignment,
            DecoderAlignmentRecipe: decoder_alignment,
            InstructionTuningRecipe: instruction_tuning,
        }[type(recipe)].train(recipe, tmp_path)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"held_out": 1.0}, "held_out and bad_rows are shares"),
        ({"batch_size": 0}, "batch_size, accumulate and max_tokens are at least 1"),
        ({"alignment_weight": -1.0}, "weights of losses are not negative"),
        ({"text_share": 0.5}, "text_data and text_share go together"),
        ({"text_data": "t.jsonl", "text_share": 1.0}, "text_share is a share"),
        ({"peft": {"kind": "lorra"}}, "peft.kind: unknown kind 'lorra', did you mean 'lora'"),
        ({"data": {"pth": "x"}}, "unknown key 'data.pth'; key 'data.path' is missing$"),
        ({"learning_rate": -1.0}, "learning_rate is 0 or more, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate is 0 or more, got nan"),
        ({"learning_rates": {"llm": -1.0}}, "learning_rates.llm is 0 or more"),
        ({"weight_decay": -3}, "weight_decay is 0 or more"),
        ({"warmup": 5}, "warmup is a share of the steps, from 0 to 1, got 5"),
        ({"epochs": -1}, "epochs is greater than 0, got -1"),
        ({"max_grad_norm": -1}, "max_grad_norm is greater than 0"),
        ({"image_size": -8}, "image_size is greater than 0"),
        ({"retention_every": 0}, "retention_every is greater than 0, got 0; null turns it off"),
        ({"sample_every": 0}, "sample_every is greater than 0, got 0$"),
        ({"workers": -1}, "workers is 0 or more, got -1"),
        ({"trains": "llm"}, "'trains': should be a list, got 'llm'"),
        ({"data": None}, "^InstructionTuningRecipe: 'data': should be a text or a table of .* or a list, got None$"),
    ],
)
def test_values_that_cannot_be_are_told_before_anything_is_loaded(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        InstructionTuningRecipe.from_dict({"data": "d.jsonl"} | values)
    for wrong, why in (({"data": {}}, "data names no modality"), ({"answer": "x"}, "answer must say the caption")):
        with pytest.raises(ConfigError, match=why):
            EncoderAlignmentRecipe.from_dict({"data": {"image": "d"}} | wrong)
    with pytest.raises(ConfigError, match="alignment_weight and diffusion_weight are both 0"):
        DecoderAlignmentRecipe.from_dict({"captions": {"image": "c"}, "alignment_weight": 0})
    with pytest.raises(ConfigError, match="requests must say the caption"):
        DecoderAlignmentRecipe.from_dict({"captions": {"image": "c"}, "requests": {"image": ["Go."]}})


@pytest.mark.parametrize(
    ("changes", "on_gpu"),
    [
        ({}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
        ({"bf16": False}, torch.float32),
        ({"unfreeze": ("llm.*.layers.0.*",)}, torch.float32),  # what trains itself keeps its digits
        ({"unfreeze": ("encoders.image.*",)}, torch.bfloat16),
    ],
)
def test_an_llm_is_held_in_bfloat16_on_a_gpu_unless_digits_count(changes: dict[str, Any], on_gpu: torch.dtype) -> None:
    recipe = DecoderAlignmentRecipe(captions={"image": "captions.txt"}, **changes)
    assert llm_dtype(recipe, torch.device("cuda")) == on_gpu
    assert llm_dtype(recipe, torch.device("cpu")) == torch.float32
