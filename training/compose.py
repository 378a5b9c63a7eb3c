"""Pictures from icons: copies placed on a plain colour or a view cut from a panorama, in batches, on any device.

What a batch's drawings decide is gathered in arrays on the host and copied once, without waiting for the device: a
fast device is then bound by its own work, not by many small copies.

Shapes: B batch, S side, M placed copies, P panoramas, R pictures before one.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.training.captions import COLOURS, PLACES, Drawing

_LAYOUTS: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((0.0, 0.0),),
    2: ((-0.25, 0.0), (0.25, 0.0)),
    3: ((-0.25, 0.22), (0.25, 0.22), (0.0, -0.24)),
    4: ((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25)),
}
NORMAL, SMALL, BIG, COUNTED = 0.88, 0.45, 1.15, 0.46
"""Side of an icon in canvas widths."""


def placements(drawing: Drawing) -> list[tuple[float, float, float]]:
    """(x, y, scale) of each copy: centre in canvas widths from the middle, side in canvas widths."""
    if drawing.count > 1:
        return [(x, y, COUNTED) for x, y in _LAYOUTS[drawing.count]]
    x, y = PLACES[drawing.place] if drawing.place else (0.0, 0.0)
    small = drawing.size == "small" or (drawing.place is not None and drawing.size != "big")
    return [(x, y, SMALL if small else BIG if drawing.size == "big" else NORMAL)]


@dataclass(frozen=True, slots=True)
class Panoramas:
    """Views to cut backgrounds from, stacked on one device."""

    row: Mapping[str, int]
    """Name -> index."""
    views: Tensor
    """uint8[P, H, W, 3]; W goes once around."""

    @classmethod
    def stack(cls, panoramas: Mapping[str, Tensor], device: torch.device) -> Self:
        """Name -> uint8[3, H, W], all of one size and at least one."""
        views = torch.stack(list(panoramas.values())).permute(0, 2, 3, 1).contiguous()
        return cls({name: row for row, name in enumerate(panoramas)}, views.to(device))


def compose(icons: Tensor, drawings: Sequence[Drawing], backgrounds: Tensor) -> Tensor:
    """Puts each icon on its background as its drawing says.

    Args:
        icons: uint8[B, 4, S, S], straight RGBA.
        drawings: B of them.
        backgrounds: float[B, 3, S, S] in [0, 1].

    Returns:
        float[B, 3, S, S] in [0, 1].
    """
    spots = [placements(drawing) for drawing in drawings]
    source = icons.float() / 255
    source[:, :3] *= source[:, 3:]  # premultiplied
    shrunk = np.array([row for row, spot in enumerate(spots) if spot[0][2] < 0.6])
    if len(shrunk):  # bilinear sampling of a shrunk icon aliases: blur what will shrink
        index = _ship(shrunk, icons.device)
        padded = F.pad(source[index], (1, 0, 1, 0), mode="replicate")
        source.index_copy_(0, index, F.avg_pool2d(padded, 2, stride=1))
    # All first copies, then all second ones, and so on: a later copy lies over an earlier one.
    layers = [[row for row, spot in enumerate(spots) if len(spot) > layer] for layer in range(max(map(len, spots)))]
    placed = np.array([spots[row][layer] for layer, rows in enumerate(layers) for row in rows])  # [M, 3]
    x, y, scale = placed.T
    views = _ship(np.stack([1 / scale, -2 * x / scale, -2 * y / scale], 1).astype(np.float32), icons.device)
    indices = _ship(np.concatenate(layers), icons.device)
    sizes = [len(rows) for rows in layers]
    first, *others = zip(indices.split(sizes), views.split(sizes), strict=True)
    canvas = _paint(source, first[1], backgrounds)  # the first layer has every row, in order
    for index, view in others:
        canvas.index_copy_(0, index, _paint(source[index], view, canvas[index]))
    return canvas.clamp(0, 1)


def _paint(source: Tensor, view: Tensor, canvas: Tensor) -> Tensor:
    """Premultiplied float[B, 4, S, S] over float[B, 3, S, S], enlarged and moved by view float[B, 3].

    A view is (1 / scale, x shift, y shift): `F.affine_grid` without its matrix product, which runs in TF32 on a GPU.
    """
    side = source.shape[-1]
    line = (2 * torch.arange(side, device=source.device) + 1) / side - 1
    x, y = line * view[:, :1] + view[:, 1:2], line * view[:, :1] + view[:, 2:]  # [B, S]
    grid = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1)
    rgba = F.grid_sample(source, grid, align_corners=False)
    return rgba[:, :3] + (1 - rgba[:, 3:]) * canvas


def make_backgrounds(
    drawings: Sequence[Drawing],
    panoramas: Panoramas | Mapping[str, Tensor],
    side: int,
    rng: random.Random,
    device: torch.device,
) -> Tensor:
    """A plain colour, or a soft view out of the panorama at a random heading: float[B, 3, S, S] in [0, 1].

    Whoever makes many batches stacks the panoramas once.
    """
    names = [drawing.background or "white" for drawing in drawings]
    plain = _ship(np.array([COLOURS.get(name, (0, 0, 0)) for name in names], dtype=np.float32), device) / 255
    out = plain[:, :, None, None].expand(-1, -1, side, side).contiguous()
    rows = [row for row, name in enumerate(names) if name not in COLOURS]
    if not rows:
        return out
    if not isinstance(panoramas, Panoramas):
        panoramas = Panoramas.stack(panoramas, device)
    height, width = panoramas.views.shape[1:3]
    which = [panoramas.row[names[row]] for row in rows]
    headings = [rng.randrange(width) for _ in rows]
    tops = [height // 2 - int(side * rng.uniform(0.5, 0.62)) for _ in rows]
    index, view, heading, top = _ship(np.array([rows, which, headings, tops]), device)
    line = torch.arange(side, device=device)
    y, x = top[:, None] + line, (heading[:, None] + line) % width
    crops = panoramas.views[view[:, None, None], y[:, :, None], x[:, None, :]]  # [R, S, S, 3]
    # Out of focus, as behind a subject: the thing asked for stays the sharpest.
    soft = F.avg_pool2d(crops.permute(0, 3, 1, 2).float() / 255, 2)
    return out.index_copy_(0, index, F.interpolate(soft, size=side, mode="bilinear", align_corners=False))


def _ship(values: np.ndarray, device: torch.device) -> Tensor:
    """To the device without waiting for what it has still to do."""
    return torch.from_numpy(values).to(device, non_blocking=True)
