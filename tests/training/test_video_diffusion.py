"""The video generator's UNet, latents, objective and run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anygen.errors import ConfigError
from anygen.generators.latent import EMBEDS
from anygen.generators.stable_diffusion import StableDiffusionGenerator
from anygen.generators.zeroscope import ClipDefaults, ZeroscopeGenerator
from anygen.training.diffusion import DiffusionRecipe
from anygen.training.diffusion import build_unet as build_image_unet
from anygen.training.icons import IconSet
from anygen.training.latent_diffusion import CaptionTokens, build_scheduler
from anygen.training.losses import snr_weights
from anygen.training.motion import MotionSource
from anygen.training.video_diffusion import (
    ClipPool,
    LatentClips,
    VideoDiffusionRecipe,
    _Objective,
    build_parts,
    build_unet,
    channels_last,
    copy_spatial,
    encode_clips,
    is_temporal,
    moving_clips,
    shares_of,
    still_clips,
    train,
    without_time,
)

Run = tuple[Path, dict[str, float]]


@pytest.fixture(scope="module")
def recipe(icons_dir: Path, trained_generator: Run) -> VideoDiffusionRecipe:
    """Two steps over clips of four frames, on the tiny image generator."""
    return VideoDiffusionRecipe(
        icons=str(icons_dir),
        generator=str(trained_generator[0] / "generator"),
        frames=4,
        side=32,
        channels=(32, 32, 32),
        moving=12,
        still=10,
        mix=(0.5, 0.0, 0.5),
        batch_size=4,
        steps=2,
        sampling=ClipDefaults(steps=1, guidance_scale=2.0, frames=4, fps=8.0),
    )


@pytest.fixture(scope="module")
def image(trained_generator: Run) -> StableDiffusionGenerator:
    image = StableDiffusionGenerator.from_pretrained(trained_generator[0] / "generator")
    image.vae.register_to_config(scaling_factor=0.5)  # untrained, it is near 1
    return image


@pytest.fixture(scope="module")
def trained(recipe: VideoDiffusionRecipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folder and the figures of two steps."""
    out = tmp_path_factory.mktemp("video-run")
    return out, train(recipe, out)


# --- the UNet ------------------------------------------------------------------------------------------------


def test_untrained_temporal_layers_do_nothing_so_frames_are_drawn_as_pictures(recipe: VideoDiffusionRecipe) -> None:
    torch.manual_seed(0)
    wide = replace(recipe, channels=(128, 128, 128))
    shape = DiffusionRecipe(icons="", vae="", channels=wide.channels, text_width=32)
    pictures = build_image_unet(shape, latent_channels=4, side=4).eval()
    unet = build_unet(wide, latent_channels=4, latent_side=4, text_width=32).eval()
    copied = copy_spatial(unet, pictures)
    spatial = sum(p.numel() for name, p in unet.named_parameters() if not is_temporal(name))
    assert copied == spatial == sum(p.numel() for p in pictures.parameters())
    clips, embeds = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 24, 32)
    times = torch.tensor([7, 800])
    with torch.no_grad():
        drawn = unet(clips, times, encoder_hidden_states=embeds).sample
        for frame in range(3):
            picture = pictures(clips[:, :, frame], times, encoder_hidden_states=embeds).sample
            torch.testing.assert_close(drawn[:, :, frame], picture, rtol=0, atol=2e-5)


def test_leaving_the_temporal_layers_out_changes_nothing_while_they_are_untrained(recipe: VideoDiffusionRecipe) -> None:
    torch.manual_seed(0)
    unet = build_unet(recipe, latent_channels=4, latent_side=4, text_width=32).eval()
    noisy, embeds = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 5, 32)
    with torch.no_grad():
        wanted = unet(noisy, 7, encoder_hidden_states=embeds).sample
        torch.testing.assert_close(without_time(unet)(noisy, 7, encoder_hidden_states=embeds).sample, wanted)
        for name, parameter in unet.named_parameters():
            if is_temporal(name):
                parameter.normal_()
        torch.testing.assert_close(unet(noisy, 7, encoder_hidden_states=embeds).sample, wanted)


def test_the_layout_for_tensor_cores_changes_no_value(recipe: VideoDiffusionRecipe) -> None:
    torch.manual_seed(0)
    unet = build_unet(recipe, latent_channels=4, latent_side=4, text_width=32).eval()
    noisy, embeds = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 5, 32)
    with torch.no_grad():
        wanted = unet(noisy, 7, encoder_hidden_states=embeds).sample
        torch.testing.assert_close(channels_last(unet)(noisy, 7, encoder_hidden_states=embeds).sample, wanted)
    convolution = unet.down_blocks[0].temp_convs[0].conv1[-1]
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_an_image_unet_of_other_widths_is_refused(
    recipe: VideoDiffusionRecipe, image: StableDiffusionGenerator
) -> None:
    unet = build_unet(replace(recipe, channels=(64, 32, 32)), latent_channels=4, latent_side=4, text_width=32)
    with pytest.raises(ConfigError, match=r"its UNet has channels \(32, 32, 32\), this one \(64, 32, 32\)"):
        copy_spatial(unet, image.unet)


def test_parts_come_from_where_the_recipe_says(
    recipe: VideoDiffusionRecipe, image: StableDiffusionGenerator, trained: Run
) -> None:
    fresh, none = build_parts(recipe, image)
    started, given = build_parts(replace(recipe, start_image=recipe.generator), image)
    assert none == 0 < given and torch.equal(started.conv_in.weight, image.unet.conv_in.weight)
    assert not torch.equal(fresh.conv_in.weight, image.unet.conv_in.weight)
    folder = trained[0] / "generator"
    onwards, none = build_parts(replace(recipe, start=str(folder), channels=(64, 64, 64)), image)
    stored = ZeroscopeGenerator.from_pretrained(folder).unet.conv_in.weight
    assert none == 0 and torch.equal(onwards.conv_in.weight, stored)


# --- the pool ------------------------------------------------------------------------------------------------


def test_latents_are_the_frames_posterior_means(icons: IconSet, image: StableDiffusionGenerator) -> None:
    batch = next(MotionSource(icons, seed=4, frames=3).clips(2))
    latents = encode_clips(image.vae, batch.pixels)
    assert latents.shape == (2, 4, 3, 4, 4) and latents.dtype == torch.bfloat16
    for clip in range(2):
        for frame in range(3):
            mean = image.vae.encode(batch.pixels[clip, frame][None] * 2 - 1).latent_dist.mean[0] * 0.5
            torch.testing.assert_close(latents[clip, :, frame].float(), mean, rtol=0.02, atol=0.02)


def test_captions_say_what_the_clips_show(
    recipe: VideoDiffusionRecipe, icons: IconSet, image: StableDiffusionGenerator
) -> None:
    (said,) = moving_clips(recipe, icons, torch.device("cpu"))
    batch = next(MotionSource(icons, seed=0, side=32, frames=4).clips(12))
    assert torch.equal(said[0], batch.pixels) and len(said[1]) == 24
    for row, (concept, shot) in enumerate(zip(batch.concepts, batch.shots, strict=True)):
        names = (icons.concepts[concept].label, *icons.concepts[concept].aliases)
        assert all(any(name in caption for name in names) for caption in said[1][2 * row : 2 * row + 2])
        assert shot.motion and shot.motion in said[1][2 * row]  # the first caption is canonical


def test_pictures_are_clips_that_stay_still(
    recipe: VideoDiffusionRecipe, icons: IconSet, image: StableDiffusionGenerator
) -> None:
    clips = still_clips(replace(recipe, side=16), icons, torch.device("cpu"))
    part = LatentClips(clips, 10, image.vae, CaptionTokens(image.text))
    assert part.latents.shape == (10, 4, 1, 2, 2) and part.tokens.shape == (10, 2, 24)
    torch.manual_seed(0)
    latents, tokens = part.draw(6, 4)
    assert latents.shape == (6, 4, 4, 2, 2) and tokens.shape == (6, 24)
    assert bool((latents == latents[:, :, :1]).all())


def test_a_batch_holds_the_shares_of_the_mix(
    recipe: VideoDiffusionRecipe, icons: IconSet, image: StableDiffusionGenerator
) -> None:
    pool = ClipPool(replace(recipe, mix=(0.7, 0.0, 0.3)), icons, image.vae, image.text, torch.device("cpu"))
    assert len(pool) == 22
    latents, tokens = pool.draw(10, 0.0)
    still = (latents == latents[:, :, :1]).flatten(1).all(1)
    assert latents.shape == (10, 4, 4, 4, 4) and bool(still[7:].all())
    assert (tokens == pool.empty).all(1).sum() == 0
    assert bool((pool.draw(10, 1.0)[1] == pool.empty).all())


@pytest.mark.parametrize(
    ("size", "shares", "wanted"),
    [(10, (0.6, 0.2, 0.2), [6, 2, 2]), (64, (0.6, 0.2, 0.2), [38, 13, 13]), (5, (0.5, 0.5), [2, 3]), (3, (1.0,), [3])],
)
def test_shares_sum_to_the_batch(size: int, shares: tuple[float, ...], wanted: list[int]) -> None:
    assert shares_of(size, shares) == wanted


# --- the objective and the run -------------------------------------------------------------------------------


def test_the_objective_is_the_weighted_velocity_loss(
    recipe: VideoDiffusionRecipe, image: StableDiffusionGenerator
) -> None:
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    scheduler = build_scheduler()
    unet = build_unet(recipe, latent_channels=4, latent_side=4, text_width=32).eval()
    shape = (3, 4, 2, 4, 4)
    latents, noise, times = torch.randn(shape), torch.randn(shape), torch.tensor([3, 500, 990])
    tokens = image.text.tokenize(["a red circle moving up", "", "a blue square"])
    loss = _Objective(unet, image.text.encoder, scheduler.alphas_cumprod, 5.0)(latents, tokens, noise, times)
    reference: Any = DDPMScheduler.from_config(dict(scheduler.config), clip_sample=False)
    noisy = reference.add_noise(latents, noise, times)
    predicted = unet(noisy, times, encoder_hidden_states=image.text(tokens)).sample
    squared = (predicted - reference.get_velocity(latents, noise, times)).square().mean((1, 2, 3, 4))
    weights = snr_weights(scheduler.alphas_cumprod, times, 5.0, "v_prediction").clamp(min=0.1)
    torch.testing.assert_close(loss, (weights * squared).mean())
    loss.backward()
    learns = {name for name, p in unet.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any(is_temporal(name) for name in learns) and "conv_in.weight" in learns


def test_a_run_writes_a_generator_that_makes_clips(trained: Run) -> None:
    out, figures = trained
    assert figures["steps"] == 2 and 0 < figures["loss"] < 100 and (out / "clips.png").exists()
    one, other = (ZeroscopeGenerator.from_pretrained(out / "generator") for _ in range(2))
    captions = ["a red circle moving up, in the flat style", "a blue square spinning"]
    (a, b), (same, _) = (g.generate(g.encode_text(captions), seeds=[1, 2]) for g in (one, other))
    assert a == same and a != b and a.frames.shape == (4, 32, 32, 3) and a.fps == 8
    rows = [json.loads(line) for line in (out / "video_diffusion.jsonl").read_text().splitlines()]
    assert rows[0]["pool"] == 22 and 0 < rows[1]["temporal"] < rows[1]["unet"] and rows[1]["from_image"] == 0
    assert rows[-1]["step"] == 2 and not (out / "generator.partial").exists()


def test_clips_and_pictures_share_conditions_and_latents(trained: Run, trained_generator: Run) -> None:
    video, image = trained[0] / "generator", trained_generator[0] / "generator"
    for part in ("vae", "text_encoder"):
        for file in sorted((image / part).glob("*.safetensors")):
            assert (video / part / file.name).read_bytes() == file.read_bytes()
    one, other = ZeroscopeGenerator.from_pretrained(video), StableDiffusionGenerator.from_pretrained(image)
    condition = (part.encode_text(["a red circle"]).tensors[EMBEDS] for part in (one, other))
    assert torch.equal(*condition) and torch.equal(one.unconditional, other.unconditional)


def test_a_run_over_pictures_is_a_start_for_one_over_clips(recipe: VideoDiffusionRecipe, tmp_path: Path) -> None:
    train(replace(recipe, frames=1, steps=1, compile=False), tmp_path / "pictures")
    onwards = replace(recipe, start=str(tmp_path / "pictures" / "generator"), steps=1, checkpoint_minutes=0.0)
    train(onwards, tmp_path / "clips")
    before, after = (
        ZeroscopeGenerator.from_pretrained(tmp_path / name / "generator").unet for name in ("pictures", "clips")
    )
    moved = (before.conv_in.weight - after.conv_in.weight).abs().max().item()
    assert 0 < moved < 0.01
    rows = [json.loads(line) for line in (tmp_path / "clips" / "video_diffusion.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "checkpoint" in row] == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": (0.5, 0.0, 0.4)}, r"mix: three shares that sum to 1 are wanted, not \[0.5, 0.0, 0.4\]"),
        ({"mix": (1.5, 0.0, -0.5)}, "mix: three shares that sum to 1"),
        ({"mix": (0.5, 0.5, 0.0)}, "a share of animated clips needs animations"),
        ({"mix": (1.0, 0.0, 0.0), "start": "a", "start_image": "b"}, "start and start_image exclude each other"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VideoDiffusionRecipe(icons="", generator="", **changes)


def test_a_recipe_survives_its_file(recipe: VideoDiffusionRecipe) -> None:
    assert VideoDiffusionRecipe.from_dict(recipe.to_dict()) == recipe
