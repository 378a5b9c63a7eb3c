"""The video generator's UNet, latents, objective and run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

from anygen.errors import CheckpointError, ConfigError
from anygen.generators.clip_unet import is_temporal, temporal_state
from anygen.generators.latent import EMBEDS
from anygen.generators.stable_diffusion import StableDiffusionGenerator
from anygen.generators.zeroscope import ClipDefaults, ZeroscopeGenerator
from anygen.training.clip_pools import ClipPool, LatentClips, encode_clips, moving_clips, shares_of, still_clips
from anygen.training.icons import IconSet
from anygen.training.latent_diffusion import CaptionTokens, build_scheduler
from anygen.training.losses import snr_weights
from anygen.training.motion import MotionSource
from anygen.training.video_diffusion import VideoDiffusionRecipe, _Objective, build_unet, channels_last, train

Run = tuple[Path, dict[str, float]]


@pytest.fixture(scope="module")
def recipe(icons_dir: Path, trained_generator: Run) -> VideoDiffusionRecipe:
    """Two steps over clips of four frames, on the tiny image generator."""
    return VideoDiffusionRecipe(
        icons=str(icons_dir),
        generator=str(trained_generator[0] / "generator"),
        frames=4,
        side=32,
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


def test_the_unet_is_the_image_generators_with_temporal_layers(
    recipe: VideoDiffusionRecipe, image: StableDiffusionGenerator, trained: Run
) -> None:
    unet = build_unet(replace(recipe, side=16), image)
    assert torch.equal(unet.conv_in.weight, image.unet.conv_in.weight) and unet.config.sample_size == 2
    last = unet.down_blocks[0].temp_convs[0].conv4[-1].weight
    assert not last.any()
    onwards = build_unet(replace(recipe, start=str(trained[0] / "generator")), image)
    stored = ZeroscopeGenerator.from_pretrained(trained[0] / "generator").unet
    assert temporal_state(onwards).keys() == temporal_state(unet).keys()
    assert all(torch.equal(value, temporal_state(stored)[name]) for name, value in temporal_state(onwards).items())
    other = replace(recipe, start=str(trained[0] / "generator"), temporal_levels=(1,))
    with pytest.raises(CheckpointError, match=r"start: the temporal part of .* does not fit: unexpected"):
        build_unet(other, image)


def test_the_layout_for_tensor_cores_changes_no_value(
    recipe: VideoDiffusionRecipe, image: StableDiffusionGenerator
) -> None:
    torch.manual_seed(0)
    unet = build_unet(recipe, image).eval()
    noisy, embeds = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 5, 32)
    with torch.no_grad():
        wanted = unet(noisy, 7, encoder_hidden_states=embeds).sample
        torch.testing.assert_close(channels_last(unet)(noisy, 7, encoder_hidden_states=embeds).sample, wanted)
    convolution = unet.down_blocks[0].temp_convs[0].conv1[-1]
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


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
    (said,) = moving_clips(recipe, icons, recipe.side, torch.device("cpu"))
    batch = next(MotionSource(icons, seed=0, side=32, frames=4).clips(12))
    assert torch.equal(said[0], batch.pixels) and len(said[1]) == 24
    for row, (concept, shot) in enumerate(zip(batch.concepts, batch.shots, strict=True)):
        names = (icons.concepts[concept].label, *icons.concepts[concept].aliases)
        assert all(any(name in caption for name in names) for caption in said[1][2 * row : 2 * row + 2])
        assert shot.motion and shot.motion in said[1][2 * row]  # the first caption is canonical


def test_pictures_are_clips_that_stay_still(
    recipe: VideoDiffusionRecipe, icons: IconSet, image: StableDiffusionGenerator
) -> None:
    clips = still_clips(recipe, icons, 16, torch.device("cpu"))
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
    unet = build_unet(recipe, image).eval()
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
    assert learns and all(is_temporal(name) for name in learns)
    assert all(p.grad is None for name, p in unet.named_parameters() if not is_temporal(name))


def test_time_is_learned_and_nothing_else_moves(
    recipe: VideoDiffusionRecipe, image: StableDiffusionGenerator, trained_generator: Run, tmp_path: Path
) -> None:
    train(replace(recipe, steps=6, learning_rate=1.0), tmp_path)  # within the warm-up, which has 300 steps
    unet = ZeroscopeGenerator.from_pretrained(tmp_path / "generator").unet
    given = StableDiffusionGenerator.from_pretrained(trained_generator[0] / "generator").unet.state_dict()
    for name, value in unet.state_dict().items():
        if not is_temporal(name):
            assert torch.equal(value.flatten(), given[name].flatten())
    convolutions: list[Any] = [m for m in unet.modules() if isinstance(m, TemporalConvLayer)]
    attentions: list[Any] = [m for m in unet.modules() if isinstance(m, TransformerTemporalModel)]
    assert len(convolutions) == 6 and len(attentions) == 6
    assert all(m.conv4[-1].weight.any() for m in convolutions) and all(m.proj_out.weight.any() for m in attentions)
    latents, noise = torch.randn(2, 3, 4, 4, 4, 4).unbind()
    latents = latents + torch.arange(4).view(4, 1, 1)
    tokens, times = image.text.tokenize(["a red circle moving up", "", "a dog"]), torch.tensor([30, 500, 990])
    objective: Any = _Objective(unet, image.text.encoder, build_scheduler().alphas_cumprod, 5.0)
    objective.eval()
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        straight, shuffled = (objective(a, tokens, b, times) for a, b in
                              ((latents, noise), (latents[:, :, order], noise[:, :, order])))  # fmt: skip
    assert abs(straight - shuffled) > 1e-4 * straight


def test_a_run_writes_a_generator_that_makes_clips(
    trained: Run, recipe: VideoDiffusionRecipe, image: StableDiffusionGenerator
) -> None:
    out, figures = trained
    assert figures["steps"] == 2 and 0 < figures["loss"] < 100 and (out / "clips.png").exists()
    one, other = (ZeroscopeGenerator.from_pretrained(out / "generator") for _ in range(2))
    captions = ["a red circle moving up, in the flat style", "a blue square spinning"]
    (a, b), (same, _) = (g.generate(g.encode_text(captions), seeds=[1, 2]) for g in (one, other))
    assert a == same and a != b and a.frames.shape == (4, 32, 32, 3) and a.fps == 8
    rows = [json.loads(line) for line in (out / "video_diffusion.jsonl").read_text().splitlines()]
    unet = build_unet(recipe, image)
    learns = sum(value.numel() for value in temporal_state(unet).values())
    assert rows[0]["pool"] == 22 and rows[1]["temporal"] == learns
    assert rows[1]["spatial"] == sum(p.numel() for p in image.unet.parameters())
    assert rows[-1]["step"] == 2 and not (out / "generator.partial").exists()


def test_clips_and_pictures_share_conditions_and_latents(trained: Run, trained_generator: Run) -> None:
    video, image = trained[0] / "generator", trained_generator[0] / "generator"
    for part in ("vae", "text_encoder"):
        for file in sorted((image / part).glob("*.safetensors")):
            assert (video / part / file.name).read_bytes() == file.read_bytes()
    one, other = ZeroscopeGenerator.from_pretrained(video), StableDiffusionGenerator.from_pretrained(image)
    condition = (part.encode_text(["a red circle"]).tensors[EMBEDS] for part in (one, other))
    assert torch.equal(*condition) and torch.equal(one.unconditional, other.unconditional)


def test_a_run_goes_on_from_another_ones_temporal_layers(
    recipe: VideoDiffusionRecipe, trained: Run, tmp_path: Path
) -> None:
    onwards = replace(recipe, start=str(trained[0] / "generator"), steps=1, checkpoint_minutes=0.0)
    train(onwards, tmp_path)
    before, after = (ZeroscopeGenerator.from_pretrained(folder / "generator").unet for folder in (trained[0], tmp_path))
    moved = before.down_blocks[0].temp_convs[0].conv1[-1].weight - after.down_blocks[0].temp_convs[0].conv1[-1].weight
    assert 0 < moved.abs().max().item() < 0.01
    rows = [json.loads(line) for line in (tmp_path / "video_diffusion.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "checkpoint" in row] == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": (0.5, 0.0, 0.4)}, r"mix: three shares that sum to 1 are wanted, not \[0.5, 0.0, 0.4\]"),
        ({"mix": (1.5, 0.0, -0.5)}, "mix: three shares that sum to 1"),
        ({"mix": (0.5, 0.5, 0.0)}, "a share of animated clips needs animations"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VideoDiffusionRecipe(icons="", generator="", **changes)


def test_a_recipe_survives_its_file(recipe: VideoDiffusionRecipe) -> None:
    assert VideoDiffusionRecipe.from_dict(recipe.to_dict()) == recipe
