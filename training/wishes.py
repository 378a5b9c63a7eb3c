"""What can be asked for in each output modality, in the words of users and in the one caption that answers use.

A wish is a modality, its content (a `Drawing`, a `Shot` or a `Sound`) and somebody's words for it. One class a modality
draws wishes, phrases requests and questions, and says how a wish may be changed; `requests` makes conversations of them
without knowing what is drawn, filmed or heard.
"""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from anygen.training import sound_captions
from anygen.training.captions import (
    BACKGROUNDS,
    COLOURS,
    NUMBERS,
    Drawing,
    canonical,
    random_drawing,
    said,
    subject,
    varied,
    with_article,
)
from anygen.training.icons import SCENES, TRAINED_STYLES, Concept, IconSet
from anygen.training.motion import MOTIONS, STILL, Shot, canonical_clip, random_shot, said_of_clip, varied_clip
from anygen.training.phrases import ASK, NOUN, PICTURE_NOUNS, TAIL, WHOLE
from anygen.training.phrases_media import (
    AGAIN,
    AGAIN_CLIP,
    AGAIN_SOUND,
    ASK_CLIP,
    ASK_COUNT,
    ASK_GROUND,
    ASK_MOTION,
    ASK_SOUND,
    ASK_STYLE,
    CHANGE_COUNT,
    CHANGE_GROUND,
    CHANGE_MOTION,
    CHANGE_SOUND,
    CHANGE_STYLE,
    CHANGE_THING,
    DESCRIBE,
    DESCRIBE_CLIP,
    DESCRIBE_SOUND,
    NAME_CLIP,
    NAME_IT,
    NAME_SOUND,
    WHOLE_CLIP,
    WHOLE_SOUND,
)
from anygen.training.sound_captions import Sound, bare, random_music, random_sound
from anygen.training.sounds import SoundBank

_WORDS_OF = {background: words for words, background in BACKGROUNDS.items()}


@dataclass(frozen=True, slots=True)
class Wish:
    """Something to be made."""

    modality: str
    content: Any
    """A `Drawing`, `Shot` or `Sound`, named as the answer names it."""
    words: str
    """As a user says it, perhaps by another name."""


class Wishes(ABC):
    """The wishes of one output modality."""

    modality: str
    again: tuple[str, ...]
    """Requests to make what is shown once more."""
    ask: tuple[str, ...]
    """Verbs that a thing follows."""
    whole: tuple[str, ...]
    """Requests with slots."""

    @abstractmethod
    def wish(self, rng: random.Random, *, plain: float = 0.45) -> Wish:
        """Any wish; in the share `plain` of cases a bare thing."""

    @abstractmethod
    def caption(self, content: Any) -> str:
        """The canonical caption: what the generator is asked for."""

    @abstractmethod
    def told(self, content: Any) -> str:
        """The sentence of an answer; it ends with the caption and a full stop."""

    @abstractmethod
    def named(self, content: Any) -> str:
        """The name of the thing, without article."""

    @abstractmethod
    def of(self, name: str, rng: random.Random) -> Any | None:
        """The content that is this thing and says nothing more; None where it cannot be made."""

    @abstractmethod
    def other(self, content: Any, rng: random.Random) -> tuple[Any, str]:
        """Another thing in its place, and a user's words for that change."""

    @abstractmethod
    def changed(self, content: Any, rng: random.Random) -> tuple[Any, str]:
        """The same thing otherwise, and a user's words for that change."""

    @abstractmethod
    def question(self, content: Any, rng: random.Random) -> tuple[str, str]:
        """A question about a medium of this content, and the answer."""

    def clause(self, words: str, rng: random.Random) -> str:
        """'show me a clip of a rocket going up': a request that others may follow."""
        return f"{rng.choice(self.ask)} {words}"

    def request(self, words: str, rng: random.Random) -> str:
        """A request of its own."""
        if rng.random() < 0.4:
            return rng.choice(self.whole).format(x=words, X=words[:1].upper() + words[1:])
        text = self.clause(words, rng) + rng.choice(TAIL)
        return text + (rng.choice(["", "", ".", ".", "!", "?"]) if text[-1].isalnum() else "")


class ImageWishes(Wishes):
    """Pictures of concepts.

    Args:
        concepts: what can be drawn.
    """

    modality, again, ask, whole = "image", AGAIN, ASK, WHOLE

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self.concepts = concepts
        self.by_label = {concept.label: concept for concept in concepts}

    def wish(self, rng: random.Random, *, plain: float = 0.45) -> Wish:
        concept = rng.choice(self.concepts)
        drawing = random_drawing(concept, rng.choice(TRAINED_STYLES), rng)
        if rng.random() < plain:
            drawing = Drawing(label=concept.label, style=drawing.style if rng.random() < 0.5 else None)
        else:
            drawing = replace(said(drawing, concept, rng, open_style=0.4), label=concept.label)
        spoken = replace(drawing, label=rng.choice([concept.label, concept.label, *concept.aliases]))
        words = canonical(spoken) if rng.random() < 0.45 else varied(spoken, rng)
        return Wish("image", drawing, words)

    def caption(self, content: Drawing) -> str:
        return canonical(content)

    def told(self, content: Drawing) -> str:
        """'Here is a red apple.', 'Here are two dogs, in the flat style.'"""
        return f"Here {'is' if content.count == 1 else 'are'} {canonical(content)}."

    def named(self, content: Drawing) -> str:
        return content.label

    def of(self, name: str, rng: random.Random) -> Drawing | None:
        if name not in self.by_label:
            return None
        return Drawing(label=name, style=rng.choice(TRAINED_STYLES) if rng.random() < 0.2 else None)

    def other(self, content: Drawing, rng: random.Random) -> tuple[Drawing, str]:
        concept = rng.choice(self.concepts)
        wanted = replace(content, label=concept.label)
        name = rng.choice([concept.label, *concept.aliases])
        return wanted, rng.choice(CHANGE_THING).format(x=subject(replace(wanted, label=name)))

    def changed(self, content: Drawing, rng: random.Random) -> tuple[Drawing, str]:
        content = replace(content, place=None, size=None)
        match rng.choice(["style", "ground", "count"]):
            case "style":
                style = rng.choice(TRAINED_STYLES)
                return replace(content, style=style), rng.choice(CHANGE_STYLE).format(s=style)
            case "ground":
                ground = rng.choice([*COLOURS, *SCENES])
                return replace(content, background=ground), rng.choice(CHANGE_GROUND).format(b=_WORDS_OF[ground])
            case _:
                count = rng.choice([2, 3, 4])
                return replace(content, count=count), rng.choice(CHANGE_COUNT).format(n=NUMBERS[count])

    def question(self, content: Drawing, rng: random.Random) -> tuple[str, str]:
        match rng.choice(["name", "name", "name", "describe", "style", "ground", "count"]):
            case "name":
                these = "This is" if content.count == 1 else "These are"
                return rng.choice(NAME_IT), f"{these} {subject(Drawing(label=content.label, count=content.count))}."
            case "describe":
                return rng.choice(DESCRIBE), f"{'This is' if content.count == 1 else 'These are'} {canonical(content)}."
            case "style":
                return rng.choice(ASK_STYLE), f"It is drawn in the {content.style} style."
            case "ground":
                return rng.choice(ASK_GROUND), f"It is {_WORDS_OF[content.background or 'white']}."
            case _:
                if content.count == 1:
                    return rng.choice(ASK_COUNT), f"There is one {content.label}."
                there = subject(Drawing(label=content.label, count=content.count))
                return rng.choice(ASK_COUNT), f"There are {there}."

    def clause(self, words: str, rng: random.Random) -> str:
        noun = rng.choice(NOUN) + " " if rng.random() < 0.45 and not words.startswith(PICTURE_NOUNS) else ""
        return f"{rng.choice(self.ask)} {noun}{words}"


class ClipWishes(Wishes):
    """Clips of concepts that move.

    Args:
        concepts: what can be filmed.
    """

    modality, again, ask, whole = "video", AGAIN_CLIP, ASK_CLIP, WHOLE_CLIP

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self.concepts = concepts
        self.by_label = {concept.label: concept for concept in concepts}

    def wish(self, rng: random.Random, *, plain: float = 0.45) -> Wish:
        concept = rng.choice(self.concepts)
        shot = said_of_clip(random_shot(concept, rng.choice(TRAINED_STYLES), rng), concept, rng)
        drawing = replace(shot.drawing, label=concept.label)
        if rng.random() < plain:
            drawing = Drawing(label=concept.label)
        shot = Shot(drawing=drawing, motion=None if shot.motion == STILL and rng.random() < 0.8 else shot.motion)
        spoken = replace(drawing, label=rng.choice([concept.label, concept.label, *concept.aliases]))
        spoken_shot = replace(shot, drawing=spoken)
        words = canonical_clip(spoken_shot) if rng.random() < 0.4 else _without_noun(varied_clip(spoken_shot, rng))
        return Wish("video", shot, words)

    def caption(self, content: Shot) -> str:
        return canonical_clip(content)

    def told(self, content: Shot) -> str:
        return f"Here is a clip of {canonical_clip(content)}."

    def named(self, content: Shot) -> str:
        return content.drawing.label

    def of(self, name: str, rng: random.Random) -> Shot | None:
        if name not in self.by_label:
            return None
        return Shot(drawing=Drawing(label=name), motion=None)

    def other(self, content: Shot, rng: random.Random) -> tuple[Shot, str]:
        concept = rng.choice(self.concepts)
        wanted = replace(content, drawing=replace(content.drawing, label=concept.label))
        name = rng.choice([concept.label, *concept.aliases])
        return wanted, rng.choice(CHANGE_THING).format(x=with_article(name))

    def changed(self, content: Shot, rng: random.Random) -> tuple[Shot, str]:
        drawing = replace(content.drawing, size=None)
        match rng.choice(["motion", "motion", "style", "ground"]):
            case "motion":
                motion = rng.choice([motion for motion in MOTIONS if motion != content.motion])
                words = rng.choice([motion, *MOTIONS[motion]])
                return Shot(drawing=drawing, motion=motion), rng.choice(CHANGE_MOTION).format(m=words)
            case "style":
                style = rng.choice(TRAINED_STYLES)
                wanted, words = replace(drawing, style=style), rng.choice(CHANGE_STYLE).format(s=style)
            case _:
                ground = rng.choice([*COLOURS, *SCENES])
                wanted = replace(drawing, background=ground)
                words = rng.choice(CHANGE_GROUND).format(b=_WORDS_OF[ground])
        return replace(content, drawing=wanted), words

    def question(self, content: Shot, rng: random.Random) -> tuple[str, str]:
        thing = with_article(content.drawing.label)
        kinds = ["name", "name", "describe"] + (["motion"] if content.motion in MOTIONS else [])
        match rng.choice(kinds):
            case "name":
                return rng.choice(NAME_CLIP), f"This is {thing}."
            case "motion":
                return rng.choice(ASK_MOTION), f"It is {content.motion}."
            case _:
                return rng.choice(DESCRIBE_CLIP), f"This is {canonical_clip(content)}."


class SoundWishes(Wishes):
    """Instruments, beats and effects.

    Args:
        bank: what can be heard.
        concepts: what can be seen; things that are both link the modalities.
    """

    modality, again, ask, whole = "audio", AGAIN_SOUND, ASK_SOUND, WHOLE_SOUND

    def __init__(self, bank: SoundBank, concepts: Sequence[Concept] = ()) -> None:
        self.bank = bank
        self.sound_of, self.concept_of = link(bank, concepts)

    def wish(self, rng: random.Random, *, plain: float = 0.45) -> Wish:
        sound = random_sound(self.bank, rng)
        if rng.random() < plain:
            sound = bare(sound)
        spoken = sound_captions.said(sound, self.bank, rng, left_open=0.0)
        words = sound_captions.canonical(spoken) if rng.random() < 0.4 else sound_captions.varied(spoken, rng)
        return Wish("audio", sound, re.sub(r"^(?:the )?sound of ", "", words))

    def caption(self, content: Sound) -> str:
        return sound_captions.canonical(content)

    def told(self, content: Sound) -> str:
        return f"Here is the sound of {sound_captions.canonical(content)}."

    def named(self, content: Sound) -> str:
        return self.concept_of.get(content.label, content.label)

    def of(self, name: str, rng: random.Random) -> Sound | None:
        return self.sound_of.get(name)

    def other(self, content: Sound, rng: random.Random) -> tuple[Sound, str]:
        if content.kind == "music":  # the same phrase on another instrument
            wanted = replace(content, label=rng.choice(self.bank.instruments).name)
            return wanted, rng.choice(CHANGE_SOUND).format(x=with_article(wanted.label))
        wanted = bare(random_sound(self.bank, rng))
        spoken = sound_captions.said(wanted, self.bank, rng, left_open=0.0)
        return wanted, rng.choice(CHANGE_SOUND).format(x=sound_captions.canonical(spoken))

    def changed(self, content: Sound, rng: random.Random) -> tuple[Sound, str]:
        if content.kind != "music":
            return self.other(content, rng)
        player = next(instrument for instrument in self.bank.instruments if instrument.name == content.label)
        wanted = random_music(player, rng)
        played = sound_captions.canonical(wanted).partition(" playing ")[2]
        return wanted, rng.choice(CHANGE_SOUND).format(x=played)

    def question(self, content: Sound, rng: random.Random) -> tuple[str, str]:
        thing = sound_captions.canonical(bare(content))
        if rng.random() < 0.6:
            return rng.choice(NAME_SOUND), f"This is {thing}."
        return rng.choice(DESCRIBE_SOUND), f"This is {sound_captions.canonical(content)}."


def link(bank: SoundBank, concepts: Iterable[Concept]) -> tuple[dict[str, Sound], dict[str, str]]:
    """Concepts that are heard: label of the concept -> its plain sound, and label of the sound -> label of the concept.

    A concept and a sound are the same thing where a name of the one ("saxophone",
    "dog") is a name of the other, articles
    and the word "face" of many icons aside.
    """
    sounds: dict[str, Sound] = {row.name: Sound(kind="music", label=row.name) for row in bank.instruments}
    sounds |= {row.name: Sound(kind="beat", label=row.name) for row in bank.percussion}
    for effect in bank.effects:
        for name in (effect.label, *effect.aliases):
            sounds.setdefault(re.sub(r"^an? ", "", name), Sound(kind="effect", label=effect.label))
    heard: dict[str, Sound] = {}
    seen: dict[str, str] = {}
    for concept in sorted(concepts, key=lambda concept: concept.label.endswith(" face")):  # the whole animal first
        names = (concept.label, concept.label.removesuffix(" face"), *concept.aliases)
        found = next((sounds[name] for name in names if name in sounds), None)
        if found is not None:
            heard[concept.label] = found
            seen.setdefault(found.label, concept.label)
    return heard, seen


def _without_noun(words: str) -> str:
    """'a flat clip of a dog' reads badly behind 'make a video of'."""
    return re.sub(r"^an? (?:(?:\S+ )?(?:clip|video|animation|short video|film)) of ", "", words)


def by_modality(wishes: Iterable[Wishes]) -> Mapping[str, Wishes]:
    """Modality -> its wishes, in the order given."""
    return {one.modality: one for one in wishes}


def wishes_of(modalities: Sequence[str], icons: IconSet, bank: SoundBank | None) -> list[Wishes]:
    """What can be asked for, one for each output modality; audio needs a sound bank."""
    made: dict[str, Callable[[], Wishes]] = {
        "image": lambda: ImageWishes(icons.concepts),
        "video": lambda: ClipWishes(icons.concepts),
        "audio": lambda: SoundWishes(cast(SoundBank, bank), icons.concepts),
    }
    return [made[modality]() for modality in modalities]


def captions_of(wishes: Wishes, count: int, seed: int) -> list[str]:
    """Captions of random wishes, to measure a generator's conditions by."""
    rng = random.Random(f"{seed}/{wishes.modality}")
    return [wishes.caption(wishes.wish(rng).content) for _ in range(count)]
