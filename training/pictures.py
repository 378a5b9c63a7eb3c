"""Composed pictures with what they show: an endless source, and a pool of them kept on the training device."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from anygen.training.captions import Drawing, keeps_out, random_drawing
from anygen.training.compose import Panoramas, compose, make_backgrounds
from anygen.training.icons import IconSet


def is_held_out(drawing: Drawing, concept: int) -> bool:
    """Whether this combination of concept, style, layout and background is never trained on.

    A stable hash of the content decides, so that every process and every part of the system agrees. Plain pictures
    (one of normal size in the middle, on white) are never held out: there is but one of each.
    """
    if drawing.count == 1 and not drawing.size and not drawing.place and drawing.background in (None, "white"):
        return False
    key = f"{concept}|{drawing.style}|{drawing.count}|{drawing.size}|{drawing.place}|{drawing.background}"
    return keeps_out(key)


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
        self.panoramas = Panoramas.stack(icons.panoramas, self.device)
        self.rng = random.Random(seed)
        self._concepts: list[int] = icons.concept.tolist()

    def batches(self, size: int) -> Iterator[PictureBatch]:
        """Batches of `size`, without end; each pass over the icons is shuffled anew."""
        turns = self._turns()
        while True:
            yield self.make(list(islice(turns, size)))

    def pictures(self, number: int, most: int = 512) -> Iterator[PictureBatch]:
        """So many pictures, in batches of at most `most`."""
        turns = self._turns()
        for first in range(0, number, most):
            yield self.make(list(islice(turns, min(most, number - first))))

    def make(self, icons: list[int], drawings: list[Drawing] | None = None) -> PictureBatch:
        """One picture of each icon of the list, with the layouts and backgrounds given, or random ones."""
        drawings = [self._draw(icon) for icon in icons] if drawings is None else drawings
        side = self.pixels.shape[-1]
        grounds = make_backgrounds(drawings, self.panoramas, side, self.rng, self.device)
        # Nothing here waits for the device: the next batch is drawn while it composes this one.
        chosen = self.pixels[torch.tensor(icons).to(self.device, non_blocking=True)]
        return PictureBatch(compose(chosen, drawings, grounds), icons, drawings)

    def _turns(self) -> Iterator[int]:
        while True:
            order = list(range(len(self.pixels)))
            self.rng.shuffle(order)
            yield from order

    def _draw(self, icon: int) -> Drawing:
        concept = self._concepts[icon]
        while True:
            drawing = random_drawing(self.icons.concepts[concept], self.icons.style[icon], self.rng)
            if is_held_out(drawing, concept) == self.held_out:
                return drawing


class PicturePool:
    """Pictures composed once, with what they show; a random batch of them is then one gather on the device."""

    def __init__(self, source: PictureSource, number: int) -> None:
        """Composes `number` pictures of `source`."""
        side, device = source.pixels.shape[-1], source.device
        # uint8[N, 3, S, S], channels last in memory: batches come out as convolutions want them.
        self.pixels = torch.empty(number, side, side, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        self.icons: list[int] = []
        self.drawings: list[Drawing] = []
        for batch in source.pictures(number):
            first, last = len(self.icons), len(self.icons) + len(batch.icons)
            self.pixels[first:last] = (batch.pixels * 255).round()
            self.icons += batch.icons
            self.drawings += batch.drawings

    def __len__(self) -> int:
        return len(self.pixels)

    def draw(self, size: int) -> Tensor:
        """float[B, 3, S, S] in [-1, 1], channels last, drawn with replacement."""
        rows = torch.randint(len(self), (size,), device=self.pixels.device)
        return self.pixels.permute(0, 2, 3, 1)[rows].permute(0, 3, 1, 2).float() / 127.5 - 1


def turned(pixels: Tensor, share: float) -> Tensor:
    """The first rows as they are, the last `share` of them mirrored, turned or both: float[B, 3, S, S].

    A batch's rows are drawn at random, so which of them is turned need not be. The symmetries of the square other than
    the identity, seven, get equal numbers of rows.
    """
    kept = len(pixels) - round(share * len(pixels))
    parts = [pixels[:kept]]
    for number, part in enumerate(pixels[kept:].tensor_split(7), start=1):
        turn = part.rot90(number % 4, (2, 3))
        parts.append(turn.flip(3) if number > 3 else turn)
    return torch.cat(parts).contiguous(memory_format=torch.channels_last)


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
