import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from anygen.component import read_safetensors
from anygen.encoders.imagebind import ImageBindEncoder, ImageBindModel
from anygen.encoders.imagebind_config import ImageBindConfig, PlaneConfig, TextConfig, VisionConfig
from anygen.errors import CheckpointError, ConfigError
from anygen.generators.audioldm2 import GENERATED, AudioLDM2Generator
from anygen.generators.clip_unet import is_temporal
from anygen.generators.stable_diffusion import EMBEDS, StableDiffusionGenerator
from anygen.generators.zeroscope import ClipDefaults, ZeroscopeGenerator
from anygen.manifest import verify
from anygen.messages import MediaPart
from anygen.model import AnyGenModel
from anygen.prompts import pad
from anygen.training import alignment, assemble, conditions, instruction, sound_autoencoder, sound_diffusion, vocoder
from anygen.training.captions import Drawing
from anygen.training.conversation_batches import Collator, Examples, packed_losses
from anygen.training.icons import IconSet
from anygen.training.latent_diffusion import build_scheduler
from anygen.training.magpie import self_answers
from anygen.training.media_pools import Pool, make_pools, names_of
from anygen.training.naming import noisy
from anygen.training.packing import PackedBatches, PackedDecoder, block_mask
from anygen.training.requests import Conversations, Seen
from anygen.training.sounds import SoundBank
from anygen.training.tokenizer import train_tokenizer
from anygen.training.video_diffusion import VideoDiffusionRecipe
from anygen.training.video_diffusion import build_unet as build_clip_unet
from anygen.training.wishes import ImageWishes, wishes_of

if TYPE_CHECKING:
    from anygen.llm import LLM

Parts = dict[str, Any]  # directories, by the names of the recipe's fields


def tiny_video(image: Path) -> ZeroscopeGenerator:
    """An untrained clip generator on the image generator's other parts."""
    given = StableDiffusionGenerator.from_pretrained(image)
    recipe = VideoDiffusionRecipe(icons="", generator="", side=32, mix=(1.0, 0.0, 0.0))
    torch.manual_seed(1)
    return ZeroscopeGenerator(
        vae=given.vae,
        unet=build_clip_unet(recipe, given),
        scheduler=given.scheduler,
        unconditional=given.unconditional,
        text=given.text,
        defaults=ClipDefaults(steps=1, frames=4),
    )


def tiny_audio(bank: SoundBank) -> AudioLDM2Generator:
    """An untrained sound generator; its text side is as random as its UNet."""
    recipe = sound_diffusion.SoundDiffusionRecipe(
        sounds="",
        vae="",
        vocoder="",
        channels=(16, 16, 16),
        text_width=16,
        text_layers=1,
        gpt_width=8,
        gpt_layers=1,
        vocab_size=400,
    )
    torch.manual_seed(2)
    vae = sound_autoencoder.build(
        sound_autoencoder.SoundAutoencoderRecipe(sounds="", channels=(16, 16, 16), latent_channels=4)
    )
    text = sound_diffusion.build_text(recipe, bank).eval()
    with torch.no_grad():
        empty = {name: rows[0] for name, rows in text(text.tokenize([""])).items()}
    return AudioLDM2Generator(
        vae=vae,
        unet=sound_diffusion.build_unet(recipe, 4),
        vocoder=vocoder.build(vocoder.VocoderRecipe(sounds="", width=32, kernels=(3,))),
        scheduler=build_scheduler(),
        unconditional=empty,
        text=text,
    )


@pytest.fixture(scope="module")
def parts(
    icons_dir: Path,
    sound_bank_dir: Path,
    bank: SoundBank,
    trained_generator: tuple[Path, dict[str, float]],
    tiny_llm: "Callable[..., LLM]",
    tmp_path_factory: pytest.TempPathFactory,
) -> Parts:
    """Directories of all that the recipe needs, at tiny size."""
    out = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    config = ImageBindConfig(
        out_dim=16,
        vision=VisionConfig(width=16, blocks=1, heads=2, image_size=32, patch=16, clip_seconds=0.5),
        text=TextConfig(width=16, blocks=1, heads=2, vocab_size=300, context_length=16),
        audio=PlaneConfig(width=16, blocks=1, heads=2, height=128, plane_width=204, logit_scale=20),
    )
    ImageBindModel(config).save_pretrained(out / "imagebind")
    tokenizer = train_tokenizer(names_of(IconSet.load(icons_dir), bank), vocab_size=300, context=16).backend_tokenizer
    tokenizer.save(str(out / "imagebind" / "tokenizer.json"))
    tiny_llm(max_position_embeddings=2048).save_base(out / "llm")
    image = trained_generator[0] / "generator"
    tiny_video(image).save_pretrained(out / "video")
    tiny_audio(bank).save_pretrained(out / "audio")
    return {
        "icons": str(icons_dir),
        "sounds": str(sound_bank_dir),
        "encoder": str(out / "imagebind"),
        "generators": {"image": str(image), "video": str(out / "video"), "audio": str(out / "audio")},
        "llm": str(out / "llm"),
    }


@pytest.fixture(scope="module")
def pools(parts: Parts, icons: IconSet, bank: SoundBank) -> dict[str, Pool]:
    """Eight media of each modality."""
    torch.manual_seed(0)
    sizes = {"image": 8, "video": 8, "audio": 8}
    return make_pools(sizes, parts["encoder"], icons, bank, seed=0, device=torch.device("cpu"))


def recipe(parts: Parts, **changes: Any) -> instruction.InstructionRecipe:
    settings: dict[str, Any] = dict(
        pools={"image": 8, "video": 8, "audio": 8},
        input_width=16,
        answers=4,
        projector_widths={"image": 32, "video": 16, "audio": 32},
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
    assert model.settings.name == "anygen-mini" and model.settings.slots == {"image": 4, "video": 4, "audio": 4}
    assert {m: c.shares for m, c in model.settings.inputs.items()} == {
        "image": None,
        "video": "image",
        "audio": "image",
    }
    saved = load_file(run / "model" / "projectors.safetensors")
    assert {key for key in saved if key.startswith("input.video.")} == {"input.video.scale", "input.video.shift"}
    widths = {m: saved[f"output.{m}.fc.bias"].shape[0] for m in ("image", "video", "audio")}
    assert widths == {"image": 32, "video": 16, "audio": 32}


def test_a_run_can_go_on_from_another(run: Path, parts: Parts, tmp_path: Path) -> None:
    before = load_file(run / "model" / "projectors.safetensors")
    instruction.train(recipe(parts, start=str(run / "model"), steps=1, seed=1), tmp_path)
    after = load_file(tmp_path / "model" / "projectors.safetensors")
    moved = {key: (after[key].float() - before[key].float()).abs().max().item() for key in before}
    assert max(moved.values()) > 0 and max(moved.values()) < 0.1
    one, other = (load_file(folder / "model" / "adapter" / "adapter_model.safetensors") for folder in (run, tmp_path))
    assert any(not torch.equal(value, other[key]) for key, value in one.items())


def test_a_projector_made_anew_takes_nothing_from_the_start(run: Path, parts: Parts, tmp_path: Path) -> None:
    changes = dict(start=str(run / "model"), renew=("input_projectors",), trains=("input_projectors",), input_width=24)
    instruction.train(recipe(parts, **changes, steps=1, mixture={"ask": 1.0}), tmp_path)
    before, after = (load_file(folder / "model" / "projectors.safetensors") for folder in (run, tmp_path))
    changed = {key for key in after if key not in before or before[key].shape != after[key].shape}
    assert changed == {"input.image.proj.0.bias", "input.image.proj.0.weight", "input.image.proj.2.weight"}
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("output."))
    with pytest.raises(ConfigError, match="only input_projectors and output_projectors can be made anew, not llm"):
        instruction.train(recipe(parts, start=str(run / "model"), renew=("llm",)), tmp_path)


def test_a_new_input_projector_remembers_what_the_text_encoder_makes_of_all_names(
    run: Path, parts: Parts, icons: IconSet, bank: SoundBank
) -> None:
    projector = load(run, parts).input_projectors["image"]
    texts = ImageBindEncoder.from_pretrained(parts["encoder"], modality="text")
    labels = [concept.label for concept in icons.concepts]
    labels += ["a flute", "an organ", "a tuba", "a violin", "a bass drum", "a snare drum", "a hi-hat", "a drum kit"]
    labels += ["a dog barking", "rain falling"]
    assert labels == names_of(icons, bank)
    with torch.no_grad():
        wanted = texts(**texts.preprocess(labels)).values[:, 0]
    torch.testing.assert_close(projector.keys, wanted, rtol=0, atol=4e-3)  # kept in bfloat16
    rows = [json.loads(line) for line in (run / "instruction.jsonl").read_text().splitlines()]
    met = {row["modality"]: row for row in rows if "nearest" in row}
    assert list(met) == ["image", "video", "audio"]
    assert all(row["names"] == len(labels) and row["residual"] > 0 for row in met.values())


def test_what_the_recipe_cannot_train_is_told_before_anything_is_made(
    parts: Parts, run: Path, tmp_path: Path, icons: IconSet
) -> None:
    image = {"image": parts["generators"]["image"]}
    with pytest.raises(ConfigError, match="no generator makes audio, video; generators makes image"):
        recipe(parts, generators=image)
    with pytest.raises(ConfigError, match="pools: image needs at least 1 medium; leave it out"):
        recipe(parts, pools={"image": 0})
    with pytest.raises(ConfigError, match="makes audio, so it must name the sound bank: sounds: data/sounds"):
        recipe(parts, sounds=None)
    with pytest.raises(ConfigError, match="aligns audio, so it must name the sound bank: sounds: data/sounds"):
        alignment.AlignmentRecipe(icons="", model="", generators={"audio": ""})
    with pytest.raises(ConfigError, match="does not make smell; it makes image, video, audio"):
        conditions.load_generators({"smell": "x"}, torch.device("cpu"))
    one = recipe(parts, generators=image, pools={"image": 8}, steps=1, name_steps=1)
    instruction.train(one, tmp_path / "one")
    with pytest.raises(ConfigError, match=r"start: the model in .* does not read video, audio, only image; train"):
        instruction.train(recipe(parts, start=str(tmp_path / "one" / "model")), tmp_path / "two")
    more = recipe(parts, start=str(tmp_path / "one" / "model"), renew=("input_projectors",), steps=1, learning_rate=0.0)
    instruction.train(more, tmp_path / "four")
    one_model, grown = (load(tmp_path / name, parts) for name in ("one", "four"))
    assert list(grown.settings.outputs) == list(grown.settings.inputs) == ["image", "video", "audio"]
    kept = one_model.output_projectors["image"].state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in grown.output_projectors["image"].state_dict().items())
    for string in one_model.signal_tokens.strings:
        rows = [model.signal_tokens.rows[model.signal_tokens.strings.index(string)] for model in (one_model, grown)]
        torch.testing.assert_close(*rows)
    with pytest.raises(ConfigError, match="does not make video; it makes image"):
        alignment.train(
            alignment.AlignmentRecipe(
                icons=parts["icons"],
                model=str(tmp_path / "one" / "model"),
                generators={"video": parts["generators"]["video"]},
                llm=parts["llm"],
            ),
            tmp_path / "three",
        )


def test_noise_grows_with_the_pools_deviation_and_never_exceeds_its_level() -> None:
    torch.manual_seed(0)
    still, most = torch.zeros(4000, 1, 3), torch.tensor([0.0, 0.1, 1.0])
    moved = noisy(still, most)
    assert moved[..., 0].abs().max() == 0
    # a level uniform in [0, m] makes the variance m² / 3
    torch.testing.assert_close(moved.square().mean((0, 1)), most.square() / 3, rtol=0.1, atol=0)


def test_only_the_named_parts_train(run: Path, parts: Parts, tmp_path: Path) -> None:
    changes = dict(
        start=str(run / "model"), trains=("input_projectors",), mixture={"ask": 1.0}, input_learning_rate=1e-2
    )
    instruction.train(recipe(parts, **changes), tmp_path)
    files = ("projectors.safetensors", "signal_tokens.safetensors", "adapter/adapter_model.safetensors")
    for name in files:
        before, after = (load_file(folder / "model" / name) for folder in (run, tmp_path))
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert all(key.startswith("input.") for key in moved)
        assert bool(moved) == (name == files[0])
    with pytest.raises(ConfigError, match="unknown parts: encoder; the model has llm, signal_tokens, encoders"):
        instruction.freeze_others(load(run, parts), ("encoder",))


def test_plain_talk_teaches_the_route_alone(
    run: Path, parts: Parts, icons: IconSet, bank: SoundBank, pools: dict[str, Pool]
) -> None:
    model, examples = load(run, parts), supply(run, parts, icons, bank, pools)
    plain = [examples[n] for n in range(200) if examples.conversations[n].words]
    assert plain
    for example in plain:
        assert [label for label in example["labels"] if label != -100] == [model.signal_tokens.words_id]
        assert example["ids"][-1] == model.signal_tokens.words_id


def supply(run: Path, parts: Parts, icons: IconSet, bank: SoundBank, pools: dict[str, Pool]) -> Examples:
    """Conversations of all modalities."""
    wishes = wishes_of(list(parts["generators"]), icons, bank)
    return Examples(Conversations(wishes, [seen for p in pools.values() for seen in p.shown], 0), load(run, parts))


def test_a_packed_batch_has_the_losses_of_its_conversations_read_one_by_one(
    run: Path, parts: Parts, icons: IconSet, bank: SoundBank, pools: dict[str, Pool]
) -> None:
    model, examples = load(run, parts), supply(run, parts, icons, bank, pools)
    generators = conditions.load_generators(parts["generators"], torch.device("cpu"))
    collator = Collator({name: pool.features for name, pool in pools.items()}, generators, model, 640)
    batches = PackedBatches(examples, collator, batches=1, rows=8, width=640, chunk=1, lanes=1, seed=0)
    rows = batches._chunk(0)
    batch = batches[0]
    assert max(len(row) for row in rows) > 2 and set(batch["captions"]) == set(batch["media"]) == set(pools)
    for name in pools:
        runs = len(model.signal_tokens.run_starts(batch["input_ids"], name))
        assert runs == len(batch["captions"][name]["ids"]) == len(batch["runs"][name])
        slots = int((batch["input_ids"] == model.prompts.slot_id(name)).sum())
        assert slots == 4 * len(batch["media"][name]) == len(batch["slots"][name]) > 0

    def losses(batch: dict[str, Any]) -> Any:
        decoder = PackedDecoder(model.llm, bf16=False, compile=False, graph=True)
        target = {m: conditions.caption_targets(generators[m], tokens) for m, tokens in batch["captions"].items()}
        return packed_losses(model, decoder.run, batch, batch["media"], target), target

    with torch.no_grad():
        packed, targets = losses(batch)
        # the model's own losses of the packed states, found on the device instead of by the collator
        ids = batch["input_ids"]
        embeds = model.embed(ids, batch["media"])
        hidden = PackedDecoder(model.llm, bf16=False, compile=False, graph=False)(
            embeds, block_mask(batch["segments"]), batch["position_ids"]
        )
        own = model.losses(ids, hidden, batch["labels"], targets)
        torch.testing.assert_close(packed.lm_loss, own.lm_loss)
        torch.testing.assert_close(packed.alignment_loss, own.alignment_loss)
        torch.testing.assert_close(packed.loss, own.loss)
        apart = [(example, losses(collator([[example]]))[0]) for row in rows for example in row]
        learned = [sum(label != -100 for label in example["labels"]) for example, _ in apart]
        expected = sum(one.lm_loss * n for (_, one), n in zip(apart, learned, strict=True)) / sum(learned)
        torch.testing.assert_close(packed.lm_loss, expected, atol=1e-5, rtol=1e-5)
        # and the plain pass of the model agrees with the packed decoder on one conversation
        example, one = next((e, o) for e, o in apart if e["media"] and e["captions"])
        alone = collator([[example]])
        plain = model(
            input_ids=torch.tensor([example["ids"]]),
            labels=torch.tensor([example["labels"]]),
            media=alone["media"],
            conditions=losses(alone)[1],
        )
        torch.testing.assert_close(one.loss, plain.loss, atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_a_metric_measures_what_cross_attention_sees_of_each_tensor(parts: Parts, modality: str) -> None:
    device = torch.device("cpu")
    generator: Any = conditions.load_generators({modality: parts["generators"][modality]}, device)[modality]
    captions = ["a red circle", "two blue squares", "a flute playing a fast melody", "rain falling", "a dog"]
    metrics = conditions.alignment_metrics(generator, captions, floor=0.0)
    assert set(metrics) == set(generator.condition_spec.shapes)
    told = generator.encode_text(captions).tensors
    read: dict[str, list[torch.Tensor]] = {name: [] for name in metrics}
    handles = []
    for layer_name, layer in generator.unet.named_modules():  # by what flows into keys when the UNet runs
        if layer_name.endswith("attn2.to_k"):
            hook = layer.register_forward_hook

            def note(layer: Any, given: Any, _: Any) -> None:
                for name, value in told.items():
                    if given[0].shape[1:] == value.shape[1:] and torch.equal(given[0][: len(value)], value):
                        read[name].append(layer.weight)

            handles.append(hook(note))
    generator.defaults = type(generator.defaults)(steps=1, guidance_scale=1.0)
    options = {"video": {"frames": 1}, "audio": {"seconds": 0.32}}.get(modality, {})
    condition = generator.encode_text(captions)
    generator.sample(condition, seeds=list(range(len(captions))), **options)
    for handle in handles:
        handle.remove()
    for name, metric in metrics.items():
        keys = {id(weight) for weight in read[name]}
        weights = dict(generator.unet.named_parameters())
        pairs = [(key, key.replace("to_k", "to_v")) for key, weight in weights.items() if id(weight) in keys]
        assert pairs
        maps = [weights[key] for pair in pairs for key in pair]
        difference = torch.randn(5, metric.shape[0])
        seen = sum((difference @ weight.T).square().mean(1) for weight in maps)
        ratio = (difference @ metric).square().sum(1) / seen
        torch.testing.assert_close(ratio, ratio[:1].expand(5), rtol=2e-3, atol=0)
        apart = (told[name] - told[name].mean(0)) @ metric
        assert apart.square().mean().item() == pytest.approx(1, rel=1e-2)


def test_kept_states_are_those_of_the_plain_pass(run: Path, parts: Parts, icons: IconSet, bank: SoundBank) -> None:
    model = load(run, parts)
    wishes = wishes_of(list(parts["generators"]), icons, bank)
    items = alignment.contexts(Conversations(wishes, [], 0), 20, 0)
    items += [Conversations(wishes, [], 0, {"make_several": 1.0})[number] for number in range(8)]
    kept = alignment.read_states(model, items, rows=3, width=400)
    ids, mask = pad([model.prompts.example(item.messages).ids for item in items], 0)
    with torch.inference_mode():
        hidden = model(input_ids=ids, attention_mask=mask).hidden_states
    assert hidden is not None and set(kept) == {"image", "video", "audio"}
    for modality, (states, captions) in kept.items():
        starts = model.signal_tokens.run_starts(ids, modality)
        plain = hidden[starts[:, :1], starts[:, 1:] + torch.arange(4)]
        assert len(captions) == len(states) == len(plain) > 3
        torch.testing.assert_close(states.float(), plain, atol=4e-3, rtol=2e-3)  # kept in float16
        said = [
            part.media
            for item in items
            for message in item.messages
            for part in message.parts
            if isinstance(part, MediaPart) and part.modality == modality
        ]
        assert captions == said
    left_out = alignment.read_states(model, items, rows=3, width=1)
    assert left_out == {}


def test_contexts_ask_for_everything_by_itself_first(icons: IconSet, bank: SoundBank) -> None:
    def captions(modalities: list[str], count: int) -> set[str]:
        items = alignment.contexts(Conversations(wishes_of(modalities, icons, bank), [], 0), count, 0)
        assert len(items) == count
        return {str(p.media) for item in items for p in item.messages[-1].parts if isinstance(p, MediaPart)}

    pictures = captions(["image"], 36)
    assert len(pictures) == 36  # six concepts, five styles and none
    assert {"a red circle", "a red circle, in the flat style"} <= pictures
    clips = captions(["video"], 66)
    assert len(clips) == 66  # ten motions and none
    assert {"a red circle", "a red circle moving up"} <= clips
    sounds = captions(["audio"], 300)
    assert {"a dog barking", "a tuba", "a drum kit playing a fast beat", "a snare drum"} <= sounds


@pytest.mark.parametrize("changes", [{}, {"low_rank": 4}], ids=["by gradient", "closed form"])
def test_alignment_moves_all_output_projectors_and_nothing_else(
    run: Path, parts: Parts, tmp_path: Path, changes: dict[str, Any]
) -> None:
    figures = alignment.train(
        alignment.AlignmentRecipe(
            icons=parts["icons"],
            sounds=parts["sounds"],
            model=str(run / "model"),
            generators=parts["generators"],
            llm=parts["llm"],
            contexts=48,
            rows=4,
            batch_size=8,
            steps=6,
            learning_rate=1e-2,
            **changes,
        ),
        tmp_path,
    )
    assert {f"held_out_{modality}" for modality in parts["generators"]} <= set(figures)
    before, after = (load_file(folder / "model" / "projectors.safetensors") for folder in (run, tmp_path))
    moved = {key for key in after if key not in before or not torch.equal(before[key], after[key])}
    assert {key.split(".")[1] for key in moved} == {"image", "video", "audio"}
    assert all(key.startswith("output.") for key in moved)
    rows = [load_file(folder / "model" / "signal_tokens.safetensors")["rows"] for folder in (run, tmp_path)]
    assert torch.equal(*rows)
    assert load(tmp_path, parts).settings.inputs == load(run, parts).settings.inputs


def test_a_projector_of_two_tensors_is_fitted_as_well_as_one_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(200, 2, 5, generator=generator)
    targets = {"a": torch.randn(200, 3, 4, generator=generator), "b": torch.randn(200, 2, 6, generator=generator)}
    targets["b"][..., 0] += states[:, :, 0]
    metrics = {"a": torch.eye(4) * 2, "b": torch.eye(6) + 0.2 * torch.randn(6, 6, generator=generator)}
    full = alignment.fit_projector(states, targets, metrics, rank=24, ridge=0.01)
    for name, rows in (("a", slice(0, 12)), ("b", slice(12, 24))):
        down, up, bias = alignment.fit_low_rank(states, targets[name], rank=24, ridge=0.01)
        torch.testing.assert_close(
            full["up.weight"][rows] @ full["down.weight"], up @ down, atol=1e-4, rtol=1e-3
        )  # without a limit of rank no metric matters
        torch.testing.assert_close(full["up.bias"][rows], bias, atol=1e-4, rtol=1e-3)


@pytest.fixture
def runs(run: Path, parts: Parts, tmp_path: Path) -> Path:
    """What the recipes wrote, where they write it."""
    folder = tmp_path / "runs"
    for part in ("clips", "video", "sound"):
        (folder / part).mkdir(parents=True)
    (folder / "model").symlink_to(run / "model")
    (folder / "imagebind").symlink_to(parts["encoder"])
    for place, modality in (("clips/generator", "image"), ("video/generator", "video"), ("sound/generator", "audio")):
        (folder / place).symlink_to(parts["generators"][modality])
    return folder


def test_the_parts_are_assembled_with_a_manifest(runs: Path, parts: Parts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("the card")
    (out / "stale.safetensors").write_text("old")
    total = assemble.assemble(runs, out)
    verify(out)
    assert (out / "README.md").read_text() == "the card" and not (out / "stale.safetensors").exists()
    assert total == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    model = AnyGenModel.from_pretrained(out, dtype=torch.float32, resolve=lambda _: Path(parts["llm"]))
    for modality, cls in (
        ("image", StableDiffusionGenerator),
        ("video", ZeroscopeGenerator),
        ("audio", AudioLDM2Generator),
    ):
        generator: Any = cls.from_pretrained(out / "generators" / modality)
        shapes = {name: tuple(shape) for name, shape in generator.condition_spec.shapes.items()}
        assert shapes == model.settings.outputs[modality].condition
        names = {EMBEDS, GENERATED} if modality == "audio" else {EMBEDS}
        assert set(generator.encode_text(["a red circle"]).tensors) == names
    shared = json.loads((out / "generators/video/shared.json").read_text())
    assert set(shared) == {"vae", "text_encoder", "tokenizer", "spatial"}
    assert not (out / "generators/video/vae").exists()
    stored = read_safetensors(out / "generators/video/unet", "diffusion_pytorch_model")
    assert stored and all(is_temporal(name) for name in stored)


def test_what_is_missing_foreign_or_too_large_is_not_assembled(
    runs: Path, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="nowhere is missing: run the recipe that makes it first"):
        assemble.assemble(runs, out, {"audio": "nowhere"})
    other = tiny_video(Path(parts["generators"]["image"]))
    with torch.no_grad():
        other.vae.decoder.conv_out.weight.add_(1)  # frames are decoded otherwise, but the latents are the same
    other.save_pretrained(tmp_path / "decoded")
    assemble.assemble(runs, out, {"video": "../decoded"})
    with torch.no_grad():
        other.unet.conv_out.bias.add_(1)
    other.save_pretrained(tmp_path / "drawn")
    with pytest.raises(CheckpointError, match="was trained on another unet than that of the image generator"):
        assemble.assemble(runs, out, {"video": "../drawn"})
    with torch.no_grad():
        other.text.encoder.get_input_embeddings().weight.mul_(2)
    other.save_pretrained(tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="was trained on another text_encoder than that of the image generator"):
        assemble.assemble(runs, out, {"video": "../foreign"})
    monkeypatch.setattr(assemble, "MOST_BYTES", 1 << 20)
    with pytest.raises(CheckpointError, match="MiB, at most 1 may be shipped; the largest parts: generators/"):
        assemble.assemble(runs, out)
    monkeypatch.setattr(assemble, "MOST_BYTES", 1 << 30)
    monkeypatch.setattr(assemble, "MOST_BYTES_A_FILE", 1 << 10)
    with pytest.raises(CheckpointError, match="MiB, at most 0 go into one file: save it in shards"):
        assemble.assemble(runs, out)
    verify(out)  # what was there stays


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

    weights = alignment.fit_projector(states, {"x": targets}, {"x": metric}, rank=3, ridge=1e-9)
    down, up, bias = weights["down.weight"], weights["up.weight"], weights["up.bias"]
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
