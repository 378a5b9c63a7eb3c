"""What a training clip lets one hear, and the words for it.

A `Sound` names everything that captions control: the instrument or effect, what is played, tempo, pitch, and what goes
on behind. `canonical` writes the one caption that the model's own answers use; `varied` writes the many forms in which
people say the same.
"""

import random
from dataclasses import dataclass, replace
from typing import Literal

from anygen.training.captions import keeps_out, with_article
from anygen.training.sounds import Effect, Instrument, Percussion, SoundBank

Kind = Literal["music", "beat", "effect"]
Phrase = Literal["note", "rising", "falling", "arpeggio", "chord", "melody", "repeated", "hit", "beat"]
Tempo = Literal["slow", "fast"]
Pitch = Literal["low", "high"]

DRUM_KIT = "drum kit"
"""The one label of kind "beat" that is no stem's: bass drum, snare drum and hi-hat together."""

PHRASES: dict[Phrase, tuple[str, ...]] = {
    "note": ("note", "single note", "tone"),
    "rising": ("rising melody", "rising scale", "ascending melody", "line of notes going up"),
    "falling": ("falling melody", "falling scale", "descending melody", "line of notes going down"),
    "arpeggio": ("arpeggio", "broken chord"),
    "chord": ("chord", "held chord"),
    "melody": ("melody", "tune", "song"),
    "repeated": ("repeated note", "note again and again"),
    "hit": ("single beat", "stroke"),
    "beat": ("beat", "rhythm", "groove"),
}
"""Phrase -> its words, the canonical ones first."""
TEMPI: dict[Tempo, tuple[str, ...]] = {"slow": ("slow",), "fast": ("fast", "quick")}
PITCHES: dict[Pitch, tuple[str, ...]] = {"low": ("low", "deep"), "high": ("high", "high-pitched")}
UNTIMED: frozenset[Phrase] = frozenset({"note", "chord", "hit"})
"""Phrases that have no tempo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sound:
    """One clip's content. None means that the caption leaves it open."""

    kind: Kind
    label: str
    """The instrument's name, or the effect's label or one of its aliases."""
    phrase: Phrase | None = None
    """What is played; effects have none."""
    tempo: Tempo | None = None
    """Unsaid, it is medium."""
    pitch: Pitch | None = None
    """Relative to the instrument; unsaid, it is in the middle."""
    behind: str | None = None
    """The label of an effect that goes on behind this one."""


def is_held_out(sound: Sound) -> bool:
    """Whether this combination is never trained on.

    A stable hash of the content decides, so that every process and every part of the system agrees. Plain sounds (no
    tempo, no pitch, nothing behind) are never held out.
    """
    if sound.tempo is None and sound.pitch is None and sound.behind is None:
        return False
    key = f"{sound.label}|{sound.phrase}|{sound.tempo}|{sound.pitch}|{sound.behind}"
    return keeps_out(key)


def canonical(sound: Sound) -> str:
    """'a trumpet playing a fast high rising melody', 'a dog barking and rain falling'.

    Only what the sound states is said, always in this order.
    """
    if sound.kind == "effect":
        return sound.label + (f" and {sound.behind}" if sound.behind else "")
    if sound.phrase is None:
        return with_article(sound.label)
    return f"{with_article(sound.label)} playing {_played(sound, sound.tempo, sound.pitch)}"


def bare(sound: Sound) -> Sound:
    """Who or what sounds, and nothing more."""
    return Sound(kind=sound.kind, label=sound.label)


def varied(sound: Sound, rng: random.Random) -> str:
    """The same content in one of many forms: synonyms, tags, phrase first, 'the sound of …'."""
    if sound.kind == "effect":
        if sound.behind is None:
            return rng.choice(["{}", "{}", "the sound of {}", "sound of {}", "{} sound"]).format(sound.label)
        joined = rng.choice(["{} and {}", "{} with {}", "{}, {}", "{} while there is {} behind", "{} over {}"])
        return joined.format(sound.label, sound.behind)
    player = with_article(sound.label)
    if sound.phrase is None:
        return rng.choice(["{}", "the sound of {}", "{} playing", "music played on {}", "{} solo"]).format(player)
    tempo = rng.choice(TEMPI[sound.tempo]) if sound.tempo else None
    pitch = rng.choice(PITCHES[sound.pitch]) if sound.pitch else None
    noun = rng.choice(PHRASES[sound.phrase])
    match rng.randrange(6):
        case 0:  # tags
            return ", ".join(part for part in (sound.label, tempo, pitch, noun) if part)
        case 1:  # phrase first
            return f"{_played(sound, tempo, pitch, noun)} on {player}"
        case 2:
            return f"the sound of {player} playing {_played(sound, tempo, pitch, noun)}"
        case 3:  # adjectives last
            words = f"{player} playing {_played(sound, None, None, noun)}"
            return ", ".join([words, *(part for part in (tempo, pitch) if part)])
        case 4:
            return f"{player} plays {_played(sound, tempo, pitch, noun)}"
        case _:
            return canonical(sound)


def _played(sound: Sound, tempo: str | None, pitch: str | None, noun: str | None = None) -> str:
    assert sound.phrase is not None
    noun = noun or PHRASES[sound.phrase][0]
    return with_article(" ".join(part for part in (tempo, pitch, noun) if part))


def random_sound(bank: SoundBank, rng: random.Random) -> Sound:
    """Any sound that the bank can make: half music, a third effects, the rest beats."""
    kinds: tuple[Kind, ...] = ("music", "effect", "beat")
    kind = rng.choices(kinds, (0.54, 0.34, 0.12))[0]
    if kind == "music":
        return random_music(rng.choice(bank.instruments), rng)
    if kind == "beat":
        struck: list[Percussion | None] = [*bank.percussion, None, None]
        return random_beat(rng.choice(struck), rng)
    return random_effect(rng.choice(bank.effects), bank, rng)


def random_music(instrument: Instrument, rng: random.Random) -> Sound:
    """A phrase for that instrument."""
    phrases: list[Phrase] = ["note", "rising", "falling", "arpeggio", "melody", "repeated"]
    if instrument.chords:
        phrases.append("chord")
    phrase = rng.choice(phrases)
    tempo: Tempo | None = None if phrase in UNTIMED else rng.choice(["slow", "fast", None])
    pitch: Pitch | None = rng.choice(["low", "high", None, None])
    return Sound(kind="music", label=instrument.name, phrase=phrase, tempo=tempo, pitch=pitch)


def random_beat(percussion: Percussion | None, rng: random.Random) -> Sound:
    """A stroke or a beat; None stands for the drum kit."""
    if percussion is None:
        return Sound(kind="beat", label=DRUM_KIT, phrase="beat", tempo=rng.choice(["slow", "fast", None]))
    if rng.random() < 0.35:
        return Sound(kind="beat", label=percussion.name, phrase="hit")
    return Sound(kind="beat", label=percussion.name, phrase="beat", tempo=rng.choice(["slow", "fast", None]))


def random_effect(effect: Effect, bank: SoundBank, rng: random.Random) -> Sound:
    """An effect, at times with another one behind."""
    others = [other.label for other in bank.effects if other.background and other.label != effect.label]
    behind = rng.choice(others) if others and not effect.background and rng.random() < 0.12 else None
    return Sound(kind="effect", label=effect.label, behind=behind)


def said(sound: Sound, bank: SoundBank, rng: random.Random, *, left_open: float = 0.15) -> Sound:
    """What a speaker says of it: at times only who plays; an alias may stand for an effect's label."""
    if sound.kind != "effect":
        if rng.random() < left_open:
            return replace(sound, phrase=None, tempo=None, pitch=None)
        return sound
    aliases = next(effect.aliases for effect in bank.effects if effect.label == sound.label)
    if aliases and rng.random() < 0.3:
        return replace(sound, label=rng.choice(aliases))
    return sound


def caption_corpus(bank: SoundBank, seed: int, number: int = 12_000) -> list[str]:
    """Captions over everything in the bank, for training the tokenizer."""
    rng = random.Random(seed)
    texts = [instrument.name for instrument in bank.instruments] + [row.name for row in bank.percussion]
    for effect in bank.effects:
        texts += [effect.label, *effect.aliases]
    return texts + [varied(said(random_sound(bank, rng), bank, rng), rng) for _ in range(number)]
