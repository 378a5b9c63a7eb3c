"""What a clip shows and how it moves, by tracking the foreground before a plain background, without any model.

Shapes: B pictures, F frames, S side in pixels.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.training.icons import IconSet
from anygen.training.measures import NearestIcon, foreground, on_white, shrink
from anygen.training.motion import STILL

TRACKED = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "spinning",
    "growing",
    "shrinking",
    "bouncing",
    STILL,
)
"""The motions that are told apart; panning, where the background moves, is not."""

MOVED = 0.18
"""Of the side: what travels less stays where it is. Training moves things by 0.6."""
GREW = 0.4
"""Of the logarithm of the size; training changes it by 1.08."""
TURNED = math.radians(8)
"""From frame to frame; training turns by 22.5 degrees."""
_RAYS, _RINGS = 96, 16


class Track(NamedTuple):
    """Where the foreground is."""

    x: Tensor
    """float[F], its centre of mass in sides from the middle, to the right."""
    y: Tensor
    """float[F], down."""
    size: Tensor
    """float[F], the square root of its area in sides."""


def track(clip: Tensor) -> Track | None:
    """float[F, 3, S, S] -> where its foreground is; None if a frame has none."""
    masks = [_main_parts(foreground(frame)) for frame in clip]
    if not all(mask.any() for mask in masks):
        return None
    side, stacked = clip.shape[-1], torch.stack(masks).float()
    line, area = (torch.arange(side) + 0.5) / side - 0.5, stacked.sum((1, 2))
    x, y = (stacked.sum(axis) @ line / area for axis in (1, 2))
    return Track(x, y, area.sqrt() / side)


def motion_of(clip: Tensor) -> str | None:
    """The word of `TRACKED` for what the foreground does: float[F, 3, S, S]; None if there is none, or no word fits."""
    clip = clip.float().cpu()
    if (tracked := track(clip)) is None:
        return None
    growth, across, down = (_change(line) for line in (tracked.size.log(), tracked.x, tracked.y))
    if abs(growth) > GREW:
        return "growing" if growth > 0 else "shrinking"
    if max(abs(across), abs(down)) > MOVED:
        if abs(across) > abs(down):
            return "moving right" if across > 0 else "moving left"
        return "moving down" if down > 0 else "moving up"
    if _jumps(tracked.y):
        return "bouncing"
    if abs(turn(clip, tracked)) > TURNED:
        return "spinning"
    wander = max((line.max() - line.min()).item() for line in (tracked.x, tracked.y))
    return STILL if wander < MOVED / 2 else None


def turn(clip: Tensor, tracked: Track) -> float:
    """By how much the foreground turns from frame to frame, in radians, clockwise.

    Frames are unrolled around the foreground's centre; the shift that makes each most like the next, over all frames
    together, is the turn.
    """
    angles = 2 * math.pi * torch.arange(_RAYS) / _RAYS
    # a turning thing's centre of mass circles around the point that it turns about
    centre_x, centre_y = tracked.x.mean(), tracked.y.mean()
    radii = (0.1 + 0.9 * torch.arange(1, _RINGS + 1) / _RINGS) * float(tracked.size.mean()) * 0.75
    u, v = (
        2 * (centre + radii[:, None] * way(angles)) for centre, way in ((centre_x, torch.cos), (centre_y, torch.sin))
    )
    grid = torch.stack([u, v], -1).expand(len(clip), -1, -1, -1)
    rays = F.grid_sample(clip, grid, padding_mode="border", align_corners=False)  # [F, 3, rings, rays]
    rays = rays - rays.mean(3, keepdim=True)
    waves = torch.fft.rfft(rays)
    alike = torch.fft.irfft((waves[:-1].conj() * waves[1:]).sum((0, 1, 2)), _RAYS)
    best = int(alike.argmax())
    return float(angles[best]) if best <= _RAYS // 2 else float(angles[best]) - 2 * math.pi


def _change(values: Tensor) -> float:
    """From the first to the last, by a straight line through all."""
    time = torch.linspace(-0.5, 0.5, len(values))
    return float((values * time).sum() / time.square().sum().clamp(min=1e-9))


def _jumps(height: Tensor) -> bool:
    """Whether it goes up and comes down twice."""
    air = 2 * torch.arange(len(height)) / len(height) % 1
    wanted, given = -air * (1 - air), height - height.mean()
    wanted = wanted - wanted.mean()
    likeness = (wanted * given).sum() / (wanted.norm() * given.norm()).clamp(min=1e-9)
    return bool(likeness > 0.6 and height.max() - height.min() > 0.1)


def _main_parts(mask: Tensor) -> Tensor:
    """Without specks, parts a tenth as large as the largest: bool[S, S]."""
    from scipy.ndimage import label

    parts = torch.from_numpy(cast(Any, label(mask.numpy()))[0]).long()
    sizes = parts.flatten().bincount()
    sizes[0] = 0
    return (sizes > 0.1 * sizes.max())[parts] & mask


class NearestThing(NearestIcon):
    """As `NearestIcon`, whatever the size, the place and the plain background: things are cut out and scaled first."""

    def __init__(self, icons: IconSet) -> None:
        super().__init__(icons)
        count, vectors = len(icons.pixels), []
        for first in range(0, count, 256):
            vectors.append(shrink(cut_out(on_white(icons, range(first, min(first + 256, count))))))
        self.vectors = torch.cat(vectors)

    def find(self, pictures: Tensor) -> list[int]:
        """float[B, 3, S, S] in [0, 1] -> B icons."""
        return super().find(cut_out(pictures))


def cut_out(pictures: Tensor, side: int = 64) -> Tensor:
    """The foreground on white, so large that it touches the frame: float[B, 3, S, S] -> float[B, 3, side, side].

    Specks are left out, as where clips are tracked: one at the edge would decide how large the rest is.
    """
    boxes, plain = [], []
    for picture in pictures:
        mask = foreground(picture)
        mask = _main_parts(mask) if mask.any() else mask
        plain.append(torch.where(mask, picture, 1.0))
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        if not len(rows):
            rows = columns = torch.tensor([0, picture.shape[-1] - 1])
        boxes.append((float(columns[0]), float(columns[-1] + 1), float(rows[0]), float(rows[-1] + 1)))
    left, right, top, bottom = 2 * torch.tensor(boxes).T / pictures.shape[-1] - 1
    half = torch.maximum(right - left, bottom - top) / 2
    theta = torch.zeros(len(boxes), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = half
    theta[:, 0, 2], theta[:, 1, 2] = (left + right) / 2, (top + bottom) / 2
    # sampled finely and averaged: large things are shrunk here
    grid = F.affine_grid(theta, [len(boxes), 3, 2 * side, 2 * side], align_corners=False)
    return 1 - F.avg_pool2d(F.grid_sample(1 - torch.stack(plain), grid, align_corners=False), 2)


def middle_of(clip: Tensor, motion: str | None) -> Tensor:
    """The frame that is looked at: the middle one, where the thing looks as it does at rest.

    What spins stands upright in the first frame, and what bounces is squashed in the middle, but not a quarter before.
    """
    return clip[{"spinning": 0, "bouncing": len(clip) // 4}.get(motion or "", len(clip) // 2)]
