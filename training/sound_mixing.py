"""Clips composed from stems: what a `Sound` says becomes a score of events, and scores become waveforms on any device.

Shapes: B clips, N samples of a clip, V events, W samples of the longest event.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anygen.errors import ConfigError
from anygen.generators.mel import faded, levelled
from anygen.training.sound_captions import DRUM_KIT, Sound, Tempo, is_held_out, random_sound
from anygen.training.sound_packages import RATE
from anygen.training.sounds import Effect, Instrument, Percussion, SoundBank

SECONDS = 2.56
SAMPLES = round(SECONDS * RATE)
"""Samples of a clip: 256 frames of the spectrogram."""
RELEASE = 0.06
"""Seconds in which a note falls to 1/e when its time is over."""
_TAIL = 5 * RELEASE

SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9))
"""Half-tones of major, minor and pentatonic."""
CHORDS = ((0, 4, 7), (0, 3, 7), (0, 4, 7, 12), (0, 3, 7, 12))
INTERVALS: dict[Tempo | None, tuple[float, float]] = {"slow": (0.48, 0.62), None: (0.26, 0.33), "fast": (0.12, 0.16)}
"""Seconds from note to note, least and most."""
_EIGHTHS: dict[Tempo | None, tuple[float, float]] = {"slow": (0.26, 0.31), None: (0.17, 0.2), "fast": (0.1, 0.12)}


class Event(NamedTuple):
    """One stem, sounding once."""

    stem: int
    start: float
    """Seconds into the clip."""
    hold: float
    """Seconds until it is let go; a recording that ends earlier just ends."""
    rate: float = 1.0
    """Speed, and with it pitch."""
    gain: float = 1.0
    skip: float = 0.0
    """Seconds of the stem that are left out at its beginning."""


def score(sound: Sound, bank: SoundBank, rng: random.Random) -> list[Event]:
    """What is to sound, and when; all that the caption leaves open is random.

    Raises:
        StopIteration: the bank has nothing of that name.
    """
    if sound.kind == "music":
        return _music(sound, next(row for row in bank.instruments if row.name == sound.label), rng)
    if sound.kind == "beat":
        if sound.label == DRUM_KIT:
            return _drum_kit(sound, bank, rng)
        return _beat(sound, next(row for row in bank.percussion if row.name == sound.label), rng)
    events = _effect(next(row for row in bank.effects if row.label == sound.label), bank, rng)
    if sound.behind is not None:
        behind = next(row for row in bank.effects if row.label == sound.behind)
        level = rng.uniform(0.3, 0.55)
        events += [event._replace(gain=level * event.gain) for event in _effect(behind, bank, rng)]
    return events


def _music(sound: Sound, instrument: Instrument, rng: random.Random) -> list[Event]:
    step = rng.uniform(*INTERVALS[sound.tempo])
    start = rng.uniform(0.0, 0.06)
    places = max(2, int((SECONDS - start - 0.05) / step))  # notes that fit
    lines = _line(sound, places, rng)
    span = max(map(max, lines))
    base = _base(sound, instrument, span, rng)
    legato = rng.choice([1.0, 1.0, 0.6])
    if sound.phrase in ("note", "chord"):
        step, legato = rng.uniform(1.1, 1.9), 1.0
    events = []
    for number, keys in enumerate(lines):
        hold = step * legato if number + 1 < len(lines) else max(step, rng.uniform(0.4, 1.0))
        for key in keys:
            events.append(_note(instrument, base + key, start + step * number, hold, rng.uniform(0.8, 1.0)))
    return events


def _line(sound: Sound, places: int, rng: random.Random) -> list[tuple[int, ...]]:
    """The keys of each place, in half-tones from the lowest; at most `places`."""
    scale = rng.choice(SCALES)
    ladder = [12 * octave + key for octave in range(4) for key in scale]
    match sound.phrase:
        case "note" | None:
            return [(0,)]
        case "chord":
            return [rng.choice(CHORDS)]
        case "repeated":
            return [(0,)] * places
        case "rising" | "falling":
            count = min(places, rng.randint(9, 11))
            keys = ladder[:count]
            return [(key,) for key in (keys if sound.phrase == "rising" else keys[::-1])]
        case "arpeggio":
            chord = rng.choice(CHORDS[2:])
            wave = [*chord, *chord[-2:0:-1]]
            return [(wave[place % len(wave)],) for place in range(places)]
    place, keys = rng.randrange(3, 6), []
    for _ in range(places):
        keys.append(ladder[place])
        moves = [move for move in (-3, -2, -1, 1, 2, 3) if 0 <= place + move < 9]
        place += rng.choice(moves)
    return [(key - min(keys),) for key in keys]


def _base(sound: Sound, instrument: Instrument, span: int, rng: random.Random) -> int:
    """The lowest key: at the lower end of the instrument, at the upper end, or between them."""
    room = instrument.high - span - instrument.low
    if sound.pitch == "low":
        return instrument.low + rng.randint(0, 3)
    if sound.pitch == "high":
        return max(instrument.low, instrument.high - span - rng.randint(0, 3))
    return instrument.low + max(0, round(room / 2 + rng.uniform(-0.15, 0.15) * room))


def _note(instrument: Instrument, key: int, start: float, hold: float, gain: float) -> Event:
    nearest = min(range(len(instrument.roots)), key=lambda number: abs(instrument.roots[number] - key))
    return Event(instrument.stems[nearest], start, hold, 2 ** ((key - instrument.roots[nearest]) / 12), gain)


def _beat(sound: Sound, percussion: Percussion, rng: random.Random) -> list[Event]:
    stem, rate, start = rng.choice(percussion.stems), rng.uniform(0.94, 1.06), rng.uniform(0.0, 0.06)
    if sound.phrase != "beat":
        return [Event(stem, start, SECONDS, rate)]
    step, accent = rng.uniform(*INTERVALS[sound.tempo]), rng.choice([2, 3, 4])
    count = int((SECONDS - start - 0.02) / step)
    return [
        Event(stem, start + step * place, 1.0, rate, 1.0 if place % accent == 0 else rng.uniform(0.45, 0.7))
        for place in range(count)
    ]


def _drum_kit(sound: Sound, bank: SoundBank, rng: random.Random) -> list[Event]:
    rows = {row.name: row for row in bank.percussion}
    bass, snare, hat = (rng.choice(rows[name].stems) for name in ("bass drum", "snare drum", "hi-hat"))
    step = rng.uniform(*_EIGHTHS[sound.tempo])
    extra = rng.choice([3, 5, 7])
    events = []
    for place in range(int((SECONDS - 0.02) / step)):
        beat = place % 8
        events.append(Event(hat, step * place, 0.5, 1.0, 0.5 if beat % 2 else 0.6))
        if beat in (0, 4, extra):
            events.append(Event(bass, step * place, 0.5))
        if beat in (2, 6):
            events.append(Event(snare, step * place, 0.5, 1.0, 0.9))
    return events


def _effect(effect: Effect, bank: SoundBank, rng: random.Random) -> list[Event]:
    stem, rate = rng.choice(effect.stems), rng.uniform(0.92, 1.1)
    length = bank.lengths[stem] / RATE / rate
    if length < 1.6 and rng.random() < effect.repeat:
        gap, start, events = rng.uniform(0.08, 0.45), rng.uniform(0.0, 0.1), []
        while start + min(length, 0.3) < SECONDS:
            events.append(Event(stem, start, SECONDS, rate * rng.uniform(0.98, 1.02), rng.uniform(0.85, 1.0)))
            start += length + gap * rng.uniform(0.9, 1.1)
        return events
    spare = length - SECONDS
    skip = rng.uniform(0.0, spare) * rate if spare > 0 and effect.background else 0.0
    start = rng.uniform(0.0, min(0.3, 0.3 * -spare)) if spare < 0 else 0.0
    return [Event(stem, start, SECONDS, rate, 1.0, skip)]


class Mixer:
    """A bank's stems on a device, and scores -> waveforms."""

    def __init__(self, bank: SoundBank, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.samples, self.offsets = bank.samples.to(self.device), bank.offsets.to(self.device)
        self.gains, self.lengths = bank.gains.to(self.device) / 32_768, bank.lengths

    def __call__(self, scores: Sequence[Sequence[Event]]) -> Tensor:
        """B scores -> float32[B, N], levelled, without clicks at the ends."""
        mixed = torch.zeros(len(scores) * SAMPLES + 1, device=self.device)  # the last one takes what lies outside
        rows: list[tuple[Any, ...]] = [(clip, *event) for clip, events in enumerate(scores) for event in events]
        rows.sort(key=lambda row: self._length(Event(*row[1:])))  # events of like length are computed together
        at_once = 1024 if self.device.type == "cuda" else 64
        for first in range(0, len(rows), at_once):
            self._add(mixed, rows[first : first + at_once])
        return faded(levelled(mixed[:-1].view(len(scores), SAMPLES), RATE), RATE)

    def _length(self, event: Event) -> float:
        """Seconds that it is heard."""
        return min(event.hold + _TAIL, (self.lengths[event.stem] / RATE - event.skip) / event.rate)

    def _add(self, mixed: Tensor, rows: list[tuple[Any, ...]]) -> None:
        table = torch.tensor(rows, dtype=torch.float64).to(self.device)
        clip, stem, start, hold, rate, gain, skip = table.T
        stem = stem.long()
        begin, length = self.offsets[stem], self.offsets[stem + 1] - self.offsets[stem]
        longest = RATE * self._length(Event(*rows[-1][1:]))
        time = torch.arange(min(SAMPLES, int(longest) + 1), device=self.device)  # [W]
        place = time * rate[:, None] + skip[:, None] * RATE  # float64[V, W], samples into the stem
        whole = place.floor().long()
        values = self._between(whole, (place - whole).float(), begin[:, None], length[:, None])
        seconds = (time / RATE).float()
        held = hold.float()[:, None]
        envelope = torch.where(seconds > held, torch.exp(-(seconds - held) / RELEASE), torch.ones_like(held))
        ramp = torch.where(skip[:, None] > 0, (seconds / 0.01).clamp(max=1), torch.ones_like(seconds)).float()
        values *= envelope * ramp * (self.gains[stem] * gain.float())[:, None]
        at = (start * RATE).round().long()[:, None] + time
        target = torch.where(at < SAMPLES, clip.long()[:, None] * SAMPLES + at, len(mixed) - 1)
        mixed.index_add_(0, target.flatten(), values.flatten())

    def _between(self, whole: Tensor, part: Tensor, begin: Tensor, length: Tensor) -> Tensor:
        """The stems' samples at whole + part, by Catmull-Rom splines, and 0 beyond their ends: float[V, W]."""
        a, b, c, d = (
            torch.where(
                (whole + shift >= 0) & (whole + shift < length),
                self.samples[(begin + whole + shift).clamp(0, len(self.samples) - 1)],
                0,
            ).float()
            for shift in (-1, 0, 1, 2)
        )
        cubic, square, linear = 1.5 * (b - c) + 0.5 * (d - a), a - 2.5 * b + 2 * c - 0.5 * d, 0.5 * (c - a)
        return ((cubic * part + square) * part + linear) * part + b


@dataclass(frozen=True, slots=True)
class SoundBatch:
    """Composed clips and their content."""

    waveforms: Tensor
    """float32[B, N]."""
    sounds: list[Sound]


class SoundSource:
    """Endless composed clips in a seeded order."""

    def __init__(
        self, bank: SoundBank, *, seed: int, device: torch.device | str = "cpu", held_out: bool = False
    ) -> None:
        self.bank, self.device, self.held_out = bank, torch.device(device), held_out
        self.mixer, self.rng = Mixer(bank, device), random.Random(seed)

    def batches(self, size: int) -> Iterator[SoundBatch]:
        """Batches of `size`, without end."""
        while True:
            yield self.make([self._draw() for _ in range(size)])

    def clips(self, number: int, most: int = 256) -> Iterator[SoundBatch]:
        """So many clips, in batches of at most `most`."""
        for first in range(0, number, most):
            yield self.make([self._draw() for _ in range(min(most, number - first))])

    def make(self, sounds: list[Sound]) -> SoundBatch:
        """One clip of each sound of the list; labels are the bank's, not aliases."""
        return SoundBatch(self.mixer([score(sound, self.bank, self.rng) for sound in sounds]), sounds)

    def _draw(self) -> Sound:
        for _ in range(100_000):
            sound = random_sound(self.bank, self.rng)
            if is_held_out(sound) == self.held_out:
                return sound
        raise ConfigError("nothing that this sound bank can make is held out: it is too small to be measured on")


@dataclass(slots=True)
class SoundPool:
    """Clips composed once; a random batch of them is then one gather on the device."""

    waveforms: Tensor
    """int16[N clips, N]."""
    sounds: list[Sound] = field(default_factory=list)

    @classmethod
    def fill(cls, source: SoundSource, number: int) -> "SoundPool":
        """Composes `number` clips of `source`."""
        pool = cls(torch.empty(number, SAMPLES, dtype=torch.int16, device=source.device))
        for batch in source.clips(number):
            first = len(pool.sounds)
            pool.waveforms[first : first + len(batch.sounds)] = (batch.waveforms * 32_767).round().to(torch.int16)
            pool.sounds += batch.sounds
        return pool

    def __len__(self) -> int:
        return len(self.waveforms)

    def draw(self, size: int) -> Tensor:
        """float32[B, N] in [-1, 1], drawn with replacement."""
        rows = torch.randint(len(self), (size,), device=self.waveforms.device)
        return self.waveforms[rows].float() / 32_767
