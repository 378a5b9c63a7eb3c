"""The image generator's latents, objective and run."""

import json
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from anygen.errors import ConfigError
from anygen.generators.stable_diffusion import EMBEDS, SamplingDefaults, StableDiffusionGenerator
from anygen.training.captions import caption_corpus
from anygen.training.clip_pools import ClipFrames
from anygen.training.diffusion import (
    DiffusionRecipe,
    LatentPool,
    _Objective,
    build_parts,
    build_text,
    build_unet,
    train,
)
from anygen.training.icons import IconSet
from anygen.training.latent_diffusion import CaptionTokens, build_scheduler, disturbed
from anygen.training.losses import snr_weights
from anygen.training.pictures import PictureSource

TINY = DiffusionRecipe(
    icons="", vae="", channels=(32, 32, 32), text_width=32, text_layers=1, context=24, vocab_size=400, pool=8
)


@pytest.fixture(scope="module")
def vae(trained_vae: tuple[Path, dict[str, float]]) -> Any:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(trained_vae[0] / "vae", torch_dtype=torch.float32)
    vae.register_to_config(scaling_factor=0.5)  # untrained, it is near 1
    return vae


def test_the_schedule_ends_in_pure_noise() -> None:
    kept = build_scheduler().alphas_cumprod
    assert kept[0] > 0.999 and kept[-1] < 1e-6 and bool((kept.diff() < 0).all())


def test_the_objective_is_the_weighted_velocity_loss(icons: IconSet) -> None:
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    text, scheduler = build_text(TINY, icons), build_scheduler()
    unet = build_unet(TINY, latent_channels=4, side=4)
    latents, noise, times = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.tensor([3, 500, 990])
    tokens = text.tokenize(["a red circle", "", "two blue squares"])
    loss = _Objective(unet, text.encoder, scheduler.alphas_cumprod, min_snr=5.0)(latents, tokens, noise, times)
    reference: Any = DDPMScheduler.from_config(dict(scheduler.config), clip_sample=False)
    predicted = unet(reference.add_noise(latents, noise, times), times, encoder_hidden_states=text(tokens)).sample
    squared = (predicted - reference.get_velocity(latents, noise, times)).square().mean((1, 2, 3))
    weights = snr_weights(scheduler.alphas_cumprod, times, 5.0, "v_prediction").clamp(min=0.1)
    torch.testing.assert_close(loss, (weights * squared).mean())
    alike = _Objective(unet, text.encoder, scheduler.alphas_cumprod, min_snr=None)(latents, tokens, noise, times)
    torch.testing.assert_close(alike, squared.mean())


def test_a_text_encoder_is_held_to_what_captions_of_pictures_meant(icons: IconSet) -> None:
    torch.manual_seed(0)
    text, kept = build_text(TINY, icons), build_scheduler().alphas_cumprod
    unet, tokens = build_unet(TINY, latent_channels=4, side=4), text.tokenize(["a red circle", "a cat", "two squares"])
    arguments = torch.randn(3, 4, 4, 4), tokens, torch.randn(3, 4, 4, 4), torch.tensor([100, 500, 900])
    held = _Objective(unet, text.encoder, kept, None, keep=2.0, kept=2)
    free = _Objective(unet, text.encoder, kept, None)
    torch.testing.assert_close(held(*arguments), free(*arguments))  # nothing has moved yet
    before = text(tokens[:2])
    with torch.no_grad():
        words = text.encoder.get_input_embeddings().weight
        words.add_(0.1 * torch.randn_like(words))
    moved = (text(tokens[:2]) - before).square().mean() / before.var(0, correction=0).mean()
    torch.testing.assert_close(held(*arguments), free(*arguments) + 2 * moved)
    assert moved > 0 and held.given is not None and not any(p.requires_grad for p in held.given.parameters())


def test_frames_of_clips_stand_behind_the_pictures_of_a_batch(icons: IconSet, vae: Any) -> None:
    text, recipe = build_text(TINY, icons), replace(TINY, moving=6, frames=4, frame_share=0.25)
    pool = LatentPool(recipe, PictureSource(icons, seed=4), vae, text)
    torch.manual_seed(0)
    latents, tokens = pool.draw(8, 0.0)
    assert pool.frames is not None and latents.shape == (8, 4, 4, 4) and replace(recipe, batch_size=8).pictures == 6
    clips, captions = pool.frames.parts[0].latents.float(), pool.frames.parts[0].tokens
    for latent, said in zip(latents[6:], tokens[6:], strict=True):
        of = [n for n, clip in enumerate(clips) if (clip.transpose(0, 1) == latent).flatten(1).all(1).any()]
        assert of and any((said == captions[n]).all(1).any() for n in of)
    for latent in latents[:6]:
        assert (pool.latents.float() == latent).flatten(1).all(1).any()


def test_early_frames_come_more_often_than_late_ones(icons: IconSet, vae: Any) -> None:
    recipe = replace(TINY, moving=1, frames=4, frame_share=0.5)
    frames = ClipFrames(recipe, icons, vae, build_text(TINY, icons), torch.device("cpu"))
    clip = frames.parts[0].latents[0].float().transpose(0, 1)  # [F, c, h, w]
    torch.manual_seed(0)
    latents, _ = frames.draw(400)
    counts = [int((latents == frame).flatten(1).all(1).sum()) for frame in clip]
    assert sum(counts) == 400 and counts == sorted(counts, reverse=True) and 170 < counts[0] < 230  # half, of sqrt(1/4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_text": 1.0}, "keep_text needs a start"),
        ({"frame_share": 0.5}, "a share below 1 needs moving or animated clips"),
        ({"moving": 4}, "they need a share"),
        ({"animated": 4, "frame_share": 0.5}, "animated: needs animations"),
    ],
)
def test_clips_and_what_is_kept_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **options)


def test_the_pool_holds_the_source_s_pictures_as_latents(icons: IconSet, vae: Any) -> None:
    text = build_text(TINY, icons)
    torch.manual_seed(0)
    pool = LatentPool(TINY, PictureSource(icons, seed=4), vae, text)
    (batch,) = islice(PictureSource(icons, seed=4).batches(8), 1)
    posterior = vae.encode(batch.pixels * 2 - 1).latent_dist
    z = (pool.latents.float() / vae.config.scaling_factor - posterior.mean) / posterior.std
    assert pool.latents.shape == (8, 4, 4, 4) and 0.8 < z.std() < 1.2 and z.mean().abs() < 0.2


def test_pool_captions_name_what_the_pictures_show(icons: IconSet, vae: Any) -> None:
    text = build_text(TINY, icons)
    pool = LatentPool(TINY, PictureSource(icons, seed=4), vae, text)
    (batch,) = islice(PictureSource(icons, seed=4).batches(8), 1)
    for row, icon in enumerate(batch.icons):
        concept = icons.concepts[int(icons.concept[icon])]
        for caption in text.tokenizer.batch_decode(pool.tokens[row], skip_special_tokens=True):
            assert any(name in caption for name in (concept.label, *concept.aliases)), caption


def test_dropout_empties_that_share_of_captions(icons: IconSet, vae: Any) -> None:
    pool = LatentPool(TINY, PictureSource(icons, seed=4), vae, build_text(TINY, icons))
    torch.manual_seed(0)
    for dropout, low, high in ((0.0, 0.0, 0.0), (0.25, 0.2, 0.3), (1.0, 1.0, 1.0)):
        empty = (pool.draw(1000, dropout)[1] == pool.empty).all(1).float().mean().item()
        assert low <= empty <= high


def test_a_run_writes_a_generator_that_draws(trained_generator: tuple[Path, dict[str, float]]) -> None:
    out, figures = trained_generator
    assert figures["steps"] == 2 and 0 < figures["loss"] < 100
    one, other = (StableDiffusionGenerator.from_pretrained(out / "generator") for _ in range(2))
    assert one.size == (32, 32) and one.condition_spec.shapes == {EMBEDS: (24, 32)}
    assert (one.defaults.steps, one.defaults.guidance_scale) == (2, 2.0)
    captions = ["a red circle, in the flat style", "two blue squares"]
    (a, b), (same, _) = (g.generate(g.encode_text(captions), seeds=[1, 2]) for g in (one, other))
    assert a == same and a != b and a.size == (32, 32)
    torch.testing.assert_close(one.encode_text([""]).tensors[EMBEDS][0], one.unconditional, rtol=0, atol=2e-3)


def test_a_run_stores_half_precision_and_its_log(trained_generator: tuple[Path, dict[str, float]]) -> None:
    from safetensors.torch import load_file

    out, _ = trained_generator
    for part in ("unet", "vae", "text_encoder"):
        for file in (out / "generator" / part).glob("*.safetensors"):
            assert {tensor.dtype for tensor in load_file(file).values()} <= {torch.float16, torch.int64}
    rows = [json.loads(line) for line in (out / "diffusion.jsonl").read_text().splitlines()]
    assert rows[0]["pool"] == 32 and rows[1]["unet"] > 0 and rows[-1]["step"] == 2
    assert (out / "samples.png").exists()


def test_the_text_encoder_and_the_unet_both_learn(icons: IconSet) -> None:
    text, scheduler = build_text(TINY, icons), build_scheduler()
    unet = build_unet(TINY, latent_channels=4, side=4)
    objective = _Objective(unet, text.encoder, scheduler.alphas_cumprod, min_snr=5.0)
    tokens = text.tokenize([random.Random(0).choice(icons.concepts).label] * 2)
    objective(torch.randn(2, 4, 4, 4), tokens, torch.randn(2, 4, 4, 4), torch.tensor([100, 900])).backward()
    learns = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any(name.startswith("text.") and "token_embedding" in name for name in learns)
    assert any(name.startswith("unet.down_blocks.0.attentions") for name in learns)


def test_captions_are_tokenised_as_one_by_one(icons: IconSet) -> None:
    text = build_text(TINY, icons)
    captions = [*caption_corpus(icons.concepts, seed=9, per_concept=3), "", "a red circle " * 20]
    assert torch.equal(CaptionTokens(text)(captions), text.tokenize(captions))


def test_a_pool_of_any_size_is_whole(icons: IconSet, vae: Any) -> None:
    pool = LatentPool(replace(TINY, pool=515), PictureSource(icons, seed=4), vae, build_text(TINY, icons))
    assert pool.latents.shape == (515, 4, 4, 4) and pool.tokens.shape == (515, 2, 24)


def test_noise_on_the_condition_has_the_stated_size_and_is_half_shared() -> None:
    torch.manual_seed(0)
    embeds = torch.randn(4000, 3, 2) * torch.tensor([1.0, 5.0]) + 7
    embeds[:, 0] = 3.0  # a position at which all captions agree
    noise = disturbed(embeds, 0.6) - embeds
    assert bool((noise[:, 0] == 0).all())
    # A level uniform in [0, m] has the mean square m² / 3.
    wanted = 0.6 / 3**0.5 * embeds[:, 1:].std(0)
    torch.testing.assert_close(noise[:, 1:].std(0), wanted, rtol=0.06, atol=0)
    one, other = noise[:, 1, 0], noise[:, 2, 0]
    assert ((one * other).mean() / (one.std() * other.std())).item() == pytest.approx(0.5, abs=0.06)


def test_noise_on_the_condition_is_only_in_the_objective_that_asks_for_it(icons: IconSet) -> None:
    torch.manual_seed(0)
    text, kept = build_text(TINY, icons), build_scheduler().alphas_cumprod
    unet = build_unet(TINY, latent_channels=4, side=4)
    tokens = text.tokenize(["a red circle", "two blue squares"])
    arguments = torch.randn(2, 4, 4, 4), tokens, torch.randn(2, 4, 4, 4), torch.tensor([100, 900])
    losses = [_Objective(unet, text.encoder, kept, 5.0, noise)(*arguments).item() for noise in (0.0, 0.0, 1.0, 1.0)]
    assert losses[0] == losses[1] and len(set(losses)) == 3


@pytest.fixture
def onwards(
    icons_dir: Path, trained_vae: tuple[Path, dict[str, float]], trained_generator: tuple[Path, dict[str, float]]
) -> DiffusionRecipe:
    """One step on from the trained generator; the sizes in the recipe are not its own."""
    return DiffusionRecipe(
        icons=str(icons_dir),
        vae=str(trained_vae[0] / "vae"),
        start=str(trained_generator[0] / "generator"),
        pool=8,
        batch_size=4,
        steps=1,
        learning_rate=0.3,  # of which the warm-up leaves 0.001
        sampling=SamplingDefaults(steps=1),
    )


def test_a_run_learns_from_frames_and_says_how_far_the_text_moved(onwards: DiffusionRecipe, tmp_path: Path) -> None:
    train(replace(onwards, keep_text=0.5, moving=4, frames=4, frame_share=0.5), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "diffusion.jsonl").read_text().splitlines()]
    (moved,) = [row["text_moved"] for row in rows if "text_moved" in row]
    assert 0 < moved < 1


def weights(out: Path, part: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted((out / "generator" / part).glob("*.safetensors"))
    return {key: value for file in files for key, value in load_file(file).items()}


def test_a_frozen_text_encoder_is_written_as_it_was_read(
    onwards: DiffusionRecipe, trained_generator: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    before = trained_generator[0]
    train(replace(onwards, freeze_text=True, condition_noise=0.3), tmp_path)
    text, same = (weights(out, "text_encoder") for out in (before, tmp_path))
    assert text.keys() == same.keys() and all(torch.equal(text[key], same[key]) for key in text)
    old, new = (weights(out, "unet") for out in (before, tmp_path))
    moved = [key for key in old if not torch.equal(old[key], new[key])]
    assert old.keys() == new.keys() and "conv_out.weight" in moved
    one, other = (StableDiffusionGenerator.from_pretrained(out / "generator") for out in (before, tmp_path))
    captions = ["a red circle, in the flat style", "two blue squares"]
    assert torch.equal(one.encode_text(captions).tensors[EMBEDS], other.encode_text(captions).tensors[EMBEDS])


def test_a_run_that_goes_on_trains_both_from_where_they_were(
    onwards: DiffusionRecipe, trained_generator: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    train(replace(onwards, decay=False), tmp_path)
    for part in ("unet", "text_encoder"):
        old, new = (weights(out, part) for out in (trained_generator[0], tmp_path))
        steps = [
            (new[key].float() - old[key].float()).abs().max().item() for key in old if old[key].is_floating_point()
        ]
        assert len(old) == len(new) and 0 < max(steps) < 0.01


def test_the_start_s_latents_must_be_the_autoencoder_s(onwards: DiffusionRecipe, icons: IconSet) -> None:
    from diffusers import AutoencoderKL

    with pytest.raises(ConfigError, match="draws 4 latent channels, the autoencoder has 6"):
        build_parts(onwards, icons, AutoencoderKL(latent_channels=6))


def test_only_a_trained_text_encoder_can_be_frozen() -> None:
    with pytest.raises(ConfigError, match="freeze_text needs a start"):
        DiffusionRecipe(icons="", vae="", freeze_text=True)


def test_checkpoints_do_not_disturb_the_run(onwards: DiffusionRecipe, tmp_path: Path) -> None:
    for name, minutes in (("plain", None), ("kept", 0.0)):
        train(replace(onwards, steps=2, checkpoint_minutes=minutes), tmp_path / name)
    for part in ("unet", "text_encoder"):
        plain, kept = (weights(tmp_path / name, part) for name in ("plain", "kept"))
        assert all(torch.equal(plain[key], kept[key]) for key in plain)
    rows = [json.loads(line) for line in (tmp_path / "kept" / "diffusion.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "checkpoint" in row] == [1, 2]
    assert not (tmp_path / "kept" / "generator.partial").exists()
