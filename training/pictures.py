"""A reservoir of composed pictures with what they show, drawn at random and kept on the training device."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anygen.training.captions import Drawing, random_drawing
from anygen.training.compose import compose, make_backgrounds
from anygen.training.icons import IconSet

HELD_OUT_EVERY = 41
"""Of the (style, scene, layout) combinations, the share kept for measuring: one in so many."""


def is_held_out(drawing: Drawing, concept: int) -> bool:
    """Whether this combination of concept, style, layout and background is never trained on.

    A stable hash of the content decides, so that every process and every part of the system agrees. Plain pictures
    (one of normal size in the middle, on white) are never held out: there is but one of each.
    """
    if drawing.count == 1 and not drawing.size and not drawing.place and drawing.background in (None, "white"):
        return False
    key = f"{concept}|{drawing.style}|{drawing.count}|{drawing.size}|{drawing.place}|{drawing.background}"
    return sum((position + 1) * ord(letter) for position, letter in enumerate(key)) % HELD_OUT_EVERY == 0


@dataclass(frozen=True, slots=True)
class PictureBatch:
    """Composed pictures and their content."""

    pixels: Tensor
    """float[B, 3, S, S] in [0, 1]."""
    icons: list[int]
    """B indices into the icon set."""
    drawings: list[Drawing]


class PictureSource:
    """Endless composed pictures: every icon in turn, in a seeded order, with a random layout and background."""

    def __init__(
        self, icons: IconSet, *, seed: int, device: torch.device | str = "cpu", held_out: bool = False
    ) -> None:
        self.icons, self.device, self.held_out = icons, torch.device(device), held_out
        self.pixels = icons.pixels.to(self.device)
        self.panoramas = {name: view.to(self.device) for name, view in icons.panoramas.items()}
        self.rng = random.Random(seed)

    def batches(self, size: int) -> Iterator[PictureBatch]:
        """Batches of `size`; each pass over the icons is shuffled anew."""
        queue: list[int] = []
        while True:
            while len(queue) < size:
                order = list(range(len(self.pixels)))
                self.rng.shuffle(order)
                queue += order
            yield self.make(queue[:size])
            del queue[:size]

    def make(self, icons: list[int]) -> PictureBatch:
        """One picture of each icon of the list."""
        drawings = [self._draw(icon) for icon in icons]
        side = self.pixels.shape[-1]
        grounds = make_backgrounds(drawings, self.panoramas, side, self.rng, self.device)
        return PictureBatch(compose(self.pixels[icons], drawings, grounds), icons, drawings)

    def _draw(self, icon: int) -> Drawing:
        concept = int(self.icons.concept[icon])
        while True:
            drawing = random_drawing(self.icons.concepts[concept], self.icons.style[icon], self.rng)
            if is_held_out(drawing, concept) == self.held_out:
                return drawing


def load_icons(directory: str | Path, checksum: str | None) -> IconSet:
    """The trained styles of a built icon set, refused if it is not the one that the recipe pins.

    Raises:
        ConfigError: the checksum differs.
    """
    from anygen.errors import ConfigError

    icons = IconSet.load(Path(directory))
    if checksum is not None and icons.checksum != checksum:
        raise ConfigError(f"the recipe pins the icon set {checksum[:12]}…, {directory} holds {icons.checksum[:12]}…")
    return icons
