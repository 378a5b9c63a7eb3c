"""A melody as a media value: notes, a tempo, an instrument; saved as MIDI, and played by a synthesizer of its own.

Shapes: N notes.
"""

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from anygen.errors import MediaError
from anygen.media import Audio, Media, MediaLimits

RATE, TICKS = 16_000, 480
INSTRUMENTS = {
    "piano": (0, (1.0, 0.5, 0.25, 0.12, 0.06), 0.005, 2.5),
    "bells": (14, (1.0, 0.0, 0.6, 0.0, 0.35, 0.3), 0.002, 1.5),
    "organ": (19, (1.0, 0.7, 0.5, 0.35, 0.2, 0.2), 0.03, 0.0),
    "guitar": (24, (1.0, 0.7, 0.45, 0.3, 0.2, 0.1), 0.003, 4.0),
    "flute": (73, (1.0, 0.15, 0.05), 0.08, 0.2),
}
"""Name -> program of General MIDI, loudness of the partials, seconds of attack, decay per second."""


class Melody(Media):
    """One note after another.

    Args:
        notes: of each the MIDI pitch (0 to 127) and its length in beats.
        tempo: beats a minute.
        instrument: one of `INSTRUMENTS`.

    Raises:
        MediaError: there is no note, a number is out of range, or the instrument is unknown.
    """

    modality, suffixes = "melody", (".mid",)

    def __init__(self, notes: Sequence[tuple[int, float]], tempo: float = 100, instrument: str = "piano") -> None:
        self.notes, self.tempo, self.instrument = [(int(p), float(b)) for p, b in notes], float(tempo), instrument
        if not self.notes or any(not (0 <= p <= 127 and 0 < b <= 64) for p, b in self.notes) or not 10 <= tempo <= 400:
            raise MediaError("a melody has notes of pitch 0 to 127 and at most 64 beats, at 10 to 400 beats a minute")
        if instrument not in INSTRUMENTS:
            raise MediaError(f"there is no instrument '{instrument}'; known: {', '.join(INSTRUMENTS)}")

    def __repr__(self) -> str:
        return f"Melody({len(self.notes)} notes, {self.instrument}, {self.tempo:.0f} beats a minute)"

    def audio(self) -> Audio:
        """Its sound at 16 kHz: partials over the pitch, each note with an attack and a decay."""
        _, partials, attack, decay = INSTRUMENTS[self.instrument]
        sounds = []
        for pitch, beats in self.notes:
            time = np.arange(round(beats * 60 / self.tempo * RATE)) / RATE
            angle = 2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * time
            sound = sum(loud * np.sin(k * angle) for k, loud in enumerate(partials, start=1))
            fade = np.clip((time[-1] - time) / 0.03, 0, 1) if len(time) else time
            sounds.append(sound * np.clip(time / attack, 0, 1) * np.exp(-decay * time) * fade)
        samples = np.concatenate(sounds)
        return Audio((0.8 * samples / max(np.abs(samples).max(), 1e-6)).astype(np.float32), RATE)

    def _repr_html_(self) -> str:
        return f"{self!r}<br>{self.audio()._repr_html_()}"

    @classmethod
    def _convert(cls, value: Any) -> "Melody":
        return cls(value)

    def _write(self, path: Any, suffix: str, metadata: Any) -> None:
        text = json.dumps(dict(metadata)).encode()
        events = [b"\0\xff\x51\3" + round(6e7 / self.tempo).to_bytes(3, "big"), b"\0\xff\1" + _number(len(text)) + text]
        events.append(bytes([0, 0xC0, INSTRUMENTS[self.instrument][0]]))
        for pitch, beats in self.notes:
            events.append(bytes([0, 0x90, pitch, 96]) + _number(round(beats * TICKS)) + bytes([0x80, pitch, 0]))
        track = b"".join([*events, b"\0\xff\x2f\0"])
        path.write_bytes(struct.pack(">4sIHHH4sI", b"MThd", 6, 0, 1, TICKS, b"MTrk", len(track)) + track)

    @classmethod
    def _decode(cls, data: bytes, name: str, limits: MediaLimits) -> "Melody":
        raise MediaError(f"{name}: melodies are made and written, not read; make one of notes, Melody([(60, 1.0), …])")


def _number(value: int) -> bytes:
    """MIDI's numbers: seven bits a byte, the last without the eighth."""
    head = [0x80 | value >> shift & 0x7F for shift in (21, 14, 7) if value >> shift]
    return bytes([*head, value & 0x7F])
