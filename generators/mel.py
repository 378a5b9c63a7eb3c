"""What AudioLDM2 and its vocoder take a sound for: a log-mel spectrogram. And the loudness at which sounds are kept.

Source: AudioLDM 2 (Liu et al. 2023, arXiv:2308.05734) and HiFi-GAN (Kong et al. 2020, arXiv:2010.05646): magnitudes of
a centred Hann-window STFT, Slaney mel filters, natural logarithm of at least 1e-5. The gate of the loudness follows
ITU-R BS.1770 in idea, without its frequency weighting. `refined` is the alternating projection of Griffin & Lim 1984
(IEEE TASSP 32(2)), with mel magnitudes in place of linear ones and a vocoder's phases in place of random ones.

Shapes: B batch, N samples, T = N / hop frames, F mel bins.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anygen.config import Config

LOUDNESS = -20.0
"""Of a finished sound, in dB relative to full scale, where its peaks allow it."""
PEAK = 0.95
"""Largest magnitude of a finished sound."""
_MOST_GAIN = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MelConfig(Config):
    """How a spectrogram is taken; AudioLDM2's own values."""

    sampling_rate: int = 16_000
    bins: int = 64
    hop: int = 160
    """Samples from frame to frame."""
    window: int = 1024
    """Samples of the window and of the transform."""
    floor: float = 1e-5
    """Least magnitude; its logarithm is what silence looks like."""


class LogMel(nn.Module):
    """Waveforms -> log-mel spectrograms, in float32."""

    def __init__(self, config: MelConfig | None = None) -> None:
        """Builds the filters; nothing is trained."""
        from transformers.audio_utils import mel_filter_bank

        super().__init__()
        self.config = config = config or MelConfig()
        filters = mel_filter_bank(
            num_frequency_bins=config.window // 2 + 1,
            num_mel_filters=config.bins,
            min_frequency=0.0,
            max_frequency=config.sampling_rate / 2,
            sampling_rate=config.sampling_rate,
            norm="slaney",
            mel_scale="slaney",
        )
        self.filters: Tensor
        self.hann: Tensor
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)
        self.register_buffer("hann", torch.hann_window(config.window), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """float[B, N] -> float32[B, N // hop, F]. The frame that would stand behind the last sample is left out."""
        hop, window = self.config.hop, self.config.window
        with torch.autocast(waveform.device.type, enabled=False):
            waves = torch.stft(waveform.float(), window, hop, window=self.hann, return_complex=True)
            # The square root of an exact 0 has no gradient.
            magnitude = torch.view_as_real(waves).square().sum(-1).clamp(min=1e-12).sqrt()  # [B, window / 2 + 1, T + 1]
            mel = magnitude[..., : waveform.shape[-1] // hop].transpose(1, 2) @ self.filters
            return mel.clamp(min=self.config.floor).log()


_MOST_CORRECTION = 6.0
"""Of one round, in nepers."""


def refined(waveform: Tensor, mel: Tensor, log_mel: LogMel, rounds: int) -> Tensor:
    """Brings a waveform's spectrogram closer to the one that it was made from: float[B, N] -> float32[B, N].

    A small vocoder gets the course of a sound right and its levels only roughly: noise between the partials, pauses
    that are not silent. Each round filters every frame by how far its mel bins are off, and keeps the phases. A
    waveform that has the spectrogram already comes back as it was.

    Args:
        waveform: N = T * hop samples.
        mel: float[B, T, F], logarithms as `log_mel` gives them; what lies below its floor counts as the floor.
        log_mel: the transform, on the waveform's device.
        rounds: 0 changes nothing.
    """
    hop, window = log_mel.config.hop, log_mel.config.window
    wanted = mel.float().clamp(min=math.log(log_mel.config.floor))
    shares = log_mel.filters.T / log_mel.filters.sum(1).clamp(min=1e-9)  # [F, window / 2 + 1], of each bin 1 in all
    waveform = waveform.float()
    for _ in range(rounds):
        gain = (wanted - log_mel(waveform)).clamp(-_MOST_CORRECTION, _MOST_CORRECTION) @ shares
        gain = torch.cat([gain, gain[:, -1:]], 1).transpose(1, 2).exp()  # the frame that `LogMel` leaves out
        waves = torch.stft(waveform, window, hop, window=log_mel.hann, return_complex=True)
        waveform = torch.istft(waves * gain, window, hop, window=log_mel.hann, length=waveform.shape[-1])
    return waveform


def levelled(waveform: Tensor, sampling_rate: int) -> Tensor:
    """Brings sounds to one loudness without clipping: float[B, N] -> float32[B, N], peaks at most `PEAK`.

    Loudness is the mean power over blocks of 0.1 s, those left out that are 20 dB or more below the loudest, so that
    the silence after a note does not count. What is all but silent stays quiet: the gain is at most 40 dB.
    """
    waveform = waveform.float()
    block = max(1, min(sampling_rate // 10, waveform.shape[-1]))
    power = waveform.unfold(-1, block, block).square().mean(-1)  # [B, blocks]
    heard = power > power.amax(-1, keepdim=True) / 100
    loudness = ((power * heard).sum(-1) / heard.sum(-1).clamp(min=1)).sqrt()
    peak = waveform.abs().amax(-1)
    wanted = 10 ** (LOUDNESS / 20) / loudness.clamp(min=1e-9)
    gain = torch.minimum(wanted.clamp(max=_MOST_GAIN), PEAK / peak.clamp(min=1e-9))
    return waveform * gain[:, None]


def faded(waveform: Tensor, sampling_rate: int, seconds: float = 0.005) -> Tensor:
    """Fades both ends in and out, so that a cut does not click: float[B, N] -> float[B, N]."""
    count = min(round(seconds * sampling_rate), waveform.shape[-1] // 2)
    if count == 0:
        return waveform
    ramp = torch.linspace(0, 1, count, device=waveform.device, dtype=waveform.dtype)
    envelope = torch.ones(waveform.shape[-1], device=waveform.device, dtype=waveform.dtype)
    envelope[:count], envelope[-count:] = ramp, ramp.flip(0)
    return waveform * envelope
