import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anygen import registry
from anygen.errors import CheckpointError, ConfigError
from anygen.features import Condition
from anygen.generators import COMPONENTS
from anygen.generators.audioldm2 import text_mask
from anygen.generators.diffusers_loss import noised
from anygen.generators.diffusers_pipeline import ConditionTensor, DiffusersGenerator, PipelineDefaults, PipelineSpec
from anygen.media import Audio, Image, Video
from anygen.registry import lookup, names

CAPTIONS = ["a red apple", "two dogs"]
SMALL: dict[str, dict[str, Any]] = {
    "stable_diffusion": {},
    "sdxl": {},
    "sd3": {"max_sequence_length": 8},
    "flux": {"max_sequence_length": 8, "height": 16, "width": 16},
    "wan": {"max_sequence_length": 8, "height": 16, "width": 16, "frames": 5},
    "ltx": {"max_sequence_length": 8, "height": 32, "width": 32, "frames": 9},
    "audioldm": {"seconds": 0.1},
    "stable_audio": {"seconds": 0.1},
}
"""Name -> defaults that make a call small; all of them are told to the plain pipeline as well."""
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "stable_diffusion": {"prompt_embeds": (10, 16)},
    "sdxl": {"prompt_embeds": (10, 32), "pooled_prompt_embeds": (16,)},
    "sd3": {"prompt_embeds": (18, 32), "pooled_prompt_embeds": (32,)},
    "flux": {"prompt_embeds": (8, 32), "pooled_prompt_embeds": (16,)},
    "wan": {"prompt_embeds": (8, 32)},
    "ltx": {"prompt_embeds": (8, 32)},
    "audioldm": {"prompt_embeds": (12,)},
    "stable_audio": {"prompt_embeds": (10, 8)},
}
KINDS = {"image": Image, "video": Video, "audio": Audio}
Make = Callable[[str], Any]


@pytest.fixture(scope="module")
def folders(tiny_pipeline: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> a folder that the pipeline itself has written."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny_pipeline(name).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="module")
def generators(folders: Callable[[str], Path]) -> Callable[[str], DiffusersGenerator]:
    """Name -> its generator, read from the pipeline's folder; not to be changed."""
    made: dict[str, DiffusersGenerator] = {}

    def generator(name: str) -> DiffusersGenerator:
        if name not in made:
            cls = lookup("generator", f"diffusers/{name}")
            made[name] = cls.from_pretrained(folders(name), steps=2, guidance_scale=4.0, **SMALL[name])
        return made[name]

    return generator


Get = Callable[[str], DiffusersGenerator]
each = pytest.mark.parametrize("name", SMALL)


def plain(pipeline: Any, name: str, captions: list[str], seeds: list[int], guidance: float = 4.0) -> np.ndarray:
    """What the pipeline makes of captions by itself."""
    renamed = {"frames": "num_frames", "seconds": "audio_end_in_s" if name == "stable_audio" else "audio_length_in_s"}
    made = pipeline(
        prompt=captions,
        num_inference_steps=2,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
        **{renamed.get(key, key): value for key, value in SMALL[name].items()},
    )
    return np.asarray(made[0])


def test_every_declaration_is_registered_and_tested() -> None:
    assert {name for name in names("generator") if name.startswith("diffusers/")} == {f"diffusers/{n}" for n in SMALL}


@each
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_what_is_made_equals_a_plain_call_with_the_captions(
    name: str, guidance: float, generators: Get, tiny_pipeline: Make
) -> None:
    generator = generators(name)
    condition = generator.encode_text(CAPTIONS)
    assert {key: tuple(value.shape[1:]) for key, value in condition.tensors.items()} == SHAPES[name]
    ours = generator.sample(condition, [5, 6], None, guidance)
    theirs = plain(tiny_pipeline(name), name, CAPTIONS, [5, 6], guidance)
    assert ours.shape == theirs.shape and ours.std() > 1e-4
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def test_stable_diffusion_2_is_the_same_declaration(tiny_pipeline: Make, tmp_path: Path) -> None:
    pipeline = tiny_pipeline("stable_diffusion_2")
    pipeline.save_pretrained(tmp_path)
    generator = lookup("generator", "diffusers/stable_diffusion").from_pretrained(tmp_path, steps=2)
    assert generator.condition_spec.shapes == {"prompt_embeds": (10, 24)}
    ours = generator.sample(generator.encode_text(CAPTIONS), [5, 6], None, 4.0)
    theirs = plain(pipeline, "stable_diffusion", CAPTIONS, [5, 6])
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("scheduler", "calls"), [("PNDM", 5), ("EulerAncestralDiscrete", 4), ("HeunDiscrete", 7)])
def test_published_schedulers_draw_from_each_samples_own_seed(scheduler: str, calls: int, tiny_pipeline: Make) -> None:
    import diffusers

    generator = lookup("generator", "diffusers/sdxl")(tiny_pipeline("sdxl"))
    cls: Any = getattr(diffusers, f"{scheduler}Scheduler")
    options = {"skip_prk_steps": True} if scheduler == "PNDM" else {}
    generator.pipeline.scheduler = cls(beta_schedule="scaled_linear", steps_offset=1, **options)
    condition, seen = generator.encode_text([*CAPTIONS, ""]), []
    together = generator.sample(condition, [1, 2, 3], 4, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(call + 1, calls) for call in range(calls)]  # what the scheduler makes of four steps
    for row, seed in enumerate((1, 2, 3)):
        np.testing.assert_allclose(generator.sample(condition[row], [seed], 4)[0], together[row], atol=1e-5, rtol=0)


def test_conditions_are_the_outputs_of_encode_prompt(generators: Get, tiny_pipeline: Make) -> None:
    asked: dict[str, dict[str, Any]] = {
        "stable_diffusion": {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False},
        "sdxl": {},
        "sd3": {"prompt_2": None, "prompt_3": None, "max_sequence_length": 8},
        "flux": {"max_sequence_length": 8},
        "wan": {"max_sequence_length": 8},
    }
    for name, arguments in asked.items():
        ours = list(generators(name).encode_text(CAPTIONS).tensors.values())
        with torch.no_grad():
            theirs = tiny_pipeline(name).encode_prompt(CAPTIONS, **arguments)
        places = {"sdxl": (0, 2), "sd3": (0, 2), "flux": (0, 1)}.get(name, (0,))
        torch.testing.assert_close(ours, [theirs[place] for place in places], atol=1e-6, rtol=0)


def test_padding_is_zero_and_the_mask_is_read_back(generators: Get, tiny_pipeline: Make) -> None:
    pipeline, ours = tiny_pipeline("ltx"), generators("ltx").encode_text(CAPTIONS).tensors["prompt_embeds"]
    with torch.no_grad():
        theirs, mask, *_ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=8)
    assert torch.equal(text_mask(ours), mask.long()) and 0 < int(mask.sum()) < mask.numel()
    torch.testing.assert_close(ours, theirs * mask[..., None], atol=1e-6, rtol=0)


@each
def test_every_tensor_of_the_condition_reaches_what_is_made(name: str, generators: Get) -> None:
    generator = generators(name)
    condition = generator.encode_text(CAPTIONS[:1])
    before = generator.sample(condition, [0])
    for key, value in condition.tensors.items():
        changed = generator.sample(Condition(condition.tensors | {key: -value.flip(-1)}), [0])
        assert np.abs(changed - before).max() > 1e-3


@each
def test_a_sample_does_not_depend_on_its_batch(name: str, generators: Get) -> None:
    generator = generators(name)
    condition = generator.encode_text([*CAPTIONS, ""])
    together = generator.sample(condition, [1, 2, 3])
    for row, seed in enumerate((1, 2, 3)):
        np.testing.assert_allclose(generator.sample(condition[row], [seed])[0], together[row], atol=1e-5, rtol=0)


@each
def test_media_come_out_and_steps_are_reported(name: str, generators: Get) -> None:
    generator = generators(name)
    scheduler = generator.pipeline.scheduler
    condition, seen = generator.encode_text(CAPTIONS), []
    media = generator.generate(condition, seeds=[0, 1], on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)] and len(media) == 2
    assert all(isinstance(medium, KINDS[generator.modality]) for medium in media)
    assert generator.pipeline.scheduler is scheduler and not getattr(generator.pipeline, "num_timesteps", 0)
    stream = generator.generate_stepwise(condition[0], seeds=[0], steps=1)
    assert next(stream) == (1, 1)
    with pytest.raises(StopIteration) as end:
        next(stream)
    assert isinstance(end.value.value[0], KINDS[generator.modality])


@each
def test_a_saved_folder_generates_without_text_encoders(
    name: str, generators: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = generators(name)
    generator.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.rglob("*.json") if "_name_or_path" in path.read_text()]
    condition = generator.encode_text(CAPTIONS[:1])
    loaded = type(generator).from_pretrained(tmp_path)
    again = loaded.encode_text(CAPTIONS[:1])
    for key, value in condition.tensors.items():
        torch.testing.assert_close(again.tensors[key], value)
    for part in generator.spec.text_parts:
        for path in (tmp_path / part).iterdir():
            path.unlink()
    loaded = type(generator).from_pretrained(tmp_path)
    assert loaded.defaults == generator.defaults and loaded.condition_spec == generator.condition_spec
    np.testing.assert_allclose(loaded.sample(condition, [4]), generator.sample(condition, [4]), atol=1e-6, rtol=0)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        loaded.encode_text(CAPTIONS)


def test_weights_may_be_half_as_wide(folders: Callable[[str], Path]) -> None:
    cls = lookup("generator", "diffusers/ltx")
    generator = cls.from_pretrained(folders("ltx"), dtype=torch.bfloat16, steps=1, **SMALL["ltx"])
    condition = generator.encode_text(CAPTIONS).to(dtype=torch.float32)
    assert generator.sample(condition, [0, 1]).dtype == np.float32
    assert generator.to("cpu").device == torch.device("cpu")


def test_text_encoders_are_in_memory_once_they_are_asked_for(folders: Callable[[str], Path]) -> None:
    generator = lookup("generator", "diffusers/sdxl").from_pretrained(folders("sdxl"))
    parts = generator.pipeline.components
    assert [parts[name] for name in generator.spec.text_parts] == [None] * 4 and generator._text is None
    generator.encode_text(CAPTIONS)
    whole = generator.text_pipeline
    assert whole is generator.text_pipeline and whole.unet is generator.pipeline.unet and whole.text_encoder_2


@pytest.mark.parametrize("name", ["stable_diffusion", "sdxl", "sd3"])
def test_the_denoising_loss_is_the_textbook_one(name: str, generators: Get) -> None:
    generator, pipeline = generators(name), generators(name).pipeline
    pixels = [Image.from_any(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))] * 2
    tensors = {key: value.requires_grad_() for key, value in generator.encode_text(CAPTIONS).tensors.items()}
    loss = generator.denoising_loss(Condition(tensors), pixels, generator=torch.Generator().manual_seed(3))
    loss.backward()
    assert all(value.grad is not None and value.grad.any() for value in tensors.values())

    draws = torch.Generator().manual_seed(3)
    values = torch.stack([torch.from_numpy(image.array) for image in pixels]).permute(0, 3, 1, 2) / 127.5 - 1
    embeds = tensors["prompt_embeds"]
    with torch.no_grad():
        latents = pipeline.vae.encode(values).latent_dist.sample(draws)
        latents = (latents - (0.06 if name == "sd3" else 0)) * 0.7
        noise = torch.randn(latents.shape, generator=draws)
        drawn = torch.randint(1000, (2,), generator=draws)
        if name == "sd3":
            uniform = (1000 - drawn) / 1000
            sigma = (3 * uniform / (1 + 2 * uniform)).view(-1, 1, 1, 1)
            pooled = tensors["pooled_prompt_embeds"]
            predicted = pipeline.transformer(
                (1 - sigma) * latents + sigma * noise, embeds, pooled, sigma.flatten() * 1000
            ).sample
            wanted = noise - latents
        else:
            kept = pipeline.scheduler.alphas_cumprod[drawn].view(-1, 1, 1, 1)
            added = {}
            if name == "sdxl":
                sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(2, -1)
                added["added_cond_kwargs"] = {"text_embeds": tensors["pooled_prompt_embeds"], "time_ids": sizes}
            noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
            predicted = pipeline.unet(noisy, drawn, encoder_hidden_states=embeds, **added).sample
            wanted = noise
    torch.testing.assert_close(loss.detach(), (predicted - wanted).square().mean())


def test_the_velocity_is_a_target_and_a_sample_is_not() -> None:
    from diffusers import DDIMScheduler

    latents, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    scheduler: Any = DDIMScheduler(prediction_type="v_prediction")
    noisy, times, velocity = noised(scheduler, latents, noise)
    kept = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    torch.testing.assert_close(kept.sqrt() * noisy - (1 - kept).sqrt() * velocity, latents, atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="DDIMScheduler with prediction type 'sample' has no training target here"):
        noised(DDIMScheduler(prediction_type="sample"), latents, noise)


def test_a_pipeline_without_a_loss_says_which_have_one(generators: Get) -> None:
    generator = generators("audioldm")
    said = "AudioLDMPipeline has no denoising loss; pipelines that have one: StableDiffusion3Pipeline, StableDiffusion"
    with pytest.raises(ConfigError, match=said):
        generator.denoising_loss(generator.encode_text(CAPTIONS), [])


def test_lengths_and_sizes_are_chosen(generators: Get) -> None:
    wan, speech, picture = generators("wan"), generators("audioldm"), generators("stable_diffusion")
    clip = wan.generate(wan.encode_text(["two dogs"]), seeds=[0], steps=1, seconds=0.6, height=32)[0]
    assert clip.frames.shape == (9, 32, 16, 3) and clip.fps == 16  # 9.6 frames, of which every fourth and one more
    sound = speech.generate(speech.encode_text(["two dogs"]), seeds=[0], steps=1, seconds=0.2)[0]
    assert sound.samples.shape == (1, 3200) and sound.sampling_rate == 16000
    image = picture.generate(picture.encode_text(["two dogs"]), seeds=[0], steps=1, height=24, width=32)[0]
    assert image.size == (32, 24)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("sdxl", {"seeds": [0, 1]}, "1 conditions need 1 seeds, got 2"),
    ("sdxl", {"steps": 0}, "steps must be at least 1, got 0"),
    ("sdxl", {"colour": 3}, "StableDiffusionXLPipeline has no option 'colour'; it has: .*height"),
    ("sdxl", {"prompt_embeds": 3}, "has no option 'prompt_embeds'"),
    ("sdxl", {"height": 15}, "StableDiffusionXLPipeline: .height. and .width. have to be divisible by 8"),
    ("sdxl", {"seconds": 3.0}, "makes image, whose length in seconds cannot be chosen"),
    ("audioldm", {"frames": 3}, "makes audio, whose length in frames cannot be chosen"),
    ("audioldm", {"seconds": -1.0}, "seconds must be over 0, got -1"),
    ("wan", {"frames": 5, "seconds": 1.0}, "told in frames or in seconds, not in both"),
    ("wan", {"frames": 6}, "WanPipeline makes clips of a multiple of 4 frames and one more, not 6"),
]


@pytest.mark.parametrize(("name", "asked", "said"), BAD)
def test_bad_requests_are_refused(name: str, asked: dict[str, Any], said: str, generators: Get) -> None:
    condition = generators(name).encode_text(["two dogs"])
    options: dict[str, Any] = {"seeds": [0]} | asked
    with pytest.raises(ConfigError, match=said):
        generators(name).generate(condition, **options)


def test_a_condition_of_another_shape_is_refused(generators: Get) -> None:
    with pytest.raises(ConfigError, match=r"\(8, 32\).* is wanted, got"):
        generators("ltx").sample(Condition({"prompt_embeds": torch.zeros(1, 8, 5)}), [0])


def test_what_a_listener_raises_is_not_taken_for_a_fault_of_the_pipeline(generators: Get) -> None:
    def stop(done: int, total: int) -> None:
        raise ConfigError("enough")

    generator = generators("stable_diffusion")
    with pytest.raises(ConfigError, match="^enough$"):
        generator.generate(generator.encode_text(["two dogs"]), seeds=[0], on_step=stop)


def test_bad_folders_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    wan = lookup("generator", "diffusers/wan")
    with pytest.raises(CheckpointError, match=r"is not a WanPipeline folder: it has no model_index.json"):
        wan.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a folder of LTXPipeline, not of WanPipeline"):
        wan.from_pretrained(folders("ltx"))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model_index.json is not JSON"):
        wan.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text((folders("wan") / "model_index.json").read_text())
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        wan.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="unknown key 'step', did you mean 'steps'"):
        wan.from_pretrained(folders("wan"), step=3)


def test_bad_declarations_are_refused(tiny_pipeline: Make) -> None:
    embeds = ConditionTensor(name="prompt_embeds")
    with pytest.raises(ConfigError, match="modality is one of image, video, audio, not 'smell'"):
        PipelineSpec(pipeline="WanPipeline", modality="smell", condition=(embeds,))
    with pytest.raises(ConfigError, match="WanPipeline: a condition has at least one tensor"):
        PipelineSpec(pipeline="WanPipeline", modality="video", condition=())
    with pytest.raises(ConfigError, match="'prompt_embeds' has a mask, so state its mask_output"):
        PipelineSpec(pipeline="WanPipeline", modality="video", condition=(replace(embeds, mask="mask"),))
    with pytest.raises(ConfigError, match="'prompt_embeds' has a mask, so state its negative_mask_output"):
        masked = replace(embeds, mask="mask", mask_output=1, negative_output=2)
        PipelineSpec(pipeline="WanPipeline", modality="video", condition=(masked,))
    with pytest.raises(ConfigError, match="has no pipeline 'WanPipelin'; did you mean 'WanPipeline'"):
        PipelineSpec(pipeline="WanPipelin", modality="video", condition=(embeds,)).pipeline_class()
    with pytest.raises(ConfigError, match="not steps=0, frames=None, fps=8"):
        PipelineDefaults(steps=0)
    with pytest.raises(ConfigError, match="guidance_interval: a pipeline of diffusers guides in all its steps"):
        PipelineDefaults(guidance_interval=(0.0, 0.5))

    def built(*condition: ConditionTensor) -> None:
        class Declared(DiffusersGenerator):
            spec = PipelineSpec(pipeline="StableDiffusionPipeline", modality="image", condition=condition)

        Declared(tiny_pipeline("stable_diffusion"))

    with pytest.raises(CheckpointError, match=r"declared with conditions of .*\(77, 768\).*, here are .*\(10, 16\)"):
        built(replace(embeds, shape=(77, 768)))
    with pytest.raises(ConfigError, match="as output 4 of StableDiffusionPipeline's encoder, which returns 2, counted"):
        built(replace(embeds, output=4))


def test_a_sound_without_a_rate_is_refused(tiny_pipeline: Make) -> None:
    class Sonified(DiffusersGenerator):
        spec = replace(lookup("generator", "diffusers/stable_diffusion").spec, modality="audio")

    generator = Sonified(tiny_pipeline("stable_diffusion"))
    said = "StableDiffusionPipeline does not tell its sampling rate; state it in the defaults"
    with pytest.raises(ConfigError, match=said):
        generator.media(np.zeros((1, 8), dtype=np.float32))


def test_encoders_that_pad_to_the_longest_caption_give_conditions_of_one_shape(tiny_pipeline: Make) -> None:
    def longest(pipeline: Any, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        words = pipeline.tokenizer(captions, padding=True, return_tensors="pt")
        return pipeline.text_encoder(words.input_ids)[0], words.attention_mask

    class Padded(DiffusersGenerator):
        spec = replace(
            lookup("generator", "diffusers/stable_audio").spec,
            encoder=longest,
            condition=(ConditionTensor(name="prompt_embeds", mask="attention_mask", mask_output=1, shape=(10, 8)),),
        )

    generator = Padded(tiny_pipeline("stable_audio"), defaults=PipelineDefaults(steps=1, seconds=0.05))
    assert generator.encode_text(["two dogs"]).tensors["prompt_embeds"].shape == (1, 10, 8)
    assert generator.encode_text(CAPTIONS * 2).tensors["prompt_embeds"].shape == (4, 10, 8)


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "generators.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    scope: dict[str, Any] = {}
    for example in re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL):
        exec(compile(example, "docs/generators.md", "exec"), scope)
    assert [picture.size for picture in scope["pictures"]] == [(8, 8), (8, 8)]
    assert scope["condition"].tensors["prompt_embeds"].shape == (2, 8, 16)
    pipeline = scope["pipeline"]
    pipeline.text_encoder.eval()
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        ["a red apple", "two dogs"],
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=8,
        output_type="np",
    ).images
    np.testing.assert_allclose(scope["generator"].sample(scope["condition"], [1, 2]), theirs, atol=1e-5, rtol=0)


def test_the_documentation_lists_every_generator() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "generators.md").read_text(encoding="utf-8")
    own = [name for name, target in COMPONENTS["generator"].items() if target.startswith("anygen.generators.")]
    assert sorted(re.findall(r"^\| `([\w/]+)` \|", page, flags=re.MULTILINE)) == sorted(own)
    trains = {name: (spec := getattr(lookup("generator", name), "spec", None)) is None or spec.predict for name in own}
    told = dict(re.findall(r"^\| `([\w/]+)` \|.*\| (yes|no) \|$", page, flags=re.MULTILINE))
    assert {name: "yes" if able else "no" for name, able in trains.items()} == told
