"""Mel autoencoder, vocoder and sound diffusion: their objectives, and two steps of each run."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from anygen.errors import ConfigError
from anygen.generators.audioldm2 import EMBEDS, GENERATED, AudioLDM2Generator, SoundDefaults, text_mask
from anygen.generators.mel import LogMel
from anygen.training import sound_autoencoder, sound_diffusion, vocoder
from anygen.training.latent_diffusion import CaptionTokens, build_scheduler
from anygen.training.sound_autoencoder import SoundAutoencoderRecipe
from anygen.training.sound_captions import caption_corpus
from anygen.training.sound_diffusion import SoundDiffusionRecipe, SoundLatentPool, with_mask
from anygen.training.sound_mixing import SoundPool, SoundSource
from anygen.training.sounds import SoundBank
from anygen.training.vocoder import VocoderRecipe

VAE = SoundAutoencoderRecipe(sounds="", channels=(16, 16, 16), latent_channels=4, pool=8, batch_size=2, steps=2)
VOCODER = VocoderRecipe(sounds="", width=32, kernels=(3,), pool=8, frames=32, batch_size=2, steps=2)
DIFFUSION = SoundDiffusionRecipe(
    sounds="",
    vae="",
    vocoder="",
    channels=(16, 16, 16),
    text_width=16,
    text_layers=1,
    gpt_width=8,
    gpt_layers=1,
    vocab_size=400,
    pool=6,
    batch_size=2,
    steps=2,
    sampling=SoundDefaults(steps=1, guidance_scale=2.0, seconds=0.32),
)


@pytest.fixture(scope="module", autouse=True)
def few_measurements() -> Any:
    """Held-out clips are composed slowly on a CPU: four of them do here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (sound_autoencoder, vocoder):
            measure: Any = module.measure
            patch.setattr(
                module, "measure", lambda part, source, out, measure=measure: measure(part, source, out, count=4)
            )
        patch.setattr(sound_diffusion, "SHOWN", ("a flute playing a melody", "a dog"))
        yield


@pytest.fixture(scope="module")
def vae_run(sound_bank_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("sound-vae")
    return out, sound_autoencoder.train(replace(VAE, sounds=str(sound_bank_dir)), out)


@pytest.fixture(scope="module")
def vocoder_run(
    sound_bank_dir: Path, vae_run: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("vocoder")
    recipe = replace(
        VOCODER, sounds=str(sound_bank_dir), vae=str(vae_run[0] / "vae"), restored=0.5, adversarial_from=0.5
    )
    return out, vocoder.train(recipe, out)


@pytest.fixture(scope="module")
def recipe(sound_bank_dir: Path, vae_run: tuple[Path, Any], vocoder_run: tuple[Path, Any]) -> SoundDiffusionRecipe:
    return replace(
        DIFFUSION,
        sounds=str(sound_bank_dir),
        vae=str(vae_run[0] / "vae"),
        vocoder=str(vocoder_run[0] / "vocoder"),
    )


@pytest.fixture(scope="module")
def generator_run(
    recipe: SoundDiffusionRecipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("sound-diffusion")
    return out, sound_diffusion.train(recipe, out)


def weights(out: Path, part: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted((out / "generator" / part).glob("*.safetensors"))
    return {key: value for file in files for key, value in load_file(file).items()}


def test_the_autoencoder_s_objective_is_the_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    vae, mel, noise = sound_autoencoder.build(VAE), torch.randn(2, 1, 16, 8) - 6, torch.randn(2, 4, 4, 2)
    loss, absolute = sound_autoencoder._Objective(vae, kl_weight=0.5)(mel, noise)
    posterior = vae.encode(mel).latent_dist
    error = vae.decode(posterior.mean + posterior.std * noise).sample - mel
    torch.testing.assert_close(absolute, error.abs().mean())
    wanted = absolute + 0.2 * error.square().mean() + 0.5 * posterior.kl().mean() / (16 * 8)
    wanted = wanted + 0.3 * ((error[:, :, 1:] - error[:, :, :-1]).abs().mean() + error.diff(dim=3).abs().mean())
    torch.testing.assert_close(loss, wanted + 0.3 * F.avg_pool2d(error, 4).abs().mean())


def test_an_untrained_decoder_begins_at_the_mean_level() -> None:
    torch.manual_seed(0)
    made = sound_autoencoder.build(VAE).decode(torch.randn(1, 4, 8, 8)).sample
    assert abs(made.mean().item() - sound_autoencoder.MEAN) < 1


def test_spectral_convergence_is_that_of_magnitudes() -> None:
    mel = torch.tensor([[[1.0, 2.0]]])
    assert sound_autoencoder.convergence(mel, mel).item() == 0
    half = sound_autoencoder.convergence(mel + torch.tensor(0.5).log(), mel).item()
    assert half == pytest.approx(0.5, rel=1e-5)


def test_spectrograms_are_shown_with_high_tones_on_top() -> None:
    mel = torch.full((1, 5, 4), -11.5)
    mel[0, 4, 3] = 1.5  # the last frame, the highest bin
    picture = sound_autoencoder.as_pictures(mel)
    assert picture.shape == (1, 3, 4, 5) and picture[0, 0, 0, 4] == 1 and picture.sum() == 3


def test_an_autoencoder_run_writes_what_it_measured(vae_run: tuple[Path, dict[str, float]], bank: SoundBank) -> None:
    from diffusers import AutoencoderKL

    out, figures = vae_run
    vae: Any = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32)
    again = sound_autoencoder.measure(vae, SoundSource(bank, seed=1, held_out=True), None)
    assert again["error"] == pytest.approx(figures["error"], rel=1e-2)
    assert vae.config["scaling_factor"] == figures["scaling_factor"]
    rows = [json.loads(line) for line in (out / "sound-vae.jsonl").read_text().splitlines()]
    assert rows[0]["pool"] == 8 and rows[1]["step"] == 2 and rows[-1]["final"] and (out / "vae.png").exists()


def test_the_vocoder_makes_a_frame_s_samples_of_each_frame() -> None:
    voice = vocoder.build(VOCODER).eval()
    with torch.no_grad():
        made = voice(torch.randn(2, 10, 64))
    assert made.shape == (2, 1600) and made.abs().max() <= 1 and made.std() > 1e-4


def test_the_spectral_loss_is_zero_for_equal_sounds_and_sees_each_resolution() -> None:
    torch.manual_seed(0)
    real = torch.randn(2, 6000)
    assert vocoder.spectral_loss(real, real).item() == 0
    losses = []
    for window, hop in vocoder.RESOLUTIONS:
        got, wanted = (vocoder.magnitudes(sound, window, hop) for sound in (2 * real, real))
        torch.testing.assert_close(got, 2 * wanted, rtol=1e-3, atol=1e-3)
        losses.append(1.0 + torch.log(torch.tensor(2.0)).item())
    assert vocoder.spectral_loss(2 * real, real).item() == pytest.approx(sum(losses) / 3, rel=1e-2)


def test_discriminators_learn_to_tell_and_the_generator_s_losses_follow_them() -> None:
    torch.manual_seed(0)
    judges, real, made = vocoder.Judges(), torch.randn(2, 4096), torch.zeros(2, 4096)
    optimizer = torch.optim.Adam(judges.parameters(), lr=1e-3)
    before = judges.own_loss(made, real).item()
    for _ in range(12):
        optimizer.zero_grad()
        judges.own_loss(made, real).backward()
        optimizer.step()
    assert judges.own_loss(made, real).item() < before
    adversarial, matching = judges.losses(real, real)
    assert matching.item() == 0 and adversarial.item() < judges.losses(made, real)[0].item()


def test_a_share_is_read_back_from_the_autoencoder(vae_run: tuple[Path, Any]) -> None:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(vae_run[0] / "vae", torch_dtype=torch.float32)
    mel = torch.randn(4, 16, 64)
    out = vocoder.restored(vae, mel, 0.5)
    assert torch.equal(out[2:], mel[2:]) and not torch.allclose(out[:2], mel[:2])


def test_what_is_read_around_a_stretch_holds_it_and_no_more_than_a_margin() -> None:
    for begin in range(0, 193):
        first, last = vocoder.around(begin, 64, 256)
        assert first % 4 == last % 4 == 0 and 0 <= first <= begin and begin + 64 <= last <= 256
        assert last - first <= 64 + 2 * 32 + 6


def test_a_vocoder_goes_on_from_another(vocoder_run: tuple[Path, dict[str, float]]) -> None:
    start = str(vocoder_run[0] / "vocoder")
    there, fresh = vocoder.build(replace(VOCODER, start=start)), vocoder.build(VOCODER)
    state = load_file(Path(start) / "model.safetensors")
    assert all(torch.equal(value.half(), state[key]) for key, value in there.state_dict().items())
    assert not all(torch.equal(value.half(), state[key]) for key, value in fresh.state_dict().items())


def test_a_vocoder_run_writes_one_that_speaks(vocoder_run: tuple[Path, dict[str, float]]) -> None:
    from transformers import SpeechT5HifiGan

    out, figures = vocoder_run
    voice: Any = SpeechT5HifiGan.from_pretrained(out / "vocoder", dtype=torch.float32)
    assert voice(torch.zeros(1, 8, 64)).shape == (1, 1280) and figures["error"] > 0
    rows = [json.loads(line) for line in (out / "vocoder.jsonl").read_text().splitlines()]
    assert rows[1]["step"] == 2 and rows[1]["adversarial"] > 0 and (out / "vocoder.wav").exists()
    with pytest.raises(ConfigError, match="restored needs a vae"):
        VocoderRecipe(sounds="", restored=0.5)


def test_captions_are_tokenised_as_one_by_one(bank: SoundBank) -> None:
    text = sound_diffusion.build_text(DIFFUSION, bank)
    captions = [*caption_corpus(bank, seed=9, number=50), "", "a flute playing " * 12]
    ids = CaptionTokens(text)(captions)
    tokens = text.tokenize(captions)
    assert torch.equal(ids, tokens.ids)
    assert torch.equal(with_mask(ids, text.tokenizer.eos_token_id).mask, tokens.mask)


def test_the_diffusion_objective_is_the_weighted_velocity_loss(bank: SoundBank) -> None:
    from diffusers import DDPMScheduler

    from anygen.training.losses import snr_weights

    torch.manual_seed(0)
    text, scheduler = sound_diffusion.build_text(DIFFUSION, bank), build_scheduler()
    unet = sound_diffusion.build_unet(DIFFUSION, latent_channels=4)
    latents, noise, times = torch.randn(3, 4, 8, 4), torch.randn(3, 4, 8, 4), torch.tensor([3, 500, 990])
    tokens = text.tokenize(["a flute playing a melody", "", "a dog"])
    loss = sound_diffusion._Objective(unet, text, scheduler.alphas_cumprod, 5.0)(latents, tokens.ids, noise, times)
    reference: Any = DDPMScheduler.from_config(dict(scheduler.config), clip_sample=False)
    conditions = text(tokens)
    predicted = unet(
        reference.add_noise(latents, noise, times),
        times,
        encoder_hidden_states=conditions[GENERATED],
        encoder_hidden_states_1=conditions[EMBEDS],
        encoder_attention_mask_1=tokens.mask,
    ).sample
    squared = (predicted - reference.get_velocity(latents, noise, times)).square().mean((1, 2, 3))
    weight = snr_weights(scheduler.alphas_cumprod, times, 5.0, "v_prediction").clamp(min=0.1)
    torch.testing.assert_close(loss, (weight * squared).mean())


def test_unet_t5_projection_and_gpt2_all_learn(bank: SoundBank) -> None:

    torch.manual_seed(0)
    text = sound_diffusion.build_text(DIFFUSION, bank)
    unet = sound_diffusion.build_unet(DIFFUSION, latent_channels=4)
    objective = sound_diffusion._Objective(unet, text, build_scheduler().alphas_cumprod, 5.0, condition_noise=0.3)
    ids = text.tokenize(["a flute playing a melody", "a dog"]).ids
    objective(torch.randn(2, 4, 8, 4), ids, torch.randn(2, 4, 8, 4), torch.tensor([100, 900])).backward()
    learns = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    for part in ("text.sequence.shared", "text.projection.sos_embed_1", "text.language_model.transformer.h.0", "unet."):
        assert any(name.startswith(part) for name in learns), part


def test_the_pool_holds_the_source_s_clips_as_latents(bank: SoundBank, vae_run: tuple[Path, Any]) -> None:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(vae_run[0] / "vae", torch_dtype=torch.float32)
    text = sound_diffusion.build_text(DIFFUSION, bank)
    torch.manual_seed(0)
    pool = SoundLatentPool(DIFFUSION, SoundSource(bank, seed=4), vae, text)
    (batch,) = islice(SoundSource(bank, seed=4).batches(6), 1)
    with torch.no_grad():
        posterior = vae.encode(LogMel()(batch.waveforms)[:, None]).latent_dist
    z = (pool.latents.float() / vae.config.scaling_factor - posterior.mean) / posterior.std
    assert pool.latents.shape == (6, 4, 64, 16) and 0.8 < z.std() < 1.2 and z.mean().abs() < 0.2
    for row, sound in enumerate(batch.sounds):
        names = {sound.label, *(a for e in bank.effects if e.label == sound.label for a in e.aliases)}
        for caption in text.tokenizer.batch_decode(pool.tokens[row], skip_special_tokens=True):
            assert any(name in caption for name in names), caption
    assert (pool.draw(500, 1.0)[1] == pool.empty).all() and not (pool.draw(50, 0.0)[1] == pool.empty).all(1).any()


def test_a_diffusion_run_writes_a_generator_that_sounds(generator_run: tuple[Path, dict[str, float]]) -> None:
    out, figures = generator_run
    assert figures["steps"] == 2 and 0 < figures["loss"] < 100
    generator = AudioLDM2Generator.from_pretrained(out / "generator")
    assert generator.condition_spec.shapes == {GENERATED: (8, 8), EMBEDS: (24, 16)}
    condition = generator.encode_text(["a flute playing a melody", ""])
    assert text_mask(condition.tensors[EMBEDS]).sum(1).tolist()[1] == 2
    for name in (GENERATED, EMBEDS):
        torch.testing.assert_close(condition.tensors[name][1], generator.unconditional[name], rtol=0, atol=5e-3)
    one, other = generator.generate(condition, seeds=[1, 2])
    assert one.samples.shape == (1, 5120) and one != other
    files = {path.name for path in out.iterdir()}
    assert {"samples.png", "samples.wav", "generator", "sound-diffusion.jsonl"} <= files
    stored = {
        tensor.dtype for part in ("unet", "vae", "vocoder", "text_encoder_2") for tensor in weights(out, part).values()
    }
    assert stored == {torch.float16}


def test_a_frozen_text_side_is_written_as_it_was_read(
    recipe: SoundDiffusionRecipe, generator_run: tuple[Path, Any], tmp_path: Path
) -> None:
    before = generator_run[0]
    onwards = replace(
        recipe, start=str(before / "generator"), freeze_text=True, steps=1, learning_rate=0.3, condition_noise=0.2
    )
    sound_diffusion.train(replace(onwards, checkpoint_minutes=0.0), tmp_path)
    for part in ("text_encoder_2", "projection_model", "language_model"):
        old, new = weights(before, part), weights(tmp_path, part)
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    old, new = weights(before, "unet"), weights(tmp_path, "unet")
    assert old.keys() == new.keys() and not torch.equal(old["conv_out.weight"], new["conv_out.weight"])
    with pytest.raises(ConfigError, match="freeze_text needs a start"):
        replace(DIFFUSION, freeze_text=True)


def test_the_pool_of_clips_is_drawn_from_evenly(bank: SoundBank) -> None:
    pool = SoundPool(torch.arange(4, dtype=torch.int16)[:, None] * 1000)
    torch.manual_seed(0)
    counts = pool.draw(400)[:, 0].mul(32.767).round().long().bincount()
    assert len(counts) == 4 and counts.min() > 70
