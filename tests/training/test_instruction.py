import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from anygen.encoders.imagebind import ImageBindEncoder, ImageBindModel
from anygen.encoders.imagebind_config import ImageBindConfig, TextConfig, VisionConfig
from anygen.errors import CheckpointError, ConfigError
from anygen.generators.stable_diffusion import EMBEDS, StableDiffusionGenerator
from anygen.manifest import verify
from anygen.messages import MediaPart
from anygen.model import AnyGenModel
from anygen.prompts import pad
from anygen.training import alignment, instruction
from anygen.training.assemble import assemble
from anygen.training.captions import Drawing
from anygen.training.icons import IconSet
from anygen.training.magpie import self_answers
from anygen.training.packing import PackedBatches, PackedDecoder, block_mask
from anygen.training.pictures import PictureSource
from anygen.training.requests import Conversations, Seen
from anygen.training.tokenizer import train_tokenizer
from anygen.training.wishes import ImageWishes

if TYPE_CHECKING:
    from anygen.llm import LLM

Parts = dict[str, Any]  # directories, by the names of the recipe's fields


@pytest.fixture(scope="module")
def parts(
    icons_dir: Path,
    trained_generator: tuple[Path, dict[str, float]],
    tiny_llm: "Callable[..., LLM]",
    tmp_path_factory: pytest.TempPathFactory,
) -> Parts:
    """Directories of all that the recipe needs, at tiny size."""
    out = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    config = ImageBindConfig(
        out_dim=16,
        vision=VisionConfig(width=16, blocks=1, heads=2, image_size=32, patch=16),
        text=TextConfig(width=16, blocks=1, heads=2, vocab_size=300, context_length=16),
    )
    ImageBindModel(config).save_pretrained(out / "imagebind")
    words = [concept.label for concept in IconSet.load(icons_dir).concepts]
    tokenizer = train_tokenizer(words, vocab_size=300, context=16).backend_tokenizer
    tokenizer.save(str(out / "imagebind" / "tokenizer.json"))
    tiny_llm(max_position_embeddings=2048).save_base(out / "llm")
    return {
        "icons": str(icons_dir),
        "encoder": str(out / "imagebind"),
        "generators": {"image": str(trained_generator[0] / "generator")},
        "llm": str(out / "llm"),
    }


def recipe(parts: Parts, **changes: Any) -> instruction.InstructionRecipe:
    settings: dict[str, Any] = dict(
        pool=8,
        answers=4,
        projector_width=32,
        projector_layers=1,
        lora_rank=2,
        rows=2,
        row_tokens=256,
        chunk=2,
        steps=3,
        name_steps=2,
        bf16=False,
    )
    return instruction.InstructionRecipe(**(parts | settings | changes))


@pytest.fixture(scope="module")
def run(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three steps of the recipe."""
    out = tmp_path_factory.mktemp("instruction-run")
    instruction.train(recipe(parts), out)
    return out


def load(run: Path, parts: Parts) -> AnyGenModel:
    return AnyGenModel.from_pretrained(
        run / "model", dtype=torch.float32, encoders=False, resolve=lambda _: Path(parts["llm"])
    )


def test_the_run_writes_a_model_that_loads_strictly_and_moved(run: Path, parts: Parts) -> None:
    model = load(run, parts)
    adapter = load_file(run / "model" / "adapter" / "adapter_model.safetensors")
    assert any(value.abs().sum() > 0 for key, value in adapter.items() if "lora_B" in key)
    assert model.settings.name == "anygen-mini" and model.settings.slots == {"image": 4}


def test_a_run_can_go_on_from_another(run: Path, parts: Parts, tmp_path: Path) -> None:
    before = load_file(run / "model" / "projectors.safetensors")
    instruction.train(recipe(parts, start=str(run / "model"), steps=1, seed=1), tmp_path)
    after = load_file(tmp_path / "model" / "projectors.safetensors")
    moved = {key: (after[key].float() - before[key].float()).abs().max().item() for key in before}
    assert max(moved.values()) > 0 and max(moved.values()) < 0.1


def test_a_projector_made_anew_takes_nothing_from_the_start(run: Path, parts: Parts, tmp_path: Path) -> None:
    changes = dict(start=str(run / "model"), renew=("input_projectors",), trains=("input_projectors",), input_width=24)
    instruction.train(recipe(parts, **changes, steps=1, mixture={"ask": 1.0}), tmp_path)
    before, after = (load_file(folder / "model" / "projectors.safetensors") for folder in (run, tmp_path))
    changed = {key for key in after if key not in before or before[key].shape != after[key].shape}
    assert changed == {"input.image.proj.0.bias", "input.image.proj.0.weight", "input.image.proj.2.weight"}
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("output."))
    with pytest.raises(ConfigError, match="only input_projectors and output_projectors can be made anew, not llm"):
        instruction.train(recipe(parts, start=str(run / "model"), renew=("llm",)), tmp_path)


def test_a_new_input_projector_remembers_what_the_text_encoder_makes_of_the_names(
    run: Path, parts: Parts, icons: IconSet
) -> None:
    projector = load(run, parts).input_projectors["image"]
    texts = ImageBindEncoder.from_pretrained(parts["encoder"], modality="text")
    with torch.no_grad():
        wanted = texts(**texts.preprocess([concept.label for concept in icons.concepts])).values[:, 0]
    torch.testing.assert_close(projector.keys, wanted, rtol=0, atol=4e-3)  # kept in bfloat16
    rows = [json.loads(line) for line in (run / "instruction.jsonl").read_text().splitlines()]
    (met,) = (row for row in rows if "nearest" in row)
    assert met["names"] == len(icons.concepts) and met["residual"] > 0


def test_noise_grows_with_the_pools_deviation_and_never_exceeds_its_level() -> None:
    torch.manual_seed(0)
    still, most = torch.zeros(4000, 1, 3), torch.tensor([0.0, 0.1, 1.0])
    moved = instruction.noisy(still, most)
    assert moved[..., 0].abs().max() == 0
    # a level uniform in [0, m] makes the variance m² / 3
    torch.testing.assert_close(moved.square().mean((0, 1)), most.square() / 3, rtol=0.1, atol=0)


def test_only_the_named_parts_train(run: Path, parts: Parts, tmp_path: Path) -> None:
    changes = dict(start=str(run / "model"), trains=("input_projectors",), mixture={"ask": 1.0}, learning_rate=1e-2)
    instruction.train(recipe(parts, **changes), tmp_path)
    files = ("projectors.safetensors", "signal_tokens.safetensors", "adapter/adapter_model.safetensors")
    for name in files:
        before, after = (load_file(folder / "model" / name) for folder in (run, tmp_path))
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert all(key.startswith("input.") for key in moved)
        assert bool(moved) == (name == files[0])
    with pytest.raises(ConfigError, match="unknown parts: encoder; the model has llm, signal_tokens, encoders"):
        instruction.freeze_others(load(run, parts), ("encoder",))


def test_plain_talk_teaches_the_route_alone(run: Path, parts: Parts, icons: IconSet) -> None:
    model = load(run, parts)
    encoder = ImageBindEncoder.from_pretrained(parts["encoder"])
    pool = instruction.encode_pictures(PictureSource(icons, seed=0), encoder, 8)
    examples = instruction.Examples(Conversations([ImageWishes(icons.concepts)], pool.shown, 0), model)
    plain = [examples[n] for n in range(200) if examples.conversations[n].words]
    assert plain
    for example in plain:
        assert [label for label in example["labels"] if label != -100] == [model.signal_tokens.words_id]
        assert example["ids"][-1] == model.signal_tokens.words_id


def test_a_packed_batch_has_the_losses_of_its_conversations_read_one_by_one(
    run: Path, parts: Parts, icons: IconSet
) -> None:
    model = load(run, parts)
    generator = StableDiffusionGenerator.from_pretrained(parts["generators"]["image"])
    pool = instruction.encode_pictures(
        PictureSource(icons, seed=0), ImageBindEncoder.from_pretrained(parts["encoder"]), 8
    )
    examples = instruction.Examples(Conversations([ImageWishes(icons.concepts)], pool.shown, 0), model)
    collator = instruction.Collator({"image": pool.features}, {"image": generator}, 512)
    batches = PackedBatches(examples, collator, batches=1, rows=3, width=512, chunk=1, lanes=1, seed=0)
    rows = batches._chunk(0)
    batch = batches[0]
    runs = len(model.signal_tokens.run_starts(batch["input_ids"], "image"))
    assert runs == len(batch["captions"]["image"]["ids"]) > 3 and max(len(row) for row in rows) > 2
    assert int((batch["input_ids"] == -1).sum()) == 4 * len(batch["media"]["image"])

    def losses(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        ids = batch["input_ids"]
        decoder = PackedDecoder(model.llm, bf16=False, compile=False, graph=True)
        hidden = decoder.run(model.embed(ids, batch["media"]), block_mask(batch["segments"]), batch["position_ids"])
        target = {name: instruction.caption_targets(generator, tokens) for name, tokens in batch["captions"].items()}
        output = model.losses(ids, hidden, batch["labels"], target)
        assert output.lm_loss is not None
        return output.lm_loss, output.alignment_loss

    with torch.no_grad():
        packed, aligned = losses(batch)
        apart = [(example, *losses(collator([[example]]))) for row in rows for example in row]
        learned = [sum(label != -100 for label in example["labels"]) for example, _, _ in apart]
        expected = sum(loss * n for (_, loss, _), n in zip(apart, learned, strict=True)) / sum(learned)
        torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-5)
        drawn = [(loss, len(example["captions"])) for example, _, loss in apart if loss is not None]
        assert aligned is not None
        torch.testing.assert_close(
            aligned, sum(loss * n for loss, n in drawn) / sum(n for _, n in drawn), atol=1e-5, rtol=1e-5
        )
        # and the plain pass of the model agrees with the packed decoder on one conversation
        example = next(example for example, _, loss in apart if loss is not None and not example["media"])
        plain = model(input_ids=torch.tensor([example["ids"]]), labels=torch.tensor([example["labels"]]))
        torch.testing.assert_close(losses(collator([[example]]))[0], plain.lm_loss, atol=1e-5, rtol=1e-5)


def test_talk_before_a_request_is_the_llms_own(tiny_llm: "Callable[..., LLM]", icons: IconSet) -> None:
    llm = tiny_llm(max_position_embeddings=2048)
    questions = ["What is an apple?", "Hello", "Why is the sky blue?"]
    texts = iter(["It is a fruit. It grows", "Hi! How are you?", "no end"])
    made = {"count": 0}

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        made["count"] += 1
        answers = [llm.tokenizer(next(texts), add_special_tokens=False).input_ids for _ in input_ids]
        return torch.cat([input_ids, pad(answers, llm.eos_ids[0])[0]], 1)

    llm.base.generate = generate  # type: ignore[method-assign, assignment]
    answers = self_answers(llm, questions, batch_size=2)
    assert made["count"] == 2
    assert answers == {"What is an apple?": "It is a fruit.", "Hello": "Hi! How are you?"}
    for kind in ("media_after", "talk_after"):
        supply = Conversations(
            [ImageWishes(icons.concepts)],
            [Seen("image", 0, Drawing(label="dog", style="flat"))],
            0,
            {kind: 1.0},
            answers,
        )
        told = [message.text for n in range(40) for message in supply[n].messages if message.role == "assistant"]
        assert set(answers.values()) <= set(told)


def test_the_metric_measures_what_cross_attention_sees(parts: Parts) -> None:
    unet = StableDiffusionGenerator.from_pretrained(parts["generators"]["image"]).unet
    metric = instruction.attention_metric(unet, floor=0.0)
    difference = torch.randn(5, metric.shape[0])
    maps = [m.weight for n, m in unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    seen = sum((difference @ weight.T).square().mean(1) for weight in maps)
    ratio = (difference @ metric).square().sum(1) / seen
    torch.testing.assert_close(ratio, ratio[:1].expand(5), rtol=1e-3, atol=0)


def test_kept_states_are_those_of_the_plain_pass(run: Path, parts: Parts, icons: IconSet) -> None:
    model = load(run, parts)
    items = alignment.contexts(Conversations([ImageWishes(icons.concepts)], [], 0), 41, 0)
    states, captions = alignment.read_states(model, items, batch_size=5)
    examples = [model.prompts.example(item.messages).ids for item in items]
    ids, mask = pad(examples, 0)
    with torch.inference_mode():
        hidden = model(input_ids=ids, attention_mask=mask).hidden_states
        assert hidden is not None
        starts = model.signal_tokens.run_starts(ids, "image")
        plain = hidden[starts[:, :1], starts[:, 1:] + torch.arange(4)]
    assert len(captions) == len(states) == len(plain)
    torch.testing.assert_close(states.float(), plain, atol=4e-3, rtol=2e-3)  # kept in float16


def test_contexts_ask_for_every_name_in_every_style_first(icons: IconSet) -> None:
    items = alignment.contexts(Conversations([ImageWishes(icons.concepts)], [], 0), 36, 0)
    captions = {str(part.media) for item in items for part in item.messages[-1].parts if isinstance(part, MediaPart)}
    assert len(captions) == 36  # six concepts, five styles and none
    assert {"a red circle", "a red circle, in the flat style"} <= captions


def test_alignment_moves_the_output_projector_and_nothing_else(run: Path, parts: Parts, tmp_path: Path) -> None:
    alignment.train(
        alignment.AlignmentRecipe(
            icons=parts["icons"],
            model=str(run / "model"),
            generator=parts["generators"]["image"],
            llm=parts["llm"],
            contexts=12,
            batch_size=8,
            steps=12,
            learning_rate=1e-2,
        ),
        tmp_path,
    )
    before, after = (load_file(folder / "model" / "projectors.safetensors") for folder in (run, tmp_path))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and all(key.startswith("output.") for key in moved)
    rows = [load_file(folder / "model" / "signal_tokens.safetensors")["rows"] for folder in (run, tmp_path)]
    assert torch.equal(*rows)


def test_the_parts_are_assembled_with_a_manifest(run: Path, parts: Parts, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    with pytest.raises(CheckpointError, match="generator is missing: run the recipe that makes it first"):
        (runs / "model").symlink_to(run / "model")
        assemble(runs, tmp_path / "out")
    (runs / "generator").symlink_to(parts["generators"]["image"])
    (runs / "imagebind").symlink_to(parts["encoder"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("the card")
    (out / "stale.safetensors").write_text("old")
    assemble(runs, out)
    verify(out)
    assert (out / "README.md").read_text() == "the card" and not (out / "stale.safetensors").exists()
    model = AnyGenModel.from_pretrained(out, dtype=torch.float32, resolve=lambda _: Path(parts["llm"]))
    generator = StableDiffusionGenerator.from_pretrained(out / "generators" / "image")
    assert {EMBEDS: tuple(generator.condition_spec.shapes[EMBEDS])} == model.settings.outputs["image"].condition


def test_the_closed_form_finds_a_low_rank_map_again_and_beats_what_is_near_it() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(300, 2, 6, generator=generator)
    truth = torch.randn(12, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    noise = 0.1 * torch.randn(300, 20, generator=generator)
    targets = (states.flatten(1) @ truth + noise + 2).view(300, 5, 4)
    metric = torch.eye(4) + 0.2 * torch.randn(4, 4, generator=generator)

    def error(down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor) -> float:
        made = (states.flatten(1) @ down.T @ up.T + bias).view(300, 5, 4)
        return ((made - targets) @ metric).square().mean().item()

    down, up, bias = alignment.fit_low_rank(states, targets, rank=3, ridge=1e-9, metric=metric)
    assert down.shape == (3, 12) and up.shape == (20, 3)
    torch.testing.assert_close((up @ down).T, truth, atol=0.05, rtol=0.1)
    best = error(down, up, bias)
    for part in range(3):
        for _ in range(5):
            changed = [down.clone(), up.clone(), bias.clone()]
            changed[part] += 1e-3 * torch.randn(changed[part].shape, generator=generator)
            assert error(*changed) > best


def test_with_full_rank_the_closed_form_is_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(1)
    states, targets = torch.randn(50, 1, 4, generator=generator), torch.randn(50, 2, 3, generator=generator)
    down, up, bias = alignment.fit_low_rank(states, targets, rank=6, ridge=0.1)
    x, y = (part.flatten(1) - part.flatten(1).mean(0) for part in (states, targets))
    gram = x.T @ x
    weight = torch.linalg.solve(gram + 0.1 * gram.diagonal().mean() * torch.eye(4), x.T @ y)
    torch.testing.assert_close((up @ down).T, weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(bias, targets.flatten(1).mean(0) - states.flatten(1).mean(0) @ weight, atol=1e-5, rtol=0)
