"""What a sound is: which instrument or effect it is most like, how fast its notes come, and whether they rise or fall.

Everything is signal analysis on spectrograms. How often it is right on true sounds of the bank, which bounds what a
generator can reach, is reported beside every figure (`evaluation_media`).

Shapes: B sounds, N samples, T frames, F mel bins, D statistics, L labels, K bins of pitch,
R references.
"""

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.generators.mel import LogMel, MelConfig
from anygen.training.sound_captions import Sound, Tempo, is_held_out, random_beat, random_music
from anygen.training.sound_mixing import SAMPLES, SoundSource
from anygen.training.sound_packages import RATE
from anygen.training.sounds import SoundBank

TAKES = 32
"""References of each instrument; of each effect and each drum there are a third of it."""
_RIDGE, _AXES = 0.1, 32
Direction = Literal["rising", "falling", "repeated"]

SPLITS: dict[bool, tuple[float, float]] = {False: (0.204, 0.398), True: (0.143, 0.228)}
"""Seconds from note to note: shorter than the first is fast, longer than the second slow. True: of a drum kit.

Half way, as ratios, between those that training plays (`sound_mixing.INTERVALS`)."""


def clipped(waveform: Tensor, samples: int = SAMPLES) -> Tensor:
    """float[N] at 16 kHz, cut or filled with silence: float[samples]."""
    return F.pad(waveform[:samples], (0, max(0, samples - len(waveform))))


# --- which sound ---------------------------------------------------------------------------------------------


def statistics(waveforms: Tensor) -> Tensor:
    """Log-mel statistics over the frames that are heard (within 40 dB of the loudest): float[B, N] -> float[B, D].

    Mean and deviation of every bin and of 20 cepstral coefficients, mean rise and fall of every bin from frame to
    frame, and how much of the time anything is heard.
    """
    log_mel = LogMel().to(waveforms.device)
    angles = math.pi / 64 * (torch.arange(64)[:, None] + 0.5) * torch.arange(20)
    cosines = angles.cos().to(waveforms.device) / 8
    parts = []
    for batch in waveforms.split(256):
        mel = log_mel(batch).clamp(min=-9)  # [B, T, F]
        power = mel.exp().square().sum(2, keepdim=True)
        heard = (power > power.amax(1, keepdim=True) * 1e-4).float()  # [B, T, 1]
        count = heard.sum(1).clamp(min=2)
        change = mel.diff(dim=1) * heard[:, 1:]
        found = [change.clamp(min=0).sum(1) / count, (-change).clamp(min=0).sum(1) / count, 3 * heard.mean(1)]
        for values in (mel, mel @ cosines):
            mean = (values * heard).sum(1) / count
            found += [mean, ((values - mean[:, None]).square() * heard).sum(1).div(count).sqrt()]
        parts.append(torch.cat(found, 1))
    return torch.cat(parts)


class NearestSound:
    """Tells which sound of a bank a waveform is most like, by log-mel statistics.

    The references are composed as training composes sounds, from content that is not held out. The nearest of them is
    looked for along the axes that tell sounds apart best, those that vary least among the takes of one sound (Fisher's
    linear discriminants).

    Args:
        bank: what can be heard.
        takes: references of each instrument.
        seed: of the references.
        device: where they are composed and compared.
    """

    def __init__(self, bank: SoundBank, *, takes: int = TAKES, seed: int = 101, device: torch.device | str = "cpu"):
        self.family = {row.name: row.family for row in bank.instruments}
        source = SoundSource(bank, seed=seed, device=device)
        sounds = list(_references(bank, source.rng, takes))
        labels = [sound.label for sound in sounds]
        self.labels = list(dict.fromkeys(labels))
        self.device = source.device
        which = torch.tensor([self.labels.index(label) for label in labels], device=self.device)
        parts = [source.make(sounds[first : first + 64]).waveforms for first in range(0, len(sounds), 64)]
        values = statistics(torch.cat(parts))  # [R, D]
        self.centre, self.scale = values.mean(0), values.std(0) + 1e-3
        values = (values - self.centre) / self.scale
        sums = torch.zeros(len(self.labels), values.shape[1], device=self.device).index_add_(0, which, values)
        means = sums / which.bincount(minlength=len(self.labels))[:, None]
        within = values - means[which]
        spread, axes = torch.linalg.eigh((within.T @ within / len(within)).double())
        whiten = (axes / (spread.clamp(min=0) + _RIDGE).sqrt()).float()  # [D, D]
        between = means @ whiten
        between = between - between.mean(0)
        self.axes = whiten @ torch.linalg.eigh((between.T @ between).double())[1][:, -_AXES:].float()  # [D, axes]
        self.takes, self.sounds = values @ self.axes, labels

    def find(self, waveforms: Tensor) -> list[str]:
        """float[B, N] at 16 kHz, levelled -> B names of instruments or drums, or labels of effects."""
        values = (statistics(waveforms.to(self.device)) - self.centre) / self.scale @ self.axes
        return [self.sounds[n] for n in torch.cdist(values, self.takes).argmin(1).tolist()]

    def kind(self, label: str) -> str:
        """The family of an instrument; of anything else its label."""
        return self.family.get(label, label)


def _references(bank: SoundBank, rng: random.Random, takes: int) -> list[Sound]:
    def not_held_out(draw: Callable[[], Sound]) -> Sound:
        while is_held_out(sound := draw()):
            pass
        return sound

    fewer, found = max(1, takes // 3), list[Sound]()
    for instrument in bank.instruments:
        found += [not_held_out(partial(random_music, instrument, rng)) for _ in range(takes)]
    for effect in bank.effects:
        found += [Sound(kind="effect", label=effect.label)] * fewer
    for struck in [*bank.percussion, None]:
        found += [not_held_out(partial(random_beat, struck, rng)) for _ in range(fewer)]
    return found


# --- how it is played ----------------------------------------------------------------------------------------

_HOP = 80
_FRAMES_A_SECOND = RATE // _HOP
_ENVELOPE = MelConfig(window=512, hop=_HOP, bins=48)
_LEAST, _MOST = 0.085, 0.7


def attacks(waveforms: Tensor) -> Tensor:
    """How much every moment adds to the spectrum: float[B, N] -> float[B, T], a frame every 5 ms."""
    mel = LogMel(_ENVELOPE).to(waveforms.device)(waveforms)
    mel = (mel - mel.amax((1, 2), keepdim=True)).clamp(min=-7)  # 60 dB
    rise = F.pad((mel[:, 3:] - mel[:, :-3]).clamp(min=0).mean(2), (3, 0))
    window = torch.hann_window(7, device=waveforms.device)
    return F.conv1d(rise[:, None], (window / window.sum())[None, None], padding=3)[:, 0]


def intervals(waveforms: Tensor) -> list[float | None]:
    """Seconds from note to note, None where nothing repeats: float[B, N] at 16 kHz -> B of them.

    The first peak of the attacks' autocorrelation that is nearly as high as the highest, so that accents on every
    second beat do not halve the pace.
    """
    strength = attacks(waveforms)
    strength = strength - strength.mean(1, keepdim=True)
    count = strength.shape[1]
    power = torch.fft.rfft(strength, 2 * count).abs().square()
    alike = torch.fft.irfft(power, 2 * count)[:, :count]
    overlap = (count - torch.arange(count, device=alike.device)).clamp(min=count // 4)
    alike = alike / alike[:, :1].clamp(min=1e-9) * count / overlap
    first, last = round(_LEAST * _FRAMES_A_SECOND), round(_MOST * _FRAMES_A_SECOND)
    found: list[float | None] = []
    for row in alike[:, first - 1 : last + 2].cpu():
        inner = row[1:-1]
        peaks = ((inner >= row[:-2]) & (inner >= row[2:])).nonzero()[:, 0]
        best = inner[peaks].max() if len(peaks) else torch.zeros(())
        if best <= 0.1:
            found.append(None)
            continue
        found.append((first + int(peaks[inner[peaks] > 0.7 * best][0])) / _FRAMES_A_SECOND)
    return found


def tempo_of(interval: float | None, *, drum_kit: bool = False) -> Tempo | None:
    """The word for it; None for a medium tempo, and for none at all."""
    fast, slow = SPLITS[drum_kit]
    if interval is None or fast <= interval <= slow:
        return None
    return "fast" if interval < fast else "slow"


_WINDOW = 2048
_STEP = 3
"""Bins of a half-tone."""
_REACH = 5
"""Half-tones by which a note is compared with the one before; short of a fifth, whose overtones are alike."""


def directions(waveforms: Tensor) -> list[Direction | None]:
    """Whether notes rise, fall or stay; None where they do now one, now another: float[B, N] at 16 kHz.

    Every moment's spectrum over the logarithm of pitch is compared with the one a note later (`intervals`), shifted up
    or down by some half-tones: overtones shift along, so that no pitch need be named.
    """
    spectra = _over_pitch(waveforms)  # [B, K, T]
    found: list[Direction | None] = []
    for spectrum, interval in zip(spectra, intervals(waveforms), strict=True):
        lag = round((interval or 0.3) * RATE / (2 * _HOP))
        before, after = F.normalize(spectrum[:, :-lag], dim=0), F.normalize(spectrum[:, lag:], dim=0)
        reach = _REACH * _STEP
        padded = F.pad(after, (0, 0, reach, reach))  # [K + 2 * reach, T - lag]
        alike = torch.stack([(padded[s : s + len(before)] * before).sum(0) for s in range(2 * reach + 1)])
        shift = alike.argmax(0) - reach
        up, down = ((sign * shift >= 2).float().mean().item() for sign in (1, -1))
        if max(up, down) < 0.05:
            found.append("repeated")
        elif max(up, down) > max(0.2, 4 * min(up, down)):
            found.append("rising" if up > down else "falling")
        else:
            found.append(None)
    return found


def _over_pitch(waveforms: Tensor) -> Tensor:
    """Peaks of the log-magnitude over six octaves from 65 Hz, a frame every 10 ms: float[B, N] -> float[B, K, T]."""
    window = torch.hann_window(_WINDOW, device=waveforms.device)
    waves = torch.stft(
        waveforms, _WINDOW, 2 * _HOP, window=window, return_complex=True, pad_mode="constant"
    ).abs()  # [B, 1025, T]
    octave = 12 * _STEP
    place = 65 * 2 ** (torch.arange(6 * octave, device=waveforms.device) / octave) * _WINDOW / RATE
    low, part = place.long(), (place % 1)[:, None]
    level = waves[:, low] * (1 - part) + waves[:, low + 1] * part
    level = (level / level.amax((1, 2), keepdim=True).clamp(min=1e-9)).clamp(min=1e-3).log()
    course = F.avg_pool1d(level.transpose(1, 2), octave + 1, 1, octave // 2, count_include_pad=False)
    return (level - course.transpose(1, 2)).clamp(min=0)
