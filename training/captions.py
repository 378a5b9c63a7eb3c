"""What a training picture shows, and the words for it.

A `Drawing` names everything that captions control: concept, style, count, size, place, background. `canonical` writes
the one caption that the model's own answers use; `varied` writes the many forms in which people say the same.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from operator import mul
from typing import Literal

from anygen.training.icons import SCENES, TRAINED_STYLES, Concept

Size = Literal["small", "big"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (20, 20, 22),
    "gray": (150, 150, 155),
    "red": (225, 60, 55),
    "orange": (250, 155, 50),
    "yellow": (255, 222, 80),
    "green": (75, 185, 90),
    "blue": (60, 115, 225),
    "purple": (140, 85, 200),
    "pink": (255, 175, 200),
    "brown": (140, 95, 60),
    "turquoise": (70, 205, 205),
}
"""Background colour words and their sRGB values."""

PLACES: dict[str, tuple[float, float]] = {
    "on the left": (-0.25, 0.0),
    "on the right": (0.25, 0.0),
    "at the top": (0.0, -0.25),
    "at the bottom": (0.0, 0.25),
    "in the top left corner": (-0.26, -0.26),
    "in the top right corner": (0.26, -0.26),
    "in the bottom left corner": (-0.26, 0.26),
    "in the bottom right corner": (0.26, 0.26),
}
"""Where a small icon's centre lies, in canvas widths from the middle (x to the right, y down)."""

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}

BACKGROUNDS: dict[str, str] = {f"on a {c} background": c for c in COLOURS} | {w: s for s, w in SCENES.items()}
"""Caption words -> colour or panorama; "an" for the vowel."""
BACKGROUNDS["on an orange background"] = BACKGROUNDS.pop("on a orange background")
_WORDS_OF = {background: words for words, background in BACKGROUNDS.items()}


HELD_OUT_EVERY = 41
"""Of the combinations that captions can state, the share kept for measuring: one in so many."""


def keeps_out(key: str) -> bool:
    """Whether the combination that `key` spells out is one of those.

    A hash of the content, the same in every process, decides, so that every part of the system agrees.
    """
    return sum(map(mul, count(1), map(ord, key))) % HELD_OUT_EVERY == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One picture's content. None means that the caption leaves it open."""

    label: str
    """The concept's name, or one of its aliases."""
    style: str | None = None
    count: int = 1
    size: Size | None = None
    place: str | None = None
    background: str | None = None
    """A colour word or a panorama's name; unsaid, it is white."""


def plural(label: str) -> str:
    """'red apple' -> 'red apples', 'slice of pizza' -> 'slices of pizza', 'fox' -> 'foxes'."""
    head, joint, rest = label, "", ""
    if match := re.match(r"(.+?)( (?:of|with|in|on|at|and|holding|facing|without) )(.+)", label):
        head, joint, rest = match.groups()
    irregular = {
        "man": "men",
        "woman": "women",
        "mouse": "mice",
        "person": "people",
        "child": "children",
        "foot": "feet",
    }
    irregular |= {
        "tooth": "teeth",
        "leaf": "leaves",
        "knife": "knives",
        "fish": "fish",
        "sheep": "sheep",
        "wolf": "wolves",
    }
    *before, last = head.split(" ")
    if last.lower() in irregular:
        last = irregular[last.lower()]
    elif re.search(r"(?:s|x|z|ch|sh)$", last):
        last += "" if last.endswith("s") and not last.endswith("ss") else "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    elif last[-1:].isalpha():
        last += "s"
    return " ".join([*before, last]) + joint + rest


_MASS = {
    "spaghetti",
    "cooked rice",
    "bread",
    "butter",
    "cheese",
    "sushi",
    "ice",
    "salt",
    "honey pot",
    "money",
    "thread",
}


def with_article(label: str) -> str:
    """'apple' -> 'an apple'; names that take none (plurals, Aries, two o'clock) stay bare."""
    last = label.split(" ")[-1]
    if label in _MASS or label[:1].isupper() or re.search(r"o'clock$|-thirty$", label):
        return label
    if last.endswith("s") and not re.search(r"(?:ss|us|is)$", last):
        return label
    vowel = re.match(r"(?:[aeio]|u(?!ni|se|k))", label.lower()) or label.lower().startswith(("x-ray", "hour"))
    return f"{'an' if vowel else 'a'} {label}"


def subject(drawing: Drawing) -> str:
    """'a small red apple', 'three dogs'."""
    size = f"{drawing.size} " if drawing.size else ""
    if drawing.count == 1:
        return with_article(size + drawing.label) if not size else f"a {size}{drawing.label}"
    return f"{NUMBERS[drawing.count]} {size}{plural(drawing.label)}"


def canonical(drawing: Drawing) -> str:
    """'a small red apple on the left, in the flat style, on a blue background'.

    Only what the drawing states is said, always in this order.
    """
    words = subject(drawing) + (f" {drawing.place}" if drawing.place else "")
    if drawing.style:
        words += f", in the {drawing.style} style"
    if drawing.background:
        words += f", {_WORDS_OF[drawing.background]}"
    return words


def varied(drawing: Drawing, rng: random.Random) -> str:
    """The same content in one of many forms: tags, style first, no article, "apple (flat)"."""
    style, where = drawing.style, drawing.place or ""
    thing, background = subject(drawing), _WORDS_OF[drawing.background] if drawing.background else ""
    form = rng.randrange(6)
    if form == 0:  # tags
        parts = [thing.split(" ", 1)[-1] if drawing.count == 1 and thing.startswith(("a ", "an ")) else thing]
        parts += [part for part in (where, style, background) if part]
        return ", ".join(parts)
    if form == 1 and style:  # style first
        bare = plural(drawing.label) if drawing.count > 1 else drawing.label
        size, number = f"{drawing.size} " if drawing.size else "", f"{NUMBERS[drawing.count]} "
        head = f"{number if drawing.count > 1 else 'a '}{size}{style} {bare}"
        return " ".join(part for part in (head, where, background) if part)
    if form == 2:  # a picture of …
        noun = rng.choice(["picture", "drawing", "icon", "image", "illustration"])
        kind = f"{style} {noun}" if style else noun
        return " ".join(part for part in (f"{with_article(kind)} of {thing}", where, background) if part)
    if form == 3 and background:  # background first
        return ", ".join(
            part for part in (background, f"{thing} {where}".strip(), f"{style} style" if style else "") if part
        )
    styled = f" in {style} style" if style else ""
    sentence = " ".join(part for part in (thing + styled, where, background) if part)
    return sentence if form == 4 else canonical(drawing)


def random_drawing(
    concept: Concept, style: str, rng: random.Random, *, scenes: Sequence[str] = tuple(SCENES)
) -> Drawing:
    """Draws layout and background: half plain, the rest sized, placed or counted, over white, colours and scenes."""
    layout = rng.choices(["plain", "sized", "placed", "counted"], [0.56, 0.12, 0.16, 0.16])[0]
    ground = rng.choices(["white", "colour", "scene"], [0.46, 0.32, 0.22])[0]
    others = [colour for colour in COLOURS if colour != "white"]
    return Drawing(
        label=concept.label,
        style=style,
        size=rng.choice(["small", "big"]) if layout == "sized" else None,
        place=rng.choice(list(PLACES)) if layout == "placed" else None,
        count=rng.choice([2, 3, 4]) if layout == "counted" else 1,
        background={"white": "white", "colour": rng.choice(others), "scene": rng.choice(list(scenes))}[ground],
    )


def said(drawing: Drawing, concept: Concept, rng: random.Random, *, open_style: float = 0.15) -> Drawing:
    """What a speaker says of it: white mostly goes unsaid, style sometimes, and an alias may stand for the label."""
    return replace(
        drawing,
        label=rng.choice(concept.aliases) if concept.aliases and rng.random() < 0.15 else drawing.label,
        style=None if rng.random() < open_style else drawing.style,
        background=None if drawing.background == "white" and rng.random() < 0.7 else drawing.background,
    )


def caption_corpus(concepts: Sequence[Concept], seed: int, per_concept: int = 12) -> list[str]:
    """Captions over all concepts, for training the tokenizer."""
    rng = random.Random(seed)
    texts = []
    for concept in concepts:
        texts += [concept.label, *concept.aliases]
        for _ in range(per_concept):
            drawing = said(random_drawing(concept, rng.choice(TRAINED_STYLES), rng), concept, rng)
            texts.append(varied(drawing, rng))
    return texts
