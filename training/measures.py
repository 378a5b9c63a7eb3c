"""What a picture shows and what an answer names, by simple signal analysis and word matching, without any model.

Shapes: N icons, B batch, S side in pixels.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.training.captions import BACKGROUNDS, COLOURS, PLACES, Drawing, plural
from anygen.training.compose import compose
from anygen.training.icons import STYLES, Concept, IconSet
from anygen.training.motion import MOTIONS

GRID = 32
"""Pictures are compared averaged to this side."""
TWIN = 0.1
"""Icons nearer than this (half a grey level a value) are one drawing under two names, as 'cat face' and 'grinning cat'
in one style: to show one is to show the other."""


def on_white(icons: IconSet, rows: Sequence[int]) -> Tensor:
    """Those icons as training shows them plain: float[B, 3, S, S] in [0, 1]."""
    pixels = icons.pixels[list(rows)]
    white = torch.ones(len(pixels), 3, *pixels.shape[-2:])
    return compose(pixels, [Drawing(label="")] * len(pixels), white)


class NearestIcon:
    """Tells which icon of a set a picture looks like: the nearest by L2 at 32×32 pixels."""

    def __init__(self, icons: IconSet) -> None:
        self.icons = icons
        count = len(icons.pixels)
        parts = [shrink(on_white(icons, range(first, min(first + 256, count)))) for first in range(0, count, 256)]
        self.vectors = torch.cat(parts)  # [N, 3 * 32 * 32]

    def find(self, pictures: Tensor) -> list[int]:
        """float[B, 3, S, S] in [0, 1] -> B icons."""
        return torch.cdist(shrink(pictures), self.vectors).argmin(1).tolist()

    def shows(self, icon: int, concept: int) -> bool:
        """Whether the drawing of `icon` is one of `concept`, be it as the twin of another."""
        own = self.vectors[self.icons.concept == concept]
        return bool(((own - self.vectors[icon]).norm(dim=1) < TWIN).any())

    def label(self, icon: int) -> str:
        """The name of what it shows."""
        return self.icons.concepts[int(self.icons.concept[icon])].label


def shrink(pictures: Tensor) -> Tensor:
    """float[B, 3, S, S] -> float[B, 3 * 32 * 32]."""
    return F.adaptive_avg_pool2d(pictures.float(), GRID).flatten(1)


def border(picture: Tensor) -> Tensor:
    """The median colour of the outermost pixels (one in 32 of the side): float[3, S, S] -> float[3]."""
    frame = torch.ones(picture.shape[-2:], dtype=torch.bool)
    width = max(1, picture.shape[-1] // 32)
    frame[width:-width, width:-width] = False
    return picture[:, frame].median(dim=1).values


def background_colour(picture: Tensor) -> str:
    """The colour word nearest to the border."""
    words = torch.tensor(list(COLOURS.values())) / 255
    return list(COLOURS)[int((words - border(picture)).norm(dim=1).argmin())]


def foreground(picture: Tensor, threshold: float = 0.12) -> Tensor:
    """Where a channel differs from the border by more than the threshold: float[3, S, S] -> bool[S, S]."""
    return ((picture - border(picture)[:, None, None]).abs() > threshold).any(0)


def count_things(picture: Tensor) -> int:
    """Connected parts of the foreground, gaps of a few pixels bridged, specks left out."""
    from scipy.ndimage import binary_dilation, label

    reach = max(1, picture.shape[-1] // 64)
    parts = cast(Any, label(binary_dilation(foreground(picture).numpy(), iterations=reach)))[0]
    sizes = torch.from_numpy(parts).flatten().bincount()[1:]
    return int((sizes > 0.2 * sizes.max()).sum()) if len(sizes) else 0


def place_of(picture: Tensor) -> str | None:
    """The words of the place nearest to the foreground's centre of mass; None for the middle."""
    rows, columns = foreground(picture).nonzero(as_tuple=True)
    if len(rows) == 0:
        return None
    x, y = ((line.float().mean() + 0.5) / picture.shape[-1] - 0.5 for line in (columns, rows))
    anchors: dict[str | None, tuple[float, float]] = {None: (0.0, 0.0), **PLACES}
    return min(anchors, key=lambda words: float((anchors[words][0] - x) ** 2 + (anchors[words][1] - y) ** 2))


class Names:
    """Finds the concepts that a text names, by label, alias or the plural of either, as whole words.

    The longest name counts: 'a green apple' names the green apple, not the apple that is red by default; and words
    for places, styles and backgrounds ('at night') name nothing.
    """

    def __init__(self, concepts: Sequence[Concept]) -> None:
        layout = [*BACKGROUNDS, *PLACES]
        layout += [form for style in STYLES for form in (f"in the {style.word} style", f"in {style.word} style")]
        layout += [words for motion, others in MOTIONS.items() for words in (motion, *others)]
        self._names: dict[tuple[str, ...], set[int]] = {_words(phrase): set() for phrase in layout}
        for number, concept in enumerate(concepts):
            for name in (concept.label, *concept.aliases):
                for form in (name, plural(name)):
                    self._names.setdefault(_words(form), set()).add(number)
        self._longest = max(map(len, self._names))

    def named(self, text: str) -> set[int]:
        """The numbers of the concepts that are named."""
        words, found, place = _words(text), set[int](), 0
        while place < len(words):
            length = next((n for n in range(self._longest, 0, -1) if words[place : place + n] in self._names), 0)
            if length:
                found |= self._names[words[place : place + length]]
            place += max(length, 1)
        return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9']+", text.lower()))
