"""Pictures from icons: copies placed on a plain colour or a view cut from a panorama, in batches, on any device.

Shapes: B batch, S side.
"""

import random
from collections.abc import Sequence

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


def compose(icons: Tensor, drawings: Sequence[Drawing], backgrounds: Tensor) -> Tensor:
    """Puts each icon on its background as its drawing says.

    Args:
        icons: uint8[B, 4, S, S], straight RGBA.
        drawings: B of them.
        backgrounds: float[B, 3, S, S] in [0, 1].

    Returns:
        float[B, 3, S, S] in [0, 1].
    """
    rgba = icons.float() / 255
    premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    spots = [placements(drawing) for drawing in drawings]
    canvas = backgrounds
    for layer in range(max(len(spot) for spot in spots)):
        rows = [row for row, spot in enumerate(spots) if len(spot) > layer]
        placed = [spots[row][layer] for row in rows]
        theta = torch.tensor([((1 / s, 0, -2 * x / s), (0, 1 / s, -2 * y / s)) for x, y, s in placed])
        index = torch.tensor(rows, device=icons.device)
        source = premultiplied[index]
        shrinks = [scale < 0.6 for _, _, scale in placed]
        if any(shrinks):  # bilinear sampling of a shrunk icon aliases: blur what will shrink
            shrunk = torch.tensor(shrinks, device=icons.device)
            soft = F.avg_pool2d(F.pad(source, (1, 0, 1, 0), mode="replicate"), 2, stride=1)
            source = torch.where(shrunk[:, None, None, None], soft, source)
        grid = F.affine_grid(theta.to(icons.device), list(source.shape), align_corners=False)
        layer_rgba = F.grid_sample(source, grid, align_corners=False)
        painted = layer_rgba[:, :3] + (1 - layer_rgba[:, 3:]) * canvas[index]
        canvas = canvas.index_copy(0, index, painted)
    return canvas.clamp(0, 1)


def make_backgrounds(
    drawings: Sequence[Drawing], panoramas: dict[str, Tensor], side: int, rng: random.Random, device: torch.device
) -> Tensor:
    """A plain colour, or a soft view out of the panorama at a random heading: float[B, 3, S, S] in [0, 1]."""
    names = [drawing.background or "white" for drawing in drawings]
    plain = torch.tensor([COLOURS.get(name, (0, 0, 0)) for name in names], device=device) / 255
    out = plain[:, :, None, None].expand(-1, -1, side, side).contiguous()
    rows = [row for row, name in enumerate(names) if name not in COLOURS]
    if not rows:
        return out
    scenes = list(panoramas)
    views = torch.stack([panoramas[name] for name in scenes]).to(device)  # uint8[P, 3, 256, 512]
    height, width = views.shape[-2:]
    which = torch.tensor([scenes.index(names[row]) for row in rows], device=device)
    heading = torch.tensor([rng.randrange(width) for _ in rows], device=device)
    top = torch.tensor([height // 2 - int(side * rng.uniform(0.5, 0.62)) for _ in rows], device=device)
    line = torch.arange(side, device=device)
    y, x = top[:, None] + line, (heading[:, None] + line) % width
    crops = views[which[:, None, None], :, y[:, :, None], x[:, None, :]]  # [R, S, S, 3]
    # Out of focus, as behind a subject: the thing asked for stays the sharpest.
    soft = F.avg_pool2d(crops.permute(0, 3, 1, 2).float() / 255, 2)
    out[torch.tensor(rows, device=device)] = F.interpolate(soft, size=side, mode="bilinear", align_corners=False)
    return out
