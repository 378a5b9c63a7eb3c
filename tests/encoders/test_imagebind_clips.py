"""What ImageBind's trunks are given for sounds and videos."""

import math

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from anygen.encoders.imagebind_clips import (
    MEL_MEAN,
    MEL_STD,
    clip_starts,
    filter_banks,
    resample,
    sound_values,
    video_values,
)
from anygen.encoders.imagebind_inputs import normalised
from anygen.errors import MediaError
from anygen.media import Audio, Video


def noise(samples: int) -> torch.Tensor:
    return torch.rand(samples, generator=torch.Generator().manual_seed(0)) * 2 - 1


def sine(hertz: float, rate: int, seconds: float = 1.0) -> torch.Tensor:
    return torch.sin(torch.arange(int(rate * seconds)) * (2 * math.pi * hertz / rate))


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_filter_banks_equal_transformers_kaldi_spectrogram() -> None:
    wave = noise(4000).double()  # in float32 the emptiest bins differ by 1e-3
    filters = mel_filter_bank(
        num_frequency_bins=257,
        num_mel_filters=128,
        min_frequency=20,
        max_frequency=8000,
        sampling_rate=16000,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    expected = spectrogram(
        wave.numpy(),
        window_function(400, "hann", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        log_mel="log",
        mel_floor=1.192092955078125e-07,
        remove_dc_offset=True,
    )
    assert expected is not None
    torch.testing.assert_close(filter_banks(wave, 128), torch.tensor(expected.T).double(), rtol=0, atol=1e-5)


def test_filter_banks_equal_torchaudio() -> None:
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi", reason="torchaudio is the published pipeline's own")
    wave = noise(4000)
    settings = {"htk_compat": True, "window_type": "hanning", "num_mel_bins": 128, "dither": 0.0}
    expected = kaldi.fbank(wave[None], sample_frequency=16000, use_energy=False, **settings)
    torch.testing.assert_close(filter_banks(wave, 128), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("hertz", [400.0, 1000.0, 5000.0])
def test_a_tone_sounds_in_its_own_bin(hertz: float) -> None:
    lowest, highest = (1127 * math.log(1 + edge / 700) for edge in (20, 8000))
    centre = (1127 * math.log(1 + hertz / 700) - lowest) / (highest - lowest) * 129 - 1
    loudest = filter_banks(sine(hertz, 16000), 128).mean(0).argmax()
    assert abs(loudest.item() - centre) <= 1


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_a_resampled_tone_is_the_tone_at_the_new_rate(rate: int) -> None:
    resampled = resample(sine(440, rate), rate, 16000)
    assert len(resampled) == 16000
    torch.testing.assert_close(resampled[200:-200], sine(440, 16000)[200:-200], rtol=0, atol=2e-3)


def test_what_the_new_rate_cannot_carry_is_filtered_out() -> None:
    assert resample(sine(10000, 48000), 48000, 16000)[200:-200].abs().max() < 0.01
    assert resample(sine(6000, 48000), 48000, 16000)[200:-200].abs().max() > 0.95


def test_clips_are_spread_from_start_to_end() -> None:
    assert clip_starts(10.0, 3) == [0.0, 4.0, 8.0]
    assert clip_starts(1.5, 3) == [0.0, 0.0, 0.0]
    assert clip_starts(10.0, 1) == [0.0]
    assert clip_starts(2.0, 4, length=0.5) == [0.0, 0.5, 1.0, 1.5]


def test_a_sound_is_read_at_its_start_middle_and_end() -> None:
    wave = noise(16000 * 6) * torch.linspace(0.1, 1, 16000 * 6)
    values = sound_values([Audio(wave.numpy(), 16000)], 128, 204)
    assert values.shape == (1, 3, 1, 128, 204)
    for clip, start in enumerate([0, 32000, 64000]):
        part = wave[start : start + 32000]
        expected = (filter_banks(part - part.mean(), 128).T - MEL_MEAN) / MEL_STD  # 198 steps
        torch.testing.assert_close(values[0, clip, 0, :, :198], expected)
    # the rest is filled with zeros before the normalisation
    torch.testing.assert_close(values[..., 198:], torch.full((1, 3, 1, 128, 6), -MEL_MEAN / MEL_STD))


def test_a_longer_spectrogram_is_cut_and_stereo_averaged() -> None:
    left, right = noise(16000), sine(300, 16000)
    stereo = sound_values([Audio(torch.stack([left, right]).numpy(), 16000)], 16, 20)
    mono = sound_values([Audio(((left + right) / 2).numpy(), 16000)], 16, 20)
    assert stereo.shape == (1, 3, 1, 16, 20)
    torch.testing.assert_close(stereo, mono)


@pytest.mark.parametrize("rate", [8000, 48_000, 96_000])
def test_a_tone_looks_the_same_whatever_rate_it_comes_in(rate: int) -> None:
    wanted, values = (
        sound_values([Audio(sine(1000, hertz).numpy(), hertz)], 32, 98)[..., 2:-2] for hertz in (16_000, rate)
    )
    heard = wanted > wanted.amax() - 0.5  # the bins around the tone; the others hold rounding
    torch.testing.assert_close(values[heard], wanted[heard], atol=0.02, rtol=0)


def test_eight_channels_are_averaged() -> None:
    channels = torch.stack([noise(8000) * (place + 1) / 10 for place in range(8)])
    surround = sound_values([Audio(channels.numpy(), 16_000)], 16, 20)
    torch.testing.assert_close(surround, sound_values([Audio(channels.mean(0).numpy(), 16_000)], 16, 20))


def test_silence_is_finite_and_lies_on_the_floor() -> None:
    values = sound_values([Audio(np.zeros(8000, np.float32), 16_000)], 16, 20)
    floor = (math.log(torch.finfo(torch.float32).eps) - MEL_MEAN) / MEL_STD
    torch.testing.assert_close(values, torch.full_like(values, floor))


def test_a_long_sound_takes_no_more_room_than_a_short_one() -> None:
    assert sound_values([Audio(np.zeros(16_000 * 120, np.float32), 16_000)], 16, 20).shape == (1, 3, 1, 16, 20)


def test_a_sound_that_is_too_short_is_refused() -> None:
    with pytest.raises(MediaError, match="a sound of 10 ms is too short, 25 ms are the least"):
        sound_values([Audio(np.zeros(160, dtype=np.float32), 16000)], 128, 204)


def test_a_video_is_cropped_at_both_ends_and_in_the_middle() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (60, 8, 15, 3), dtype=np.uint8)
    values = video_values([Video(frames, 6.0)], size=8, frames=2)
    assert values.shape == (1, 15, 3, 2, 8, 8)
    pixels = normalised(torch.tensor(frames).permute(0, 3, 1, 2) / 255).transpose(0, 1)  # [3, F, 8, 15]
    # 10 s at 6 frames/s: clips start every 2 s and hold 12 frames, of which the first and last are taken
    for clip in range(5):
        for crop, left in enumerate([0, 4, 7]):
            expected = pixels[:, [12 * clip, 12 * clip + 11], :, left : left + 8]
            torch.testing.assert_close(values[0, 3 * clip + crop], expected)


def test_a_tall_video_is_cropped_at_top_and_bottom() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 4, 3), dtype=np.uint8)
    across = np.ascontiguousarray(frames.swapaxes(1, 2))
    tall, wide = (video_values([Video(clip, 1.0)], size=4, frames=2) for clip in (frames, across))
    torch.testing.assert_close(tall, wide.transpose(-1, -2))


@pytest.mark.parametrize(("count", "fps"), [(1, 25.0), (1, 0.1), (3, 0.2), (7, 1.0)])
def test_short_and_slow_videos_repeat_frames(count: int, fps: float) -> None:
    frames = np.full((count, 4, 4, 3), 255, dtype=np.uint8)
    values = video_values([Video(frames, fps)], size=4, frames=2)
    torch.testing.assert_close(values, normalised(torch.ones(3, 4, 4))[:, None].expand(1, 15, 3, 2, 4, 4))
