"""What an evaluation asks for beside pictures: clips, sounds, several media, media for media given, the impossible.

The wordings (`words/heldout_media.json`) are written apart from those of the training.
"""

import json
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from anygen.errors import ConfigError
from anygen.training import sound_captions
from anygen.training.captions import COLOURS, Drawing, with_article
from anygen.training.evaluation_cases import QUESTIONS, WORDS, phrase
from anygen.training.icons import IconSet
from anygen.training.motion import MOTIONS, STILL, MotionSource, Shot, random_shot
from anygen.training.motion import is_held_out as is_held_out_clip
from anygen.training.motion_measures import TRACKED, motion_of
from anygen.training.sound_captions import Sound, random_music, random_sound
from anygen.training.sounds import SoundBank
from anygen.training.wishes import link


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaRequest:
    """A held-out wording."""

    text: str
    """With {x} for the first thing that is made, {y} and {z} for the next ones."""
    kind: str
    """video, audio, several, given or impossible."""
    makes: tuple[str, ...]
    """The modalities of the answer, in order; none is an answer in words."""
    given: str | None = None
    """The modality of a medium that comes with it."""
    bare: bool = False
    """{x} is a thing by its name, and nothing said about it; the media of a request for several then all show it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundCase:
    """A sound to be asked for by its canonical caption and by a request."""

    sound: Sound
    request: str
    seed: int
    """Of the sound's noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipCase:
    """A clip to be asked for by its canonical caption and by a request."""

    concept: int
    icon: int
    """The row of the icon set that the true clip is made of."""
    shot: Shot
    request: str
    seed: int
    """Of the clip's noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """A concept, and the plain sound that it makes if it makes one."""

    concept: int
    name: str
    """With its article."""
    sound: Sound | None = None


def media_requests(kind: str, *, given: str | None = None, makes: Sequence[str] | None = None) -> list[MediaRequest]:
    """Those of a kind; of "given", those for that medium and, where it is said, that answer."""
    entries = json.loads((WORDS / "heldout_media.json").read_text(encoding="utf-8"))
    known = [MediaRequest(**entry | {"makes": tuple(entry["makes"])}) for entry in entries]
    found = [request for request in known if request.kind == kind]
    if given is not None:
        found = [request for request in found if request.given == given]
    return found if makes is None else [request for request in found if request.makes == tuple(makes)]


def questions(modality: str) -> list[str]:
    """Held-out questions for the name of what a medium of that modality shows."""
    if modality == "image":
        return list(QUESTIONS)
    return [request.text for request in media_requests("given", given=modality, makes=())]


def things(icons: IconSet, bank: SoundBank | None = None) -> list[Thing]:
    """All concepts; with a bank those that are heard, no two of which make the same sound."""
    if bank is None:
        return [
            Thing(concept=number, name=with_article(concept.label)) for number, concept in enumerate(icons.concepts)
        ]
    sound_of, concept_of = link(bank, icons.concepts)
    return [
        Thing(concept=number, name=with_article(concept.label), sound=sound_of[concept.label])
        for number, concept in enumerate(icons.concepts)
        if concept.label in sound_of and concept_of[sound_of[concept.label].label] == concept.label
    ]


def phrase_sound(sound: Sound, rng: random.Random) -> str:
    """'a trumpet playing a fast rising melody', 'a fast rising melody on a trumpet', 'a dog barking'."""
    words = sound_captions.canonical(sound)
    if sound.kind == "effect" or sound.phrase is None:
        return words
    player, _, played = words.partition(" playing ")
    return rng.choice([words, f"{played} on {player}", f"{played} played by {player}"])


def phrase_clip(shot: Shot, rng: random.Random) -> str:
    """'a rocket moving up in the flat style on a blue background', with one of the motion's words."""
    motion = shot.motion and rng.choice((shot.motion, *MOTIONS.get(shot.motion, ())))
    return phrase(replace(shot.drawing, place=motion), rng)


def sound_cases(bank: SoundBank, music: int, effects: int, seed: int) -> list[SoundCase]:
    """Held-out phrases of random instruments, and effects in turn, of each of which there is but one: plain.

    Raises:
        ConfigError: no phrase of this bank is held out.
    """
    rng, wordings = random.Random(seed), [request.text for request in media_requests("audio")]
    sounds = [_held_out_music(bank, rng) for _ in range(music)]
    turns = [Sound(kind="effect", label=effect.label) for effect in bank.effects]
    rng.shuffle(turns)
    sounds += islice(cycle(turns), effects if turns else 0)
    return [
        SoundCase(
            sound=sound, request=rng.choice(wordings).replace("{x}", phrase_sound(sound, rng)), seed=seed + number
        )
        for number, sound in enumerate(sounds)
    ]


def _held_out_music(bank: SoundBank, rng: random.Random) -> Sound:
    for _ in range(100_000):
        sound = random_music(rng.choice(bank.instruments), rng)
        if sound_captions.is_held_out(sound):
            return sound
    raise ConfigError("no phrase of this sound bank is held out: it is too small to be measured on")


def sound_of_thing(thing: Thing, bank: SoundBank, rng: random.Random) -> Sound:
    """What that thing is heard with: of an instrument a phrase that is held out where it has one."""
    assert thing.sound is not None
    if thing.sound.kind != "music":
        return thing.sound
    player = next(instrument for instrument in bank.instruments if instrument.name == thing.sound.label)
    drawn = [random_music(player, rng) for _ in range(200)]
    return next((sound for sound in drawn if sound_captions.is_held_out(sound)), drawn[0])


def clip_cases(
    icons: IconSet, each: int, seed: int, motions: Iterable[str] = TRACKED
) -> tuple[list[ClipCase], dict[str, tuple[int, int]]]:
    """Held-out (concept, style, motion) before plain backgrounds, such that the true clip's motion can be read.

    A disc can spin unseen. Returns by motion how many true clips were read rightly, and how many there were: the
    ceiling of the measure.
    """
    rng, wordings = random.Random(seed), [request.text for request in media_requests("video")]
    source = MotionSource(icons, seed=seed)
    cases, ceilings = list[ClipCase](), dict[str, tuple[int, int]]()
    for motion in motions:
        order, found, tried = list(range(len(icons.style))), 0, 0
        rng.shuffle(order)
        for icon in order:
            if found == each:
                break
            concept = int(icons.concept[icon])
            background = rng.choice((None, rng.choice(list(COLOURS))))
            drawing = Drawing(label=icons.concepts[concept].label, style=icons.style[icon], background=background)
            shot = Shot(drawing=drawing, motion=motion)
            # what keeps still is held out nowhere, for pictures show it
            if motion != STILL and not is_held_out_clip(shot, concept):
                continue
            tried += 1
            if motion_of(source.make([icon], [shot]).pixels[0]) == motion:
                found += 1
                request = rng.choice(wordings).replace("{x}", phrase_clip(shot, rng))
                cases.append(ClipCase(concept=concept, icon=icon, shot=shot, request=request, seed=seed + len(cases)))
        ceilings[motion] = (found, tried)
    return cases, ceilings


class Filler:
    """Fills the slots of wordings.

    Args:
        icons: what may be seen.
        bank: what may be heard; None where sounds are not asked for.
        seed: of the things.
    """

    def __init__(self, icons: IconSet, bank: SoundBank | None, seed: int) -> None:
        self.icons, self.bank, self.rng = icons, bank, random.Random(seed)
        self.heard = things(icons, bank) if bank is not None else []

    def fill(self, request: MediaRequest) -> str:
        """The message."""
        text = request.text
        if request.bare:
            # a thing that is heard too; a bank that shares nothing with the icons gives the name of any
            pool = self.heard if "audio" in request.makes and self.heard else things(self.icons)
            return text.replace("{x}", self.rng.choice(pool).name)
        for slot, modality in zip(("{x}", "{y}", "{z}"), request.makes, strict=False):
            if slot in text:
                text = text.replace(slot, self.words(modality))
        return text

    def words(self, modality: str) -> str:
        """Anything of that modality, as somebody might say it."""
        if modality == "audio":
            assert self.bank is not None
            return phrase_sound(random_sound(self.bank, self.rng), self.rng)
        icon = self.rng.randrange(len(self.icons.style))
        concept = self.icons.concepts[int(self.icons.concept[icon])]
        shot = random_shot(concept, self.icons.style[icon], self.rng)
        drawing = replace(
            shot.drawing,
            style=shot.drawing.style if self.rng.random() < 0.5 else None,
            background=None if shot.drawing.background == "white" else shot.drawing.background,
        )
        return (
            phrase_clip(replace(shot, drawing=drawing), self.rng) if modality == "video" else phrase(drawing, self.rng)
        )


def routable(request: MediaRequest, inputs: Collection[str], outputs: Collection[str]) -> bool:
    """Whether a model of those modalities can be asked this."""
    return set(request.makes) <= set(outputs) and (request.given is None or request.given in inputs)
