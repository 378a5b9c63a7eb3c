"""Sounds and videos -> the clips that ImageBind's trunks take.

A sample is read in several clips of two seconds, spread evenly from its start to its end; the model averages them.

Source: the released ImageBind pipeline (arXiv:2305.05665, appendix A): filter banks as in Kaldi (hanning window,
HTK mel scale, no dither, no energy), resampling as in torchaudio, clips as in PyTorchVideo.
Differs: stereo is averaged to mono, the release reads the first channel.
Shapes: B batch, S clips, F frames of a clip, N samples of a sound, M mel bins, K spectrogram steps, H W pixels.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.encoders.imagebind_inputs import normalised
from anygen.errors import MediaError

SAMPLING_RATE = 16_000
CLIP_SECONDS = 2
SOUND_CLIPS = 3
VIDEO_CLIPS = 5
MEL_MEAN, MEL_STD = -4.268, 9.138
_WINDOW, _HOP = 400, 160  # samples: 25 and 10 ms
_PADDED = 512
_LOWEST = 20.0  # hertz


def sound_values(sounds: Sequence[Any], bins: int, steps: int) -> Tensor:
    """Sounds -> float[B, 3, 1, bins, steps].

    Args:
        sounds: each with `.mono` float32[N] in [-1, 1] and `.sampling_rate` in hertz.
        bins: M.
        steps: K, of 10 ms; clips are cut to it, or filled with zeros before they are normalised.

    Raises:
        MediaError: a sound is shorter than one window of 25 ms.
    """
    return torch.stack([_sound(torch.tensor(sound.mono), sound.sampling_rate, bins, steps) for sound in sounds])


def video_values(videos: Sequence[Any], size: int, frames: int, seconds: float = CLIP_SECONDS) -> Tensor:
    """Videos -> float[B, 15, 3, frames, size, size]: five clips, each cropped at both ends and in the middle.

    Args:
        videos: each with `.frames` uint8[F, H, W, 3] and `.fps`.
        size: height and width; the shorter side is resized to it (bilinear).
        frames: frames of a clip, from its first to its last.
        seconds: length of a clip.
    """
    return torch.stack([_video(torch.tensor(video.frames), video.fps, size, frames, seconds) for video in videos])


def clip_starts(seconds: float, clips: int, length: float = CLIP_SECONDS) -> list[float]:
    """When each clip starts; all at 0 if the sample is no longer than one clip."""
    last = max(seconds - length, 0.0)
    return [last * clip / max(clips - 1, 1) for clip in range(clips)]


def resample(wave: Tensor, source: int, target: int) -> Tensor:
    """Band-limited resampling: float[N] at `source` hertz -> float[ceil(N * target / source)] at `target`.

    A sinc of six zero crossings under a squared cosine, cutting at 99 % of the lower Nyquist frequency.
    """
    if source == target:
        return wave
    common = math.gcd(source, target)
    source, target = source // common, target // common
    cutoff = min(source, target) * 0.99
    width = math.ceil(6 * source / cutoff)
    offsets = torch.arange(-width, width + source, dtype=torch.float64)[None] / source
    phases = torch.arange(0, -target, -1, dtype=torch.float64)[:, None] / target
    times = ((offsets + phases) * cutoff).clamp(-6, 6)  # [target, taps]
    kernels = torch.sinc(times) * torch.cos(times * math.pi / 12).square() * cutoff / source
    padded = F.pad(wave, (width, width + source))[None, None]
    phased = F.conv1d(padded, kernels[:, None].to(wave.dtype), stride=source)  # [1, target, steps]
    return phased[0].T.flatten()[: math.ceil(len(wave) * target / source)]


def filter_banks(wave: Tensor, bins: int) -> Tensor:
    """Logarithmic mel energies: float[..., N] at 16 kHz -> float[..., K, bins], K = 1 + (N - 400) // 160."""
    windows = wave.unfold(-1, _WINDOW, _HOP)  # [..., K, 400]
    windows = windows - windows.mean(-1, keepdim=True)
    previous = torch.cat([windows[..., :1], windows[..., :-1]], dim=-1)
    hann = torch.hann_window(_WINDOW, periodic=False, dtype=wave.dtype, device=wave.device)
    windows = (windows - 0.97 * previous) * hann
    power = torch.fft.rfft(windows, n=_PADDED).abs().square()[..., :-1]  # Kaldi leaves the Nyquist bin out
    energies = power @ _mel_triangles(bins).to(wave).T
    return energies.clamp(min=torch.finfo(torch.float32).eps).log()


def _mel_triangles(bins: int) -> Tensor:
    lowest, highest = (1127 * math.log(1 + hertz / 700) for hertz in (_LOWEST, SAMPLING_RATE / 2))
    edges = torch.linspace(lowest, highest, bins + 2, dtype=torch.float64)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    hertz = torch.arange(_PADDED // 2, dtype=torch.float64) * SAMPLING_RATE / _PADDED
    mels = 1127 * (1 + hertz / 700).log()
    return torch.minimum((mels - left) / (centre - left), (right - mels) / (right - centre)).clamp(min=0)


def _sound(wave: Tensor, rate: int, bins: int, steps: int) -> Tensor:
    wave = resample(wave, rate, SAMPLING_RATE)
    if len(wave) < _WINDOW:
        raise MediaError(f"a sound of {1000 * len(wave) / SAMPLING_RATE:.0f} ms is too short, 25 ms are the least")
    planes: list[Tensor] = []
    for start in clip_starts(len(wave) / SAMPLING_RATE, SOUND_CLIPS):
        clip = wave[int(start * SAMPLING_RATE) : int((start + CLIP_SECONDS) * SAMPLING_RATE)]
        energies = filter_banks(clip - clip.mean(), bins)[:steps]
        planes.append(F.pad(energies.T, (0, steps - len(energies)))[None])  # [1, bins, steps]
    return (torch.stack(planes) - MEL_MEAN) / MEL_STD


def _video(frames: Tensor, fps: float, size: int, count: int, seconds: float) -> Tensor:
    clips: list[Tensor] = []
    for start in clip_starts(len(frames) / fps, VIDEO_CLIPS, seconds):
        # a frame belongs to the clip that its time lies in; 1e-6 takes up rounding
        last = min(math.ceil((start + seconds) * fps - 1e-6), len(frames)) - 1
        first = min(math.ceil(start * fps - 1e-6), last)
        picked = frames[torch.linspace(first, last, count).long()]
        pixels = picked.permute(0, 3, 1, 2).float() / 255  # [F, 3, H, W]
        height, width = pixels.shape[-2:]
        short = min(height, width)
        scaled = F.interpolate(pixels, (size * height // short, size * width // short), mode="bilinear")
        clips += [normalised(crop).transpose(0, 1) for crop in _three_crops(scaled, size)]
    return torch.stack(clips)


def _three_crops(pixels: Tensor, size: int) -> list[Tensor]:
    height, width = pixels.shape[-2:]
    middle = (math.ceil((height - size) / 2), math.ceil((width - size) / 2))
    ends = (
        ((0, middle[1]), (height - size, middle[1])) if height > width else ((middle[0], 0), (middle[0], width - size))
    )
    corners = (ends[0], middle, ends[1])
    return [pixels[..., top : top + size, left : left + size] for top, left in corners]
