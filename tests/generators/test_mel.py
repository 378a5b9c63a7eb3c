import numpy as np
import pytest
import torch

from anygen.generators.mel import LOUDNESS, PEAK, LogMel, MelConfig, faded, levelled, refined


def test_spectrograms_equal_the_reference() -> None:
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    waveform = np.random.default_rng(0).normal(0, 0.1, 4000)
    filters = mel_filter_bank(513, 64, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    wanted = spectrogram(
        waveform, window_function(1024), 1024, 160, power=1.0, mel_filters=filters, log_mel="log", mel_floor=1e-5
    )
    ours = LogMel()(torch.from_numpy(waveform)[None])
    assert ours.shape == (1, 25, 64)
    torch.testing.assert_close(ours[0], torch.from_numpy(wanted.T[:25]).float(), atol=2e-4, rtol=0)


def test_a_tone_lies_in_the_bin_of_its_frequency_and_silence_on_the_floor() -> None:
    log_mel = LogMel(MelConfig(sampling_rate=8000, bins=20, hop=80, window=256))
    time = torch.arange(8000) / 8000
    bins = [
        int(log_mel(torch.sin(2 * torch.pi * pitch * time)[None])[0].mean(0).argmax()) for pitch in (300, 900, 2700)
    ]
    assert bins == sorted(set(bins))
    torch.testing.assert_close(log_mel(torch.zeros(1, 800)), torch.full((1, 10, 20), 1e-5).log())


def test_silence_has_a_gradient() -> None:
    waveform = torch.zeros(1, 1600, requires_grad=True)
    LogMel()(waveform).sum().backward()
    assert waveform.grad is not None and bool(waveform.grad.isfinite().all())


@pytest.mark.parametrize("gain", [0.001, 0.1, 1.0])
def test_levelled_sounds_are_equally_loud_whatever_their_gain_and_the_silence_around(gain: float) -> None:
    tone = torch.sin(torch.arange(16000) * 0.3)
    alone, followed = (
        levelled(gain * sound[None], 16000)[0, :16000] for sound in (tone, torch.cat([tone, torch.zeros(32000)]))
    )
    torch.testing.assert_close(alone, followed)
    loudness = 10 * torch.log10(alone.square().mean()).item()
    assert loudness == pytest.approx(LOUDNESS if gain > 0.001 else -23.0, abs=0.1)  # the gain is at most 40 dB


def test_levelled_sounds_do_not_clip_and_silence_stays_silent() -> None:
    click = torch.zeros(2, 16000)
    click[0, 5000] = 3.0
    out = levelled(click, 16000)
    assert out[0].abs().max().item() == pytest.approx(PEAK) and not out[1].any()


def test_fades_touch_the_ends_alone() -> None:
    out = faded(torch.ones(1, 16000), 16000)
    assert out[0, 0] == 0 and out[0, -1] == 0 and bool((out[0, 80:-80] == 1).all())
    assert bool((out[0, :80].diff() > 0).all())


def chords(count: int = 3, seconds: float = 0.8) -> torch.Tensor:
    """Chords of a few partials that die away, float[B, N]."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(round(seconds * 16_000)) / 16_000
    tones = torch.rand(count, 6, 1, generator=generator) * 2000 + 150
    return ((2 * torch.pi * tones * time).sin().sum(1) * torch.exp(-3 * time) * 0.05).float()


def test_refinement_brings_the_spectrogram_of_a_noisy_copy_to_that_of_the_sound() -> None:
    log_mel, clean = LogMel(), chords()
    mel = log_mel(clean)
    noisy = 0.5 * clean + 0.01 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    errors = [(log_mel(refined(noisy, mel, log_mel, rounds)) - mel).abs().mean().item() for rounds in (0, 1, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 and errors[-1] < 0.25  # nepers: from over 17 dB to 2 dB


def test_refinement_leaves_a_sound_alone_that_has_its_spectrogram() -> None:
    log_mel, clean = LogMel(), chords()
    torch.testing.assert_close(refined(clean, log_mel(clean), log_mel, 3), clean, atol=1e-5, rtol=0)
    noise = torch.randn(2, 1600)
    assert torch.equal(refined(noise, log_mel(chords(2, 0.1)), log_mel, 0), noise)


def test_what_lies_below_the_floor_counts_as_silence_in_refinement() -> None:
    log_mel, noise = LogMel(), 0.01 * torch.randn(1, 1600, generator=torch.Generator().manual_seed(0))
    silence = torch.full((1, 10, 64), -40.0)
    deep, floor = (refined(noise, mel, log_mel, 4) for mel in (silence, log_mel(torch.zeros(1, 1600))))
    torch.testing.assert_close(deep, floor)
    assert deep.abs().max() < 1e-3
