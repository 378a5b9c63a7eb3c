"""What an evaluation asks for: pictures by caption and by held-out request, and the messages no training has read.

The wordings (`words/heldout_*.json`, `QUESTIONS`, `phrase`) are written apart from those of the training.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from anygen.training.captions import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    Drawing,
    random_drawing,
    subject,
    with_article,
)
from anygen.training.compose import compose, make_backgrounds
from anygen.training.icons import IconSet
from anygen.training.measures import background_colour, count_things, place_of
from anygen.training.pictures import is_held_out

WORDS = Path(__file__).parent / "words"
QUESTIONS = (
    "Would you tell me what this is?",
    "What do you see here?",
    "Name the thing in the picture.",
    "what's that",
    "Can you tell me what this picture shows?",
    "Which object is this?",
    "Any idea what I have in front of me here?",
    "Identify the object, please.",
    "Can you recognise the thing shown?",
    "Hey, what is in this image?",
    "I found this icon. What does it show?",
    "Please say in a few words what is depicted.",
    "My daughter wants to know what this is.",
    "Which words fit this image best?",
    "wat is in the pic?",
    "Describe the picture.",
)
"""About a picture."""


@dataclass(frozen=True, slots=True)
class Control:
    """Something that can be asked for beside a concept, and how to see it in a picture."""

    field: str
    """Of `Drawing`."""
    values: tuple[Any, ...]
    read: Callable[[Tensor], Any]
    """float[3, S, S] -> the value that the picture has."""

    def holds(self, drawing: Drawing, picture: Tensor) -> bool:
        """Whether the picture has what the drawing asks for."""
        return self.read(picture) == getattr(drawing, self.field)


CONTROLS = {
    "background colour": Control("background", tuple(c for c in COLOURS if c != "white"), background_colour),
    "count": Control("count", (2, 3, 4), count_things),
    "place": Control("place", tuple(PLACES), place_of),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A picture to be asked for in two ways: by its canonical caption, and by a request."""

    concept: int
    drawing: Drawing
    """What the picture should show."""
    request: str
    """The same in a held-out request."""
    seed: int
    """Of the picture's noise."""


def held_out_requests() -> dict[str, list[str]]:
    """ "image", "images" and "text" -> messages with slots {x}, and for images {y}, for what is to be drawn."""
    found: dict[str, list[str]] = {}
    for entry in json.loads((WORDS / "heldout_requests.json").read_text(encoding="utf-8")):
        found.setdefault(entry["modality"], []).append(entry["text"])
    return found


def held_out_chat() -> list[str]:
    """Small talk and plain questions."""
    return json.loads((WORDS / "heldout_chat.json").read_text(encoding="utf-8"))


def phrase(drawing: Drawing, rng: random.Random) -> str:
    """A drawing in free words: 'a red apple on the left in the flat style with a blue background'."""
    style, place = drawing.style, drawing.place or ""
    thing, ground = subject(drawing), ""
    if drawing.background in COLOURS:
        joint = rng.choice(("on", "with", "against"))
        ground = f"{joint} {with_article(f'{drawing.background} background')}"
    elif drawing.background:
        ground = next(words for words, scene in BACKGROUNDS.items() if scene == drawing.background)
    forms: list[tuple[str, ...]] = [(thing, place, ground)]
    if style:
        forms = [
            (thing, place, f"in the {style} style", ground),
            (thing, place, f"in {style} style", ground),
            (thing, place, ground, f"in the {style} style"),
        ]
        if drawing.count == 1 and not drawing.size:
            forms.append((with_article(f"{style} {drawing.label}"), place, ground))
    return " ".join(part for part in rng.choice(forms) if part)


def pair_cases(icons: IconSet, count: int, seed: int) -> list[Case]:
    """Different (concept, style) pairs, plain on white; one request in five says another name of the concept."""
    rng, templates = random.Random(seed), held_out_requests()["image"]
    order = list(range(len(icons.style)))
    rng.shuffle(order)
    cases = []
    for icon in order[:count]:
        number = int(icons.concept[icon])
        concept = icons.concepts[number]
        drawing = Drawing(label=concept.label, style=icons.style[icon])
        renamed = bool(concept.aliases) and rng.random() < 0.2
        said = replace(drawing, label=rng.choice(concept.aliases)) if renamed else drawing
        request = rng.choice(templates).replace("{x}", phrase(said, rng))
        cases.append(Case(concept=number, drawing=drawing, request=request, seed=seed + len(cases)))
    return cases


def control_cases(icons: IconSet, control: Control, count: int, seed: int) -> list[Case]:
    """Held-out combinations whose true picture the control reads rightly: pairs of shoes cannot be counted."""
    rng, templates = random.Random(seed), held_out_requests()["image"]
    candidates = list(product(range(len(icons.style)), control.values))
    rng.shuffle(candidates)
    cases: list[Case] = []
    for icon, value in candidates:
        if len(cases) == count:
            break
        number = int(icons.concept[icon])
        plain = Drawing(label=icons.concepts[number].label, style=icons.style[icon], background="white")
        drawing = replace(plain, **{control.field: value})
        if not is_held_out(drawing, number):
            continue
        ground = make_backgrounds([drawing], {}, icons.pixels.shape[-1], rng, icons.pixels.device)
        if control.holds(drawing, compose(icons.pixels[[icon]], [drawing], ground)[0]):
            drawing = _unsaid_white(drawing)
            request = rng.choice(templates).replace("{x}", phrase(drawing, rng))
            cases.append(Case(concept=number, drawing=drawing, request=request, seed=seed + len(cases)))
    return cases


def routing_cases(icons: IconSet, limit: int | None, seed: int) -> list[tuple[str, str]]:
    """(message, modality asked for): each held-out message once, its slots filled by drawings of any layout.

    Args:
        icons: what may be asked for.
        limit: the most messages of one modality.
        seed: of the drawings.
    """
    rng = random.Random(seed)

    def drawing() -> Drawing:
        icon = rng.randrange(len(icons.style))
        drawn = random_drawing(icons.concepts[int(icons.concept[icon])], icons.style[icon], rng)
        return _unsaid_white(replace(drawn, style=drawn.style if rng.random() < 0.5 else None))

    cases = []
    for modality, templates in held_out_requests().items():
        for template in templates if limit is None else rng.sample(templates, min(limit, len(templates))):
            # nobody asks what a small red apple on the left is used for: plain questions get the bare thing
            x = with_article(drawing().label) if modality == "text" else phrase(drawing(), rng)
            message = template.replace("{y}", phrase(drawing(), rng)).replace("{x}", x)
            cases.append((message, modality))
    return cases


def _unsaid_white(drawing: Drawing) -> Drawing:
    return replace(drawing, background=None) if drawing.background == "white" else drawing
