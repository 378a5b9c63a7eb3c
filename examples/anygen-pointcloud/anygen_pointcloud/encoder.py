"""PointBERT: groups of points as tokens of a transformer.

Source: Point-BERT (arXiv:2111.14819) as ULIP-2 (arXiv:2305.08275) uses it: farthest points are centres, their nearest
neighbours a group, a small PointNet makes a token of it, positions are added before every block, and the feature is
[CLS ; max over groups].
Differs: smaller (see the configuration), and CLS is told of the whole cloud its size, its colours, and how full the
cells of two grids are. Furniture comes in metres and a plug is not a wardrobe, but ULIP scales everything to a unit
ball and forgets it; and a transformer that has seen 365 things does not find their plain layout by itself.
Shapes: B clouds, P points, G groups, K points of a group, E width; a point has 3 coordinates and 3 colours.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anygen.config import Config
from anygen.encoders.base import Encoder
from anygen.features import Features

CELLS = 6
"""On each side of a grid: one lies over the box around a cloud, one over the cube around that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PointBertConfig(Config):
    points: int = 1024
    """P that are looked at; larger clouds are thinned out, smaller ones repeat points."""
    groups: int = 48
    neighbours: int = 20
    width: int = 128
    blocks: int = 3
    heads: int = 4


class PointBert(Encoder):
    """Clouds -> one token of 2 * width each."""

    config_class, modality = PointBertConfig, "pointcloud"

    def __init__(self, config: PointBertConfig) -> None:
        super().__init__()
        self.config, self.feature_dim, width = config, 2 * config.width, config.width
        self.point = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64))
        self.group = nn.Sequential(nn.Linear(128, width), nn.ReLU(), nn.Linear(width, width))
        self.place = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, width))
        self.layout = nn.Sequential(nn.Dropout(0.2), nn.Linear(9 + 2 * CELLS**3, width))
        self.cls, self.cls_place = (nn.Parameter(0.02 * torch.randn(1, 1, width)) for _ in range(2))
        block = (width, config.heads, 4 * width, 0.1, "gelu")
        blocks = [nn.TransformerEncoderLayer(*block, batch_first=True, norm_first=True) for _ in range(config.blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)

    def preprocess(self, media: Any) -> dict[str, Tensor]:
        """Point clouds -> `points` float32[B, P, 3] in metres and `colours` float32[B, P, 3] in [-1, 1]."""
        count = self.config.points
        rows = [np.random.default_rng(0).permutation(np.arange(max(len(m), count)) % len(m))[:count] for m in media]
        points = np.stack([cloud.points[row] for cloud, row in zip(media, rows, strict=True)])
        colours = np.stack([cloud.colours[row] for cloud, row in zip(media, rows, strict=True)])
        return {"points": torch.from_numpy(points), "colours": torch.from_numpy(colours).float() / 127.5 - 1}

    def forward(self, **tensors: Tensor) -> Features:
        """`points` and `colours` float[B, P, 3] -> values float[B, 1, 2 * E]."""
        points, colours = tensors["points"], tensors["colours"]
        extent = (points.amax(1) - points.amin(1)).clamp(min=1e-3)
        points = points - (points.amax(1) + points.amin(1))[:, None] / 2
        boxed, points = points / extent[:, None], points / extent.amax(1)[:, None, None]
        layout = [extent.log(), colours.mean(1), colours.std(1, correction=0), filled(boxed), filled(points)]
        centres = farthest(points, self.config.groups)  # [B, G, 3]
        near = torch.cdist(centres, points).topk(self.config.neighbours, largest=False).indices  # [B, G, K]
        groups = torch.cat([points, colours], -1).gather(1, near.flatten(1)[..., None].expand(-1, -1, 6))
        made = self.point(groups.unflatten(1, near.shape[1:]) - nn.functional.pad(centres, (0, 3))[:, :, None])
        made = torch.cat([made, made.amax(2, keepdim=True).expand_as(made)], -1)
        tokens = self.group(made).amax(2)  # [B, G, E]
        state = torch.cat([self.cls + self.layout(torch.cat(layout, 1))[:, None], tokens], 1)
        place = torch.cat([self.cls_place.expand(len(points), -1, -1), self.place(centres)], 1)
        for block in self.blocks:
            state = block(state + place)
        state = self.norm(state)
        values = torch.cat([state[:, 0], state[:, 1:].amax(1)], -1)[:, None]
        return Features(values, values.new_ones(values.shape[:2], dtype=torch.bool))


def farthest(points: Tensor, count: int) -> Tensor:
    """float[B, P, 3] -> float[B, count, 3]: each next point is the one farthest from those taken."""
    chosen, distance = [points[:, 0]], torch.full_like(points[..., 0], torch.inf)
    for _ in range(count - 1):
        distance = torch.minimum(distance, (points - chosen[-1][:, None]).square().sum(-1))
        chosen.append(points[torch.arange(len(points)), distance.argmax(1)])
    return torch.stack(chosen, 1)


def filled(points: Tensor) -> Tensor:
    """float[B, P, 3] in [-0.5, 0.5] -> float[B, CELLS^3]: the root of the share of points in each cell of a grid, added
    to that of its mirror image, left for right."""
    x, y, z = ((points + 0.5) * CELLS).long().clamp(0, CELLS - 1).unbind(-1)
    place, share = (x * CELLS + y) * CELLS + z, torch.full_like(points[..., 0], 4 / points.shape[1])
    roots = points.new_zeros(len(points), CELLS**3).scatter_add(1, place, share).sqrt()
    return roots + roots.unflatten(1, (CELLS, -1)).flip(1).flatten(1)
