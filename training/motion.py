"""Clips from icons: a copy that moves, turns, grows or bounces before a background, with the words for it.

A `Shot` is a `Drawing` and a motion. The motion's words stand in captions where a place would: "a rocket moving up, in
the flat style, in the sky". All frames of a batch are painted by one sampling of the icons.

Shapes: B clips, F frames, S side in pixels, N sources, K paintings of each.
"""

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.errors import ConfigError
from anygen.training.captions import COLOURS, Drawing, canonical, keeps_out, random_drawing, said, varied, with_article
from anygen.training.compose import NORMAL, Panoramas, make_backgrounds
from anygen.training.icons import SCENES, Concept, IconSet

FRAMES, FPS = 16, 8.0

PANNING, STILL, ANIMATED = "in a panning view", "staying still", "in motion"

MOTIONS: dict[str, tuple[str, ...]] = {
    "moving left": ("moving to the left", "going left", "sliding to the left", "moving leftwards", "going to the left"),
    "moving right": (
        "moving to the right",
        "going right",
        "sliding to the right",
        "moving rightwards",
        "going to the right",
    ),
    "moving up": ("going up", "rising", "moving upwards", "flying up", "taking off"),
    "moving down": ("going down", "falling", "moving downwards", "sinking", "dropping"),
    "spinning": ("rotating", "spinning around", "turning round and round", "turning in circles", "whirling"),
    "growing": ("getting bigger", "getting larger", "growing bigger", "coming closer", "becoming bigger"),
    "shrinking": ("getting smaller", "becoming smaller", "shrinking away", "becoming tiny", "growing smaller"),
    "bouncing": ("jumping", "hopping", "bouncing up and down", "jumping up and down", "bouncing on the spot"),
    PANNING: ("as the view pans", "while the view pans", "with a panning background", "with the scene passing by"),
    STILL: ("not moving", "that stays still", "keeping still", "at rest", "that does not move"),
}
"""Canonical words of a motion -> other words for it."""
ALIVE = ("moving", "animated", "that moves", "coming alive", "full of life")
"""Other words for `ANIMATED`, the motion of icons that were drawn moving."""

_STEADY = ("growing", "shrinking", PANNING)
"""Motions that take no size word: two change the size, and one already fills the caption."""
_SIZE = {None: 1.0, "small": 0.66, "big": 1.3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    """One clip's content."""

    drawing: Drawing
    """What is seen; neither counted nor placed."""
    motion: str | None
    """A key of `MOTIONS`, or `ANIMATED`. None means that the caption leaves it open."""


def canonical_clip(shot: Shot) -> str:
    """'a rocket moving up, in the flat style, in the sky'."""
    return canonical(replace(shot.drawing, place=shot.motion))


def varied_clip(shot: Shot, rng: random.Random) -> str:
    """The same content in one of many forms, with one of the motion's words; "a picture of" becomes "a clip of"."""
    words = shot.motion and rng.choice((shot.motion, *MOTIONS.get(shot.motion, ALIVE)))
    caption = varied(replace(shot.drawing, place=words), rng)
    opening = re.match(r"an? (|\S+ )(?:picture|drawing|icon|image|illustration) of ", caption)
    if opening is None:
        return caption
    noun = with_article(opening[1] + rng.choice(("clip", "video", "animation", "short video", "film")))
    return f"{noun} of {caption[opening.end() :]}"


def said_of_clip(shot: Shot, concept: Concept, rng: random.Random, *, open_motion: float = 0.0) -> Shot:
    """What a speaker says of it: as `captions.said`, and the motion goes unsaid in that share of cases."""
    drawing = said(shot.drawing, concept, rng)
    return Shot(drawing=drawing, motion=None if rng.random() < open_motion else shot.motion)


def is_held_out(shot: Shot, concept: int) -> bool:
    """Whether this combination of concept, style and motion is never trained on, by a stable hash of the content.

    What stays still is never held out, for pictures show it, nor what was drawn moving, of which there is but one each.
    """
    if shot.motion in (None, STILL, ANIMATED):
        return False
    key = f"{concept}|{shot.drawing.style}|{shot.motion}"
    return keeps_out(key)


def random_shot(concept: Concept, style: str, rng: random.Random, *, scenes: Sequence[str] = tuple(SCENES)) -> Shot:
    """Any motion, as often as any other; backgrounds as pictures have them, but a camera pans over a scene."""
    motion = rng.choice(tuple(MOTIONS))
    drawing = replace(random_drawing(concept, style, rng, scenes=scenes), count=1, place=None, size=None)
    if motion == PANNING:
        drawing = replace(drawing, background=rng.choice(list(scenes)))
    elif motion not in _STEADY and rng.random() < 0.16:
        drawing = replace(drawing, size=rng.choice(("small", "big")))
    return Shot(drawing=drawing, motion=motion)


def path(shot: Shot, frames: int, rng: random.Random | None = None) -> np.ndarray:
    """Where the icon is in each frame.

    Args:
        shot: of which motion and size count.
        frames: F.
        rng: varies distance, size and course a little; None gives the middle of what it would give.

    Returns:
        float[F, 5]: the centre's x and y in canvas widths from the middle, width and height in canvas widths, and the
        angle in radians, clockwise.
    """
    time = np.linspace(0, 1, frames) if frames > 1 else np.full(1, 0.5)
    turn = np.arange(frames) / frames  # of what comes back to its start: the last frame is not the first once more

    def near(value: float, by: float) -> float:
        return value + by * (2 * rng.random() - 1) if rng else value

    still = np.zeros(frames)
    x, y, angle, size, squash = still, still, still, still + 1.0, still
    match shot.motion:
        case "moving left" | "moving right" | "moving up" | "moving down":
            along = near(0.6, 0.06) * (time - 0.5)
            aside = still + near(0, 0.06)
            sign = -1 if shot.motion in ("moving left", "moving up") else 1
            x, y = (sign * along, aside) if shot.motion in ("moving left", "moving right") else (aside, sign * along)
            size = size * near(0.62, 0.06)
        case "spinning":
            angle, size = 2 * math.pi * turn, size * near(0.74, 0.05)
        case "growing" | "shrinking":
            small, big = near(0.34, 0.04), near(1.0, 0.05)
            size = small * (big / small) ** (time if shot.motion == "growing" else 1 - time)
        case "bouncing":
            air = 2 * turn % 1  # two jumps
            height = near(0.34, 0.04)
            y = near(0.17, 0.02) - height * 4 * air * (1 - air)
            squash = 0.14 * np.clip(1 - 5 * np.minimum(air, 1 - air), 0, 1)
            size = size * near(0.56, 0.04)
        case _:
            size = size * near(NORMAL, 0.0 if shot.motion in (STILL, None) else 0.03)
    if shot.motion == PANNING:
        size = size * 0.8  # room for the scene to be seen moving
    size = size * _SIZE[shot.drawing.size]
    # What is squashed at the ground keeps standing on it.
    y = y + size * squash / 2
    return np.stack([x, y, size * (1 + squash), size * (1 - squash), angle], 1)


def premultiplied(icons: Tensor, side: int) -> Tensor:
    """uint8[..., 4, s, s], straight RGBA -> float[..., 4, side, side], shrunk without aliasing if it is larger."""
    rgba = icons.float() / 255
    rgba = torch.cat([rgba[..., :3, :, :] * rgba[..., 3:, :, :], rgba[..., 3:, :, :]], -3)
    if side >= rgba.shape[-1]:
        return rgba
    return F.interpolate(rgba.flatten(0, -4), size=side, mode="area").unflatten(0, rgba.shape[:-3])


def paint(source: Tensor, paths: Tensor, side: int) -> Tensor:
    """Each source at K places, on nothing.

    Args:
        source: premultiplied float[N, 4, s, s].
        paths: float[N, K, 5], as `path` gives them.
        side: of the canvas.

    Returns:
        premultiplied float[N, K, 4, side, side]; painted at twice the side and averaged, so that what is small or
        turned does not alias.
    """
    fine = 2 * side
    line = (2 * torch.arange(fine, device=source.device) + 1) / fine - 1
    x, y, width, height, angle = paths.unbind(-1)  # [N, K]
    across = line[None, None] - 2 * x[..., None]  # [N, K, fine]
    down = line[None, None] - 2 * y[..., None]
    cos, sin = angle.cos()[..., None], angle.sin()[..., None]
    # The inverse of a turn by `angle`, spelt out: a matrix product would run in TF32 on a GPU.
    u = ((cos * across)[:, :, None, :] + (sin * down)[:, :, :, None]) / width[..., None, None]
    v = ((cos * down)[:, :, :, None] - (sin * across)[:, :, None, :]) / height[..., None, None]
    grid = torch.stack([u, v], -1).flatten(1, 2)  # [N, K * fine, fine, 2]
    painted = F.avg_pool2d(F.grid_sample(source, grid, align_corners=False), 2)  # [N, 4, K * side, side]
    return painted.unflatten(2, (-1, side)).transpose(1, 2)


def over(rgba: Tensor, backgrounds: Tensor) -> Tensor:
    """Premultiplied float[B, F, 4, S, S] on float[B, F or 1, 3, S, S] -> float[B, F, 3, S, S] in [0, 1]."""
    return (rgba[:, :, :3] + (1 - rgba[:, :, 3:]) * backgrounds).clamp(0, 1)


def moving_backgrounds(
    shots: Sequence[Shot],
    panoramas: Panoramas | Mapping[str, Tensor],
    side: int,
    frames: int,
    rng: random.Random,
    device: torch.device,
) -> Tensor:
    """As `make_backgrounds`; where the camera pans, the scene passes to the left: float[B, F, 3, S, S]."""
    still = make_backgrounds([shot.drawing for shot in shots], panoramas, side, rng, device)
    out = still[:, None].expand(-1, frames, -1, -1, -1)
    panned = [
        row for row, shot in enumerate(shots) if shot.motion == PANNING and shot.drawing.background not in COLOURS
    ]
    if not panned or frames == 1:
        return out
    if not isinstance(panoramas, Panoramas):
        panoramas = Panoramas.stack(panoramas, device)
    height, width = panoramas.views.shape[1:3]
    step = max(1, side // 32)
    which = [panoramas.row[shots[row].drawing.background or ""] for row in panned]
    headings = [rng.randrange(width) for _ in panned]
    tops = [height // 2 - int(side * rng.uniform(0.5, 0.62)) for _ in panned]
    index, view, heading, top = torch.tensor([panned, which, headings, tops]).to(device, non_blocking=True)
    y = top[:, None] + torch.arange(side, device=device)
    x = (heading[:, None] + torch.arange(side + step * (frames - 1), device=device)) % width
    strip = panoramas.views[view[:, None, None], y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2).float() / 255
    soft = F.interpolate(F.avg_pool2d(strip, 2, ceil_mode=True), size=strip.shape[-2:], mode="bilinear")
    windows = soft.unfold(3, side, step).permute(0, 3, 1, 2, 4)  # [R, F, 3, S, S]
    return out.clone().index_copy_(0, index, windows)


@dataclass(frozen=True, slots=True)
class ClipBatch:
    """Composed clips and their content."""

    pixels: Tensor
    """float[B, F, 3, S, S] in [0, 1]."""
    icons: list[int]
    """B indices into the set that the clips are made of."""
    concepts: list[int]
    """B indices into its concepts."""
    shots: list[Shot]


class MotionSource:
    """Endless clips: every icon in turn, in a seeded order, with a random motion and background."""

    def __init__(
        self,
        icons: IconSet,
        *,
        seed: int,
        side: int | None = None,
        frames: int = FRAMES,
        device: torch.device | str = "cpu",
        held_out: bool = False,
    ) -> None:
        """`side` is the icons' own unless it is said; `held_out` makes those clips that are kept from training."""
        self.icons, self.device, self.held_out = icons, torch.device(device), held_out
        self.side, self.frames = side or icons.pixels.shape[-1], frames
        self.pixels = icons.pixels.to(self.device)
        self.panoramas = Panoramas.stack(icons.panoramas, self.device)
        self.rng = random.Random(seed)
        self._concepts: list[int] = icons.concept.tolist()
        # In a given style a concept has a held-out motion or two, or none.
        self._shown = [n for n in range(len(self.pixels)) if not held_out or self._has_held_out(n)]

    def clips(self, number: int, most: int = 64) -> Iterator[ClipBatch]:
        """So many clips, in batches of at most `most`."""
        turns = self._turns()
        for first in range(0, number, most):
            yield self.make(list(islice(turns, min(most, number - first))))

    def make(self, icons: list[int], shots: Sequence[Shot] | None = None) -> ClipBatch:
        """One clip of each icon of the list; of the stated content, or of any that may be shown here."""
        shots = [self._draw(icon) for icon in icons] if shots is None else list(shots)
        paths = np.stack([path(shot, self.frames, self.rng) for shot in shots]).astype(np.float32)
        grounds = moving_backgrounds(shots, self.panoramas, self.side, self.frames, self.rng, self.device)
        source = premultiplied(self.pixels[torch.tensor(icons).to(self.device, non_blocking=True)], self.side)
        rgba = paint(source, torch.from_numpy(paths).to(self.device, non_blocking=True), self.side)
        return ClipBatch(over(rgba, grounds), icons, [self._concepts[icon] for icon in icons], shots)

    def _turns(self) -> Iterator[int]:
        if not self._shown:
            raise ConfigError("none of these icons has a motion that is held out")
        while True:
            order = list(self._shown)
            self.rng.shuffle(order)
            yield from order

    def _has_held_out(self, icon: int) -> bool:
        drawing = Drawing(label="", style=self.icons.style[icon])
        return any(is_held_out(Shot(drawing=drawing, motion=m), self._concepts[icon]) for m in MOTIONS)

    def _draw(self, icon: int) -> Shot:
        concept = self._concepts[icon]
        while True:
            shot = random_shot(self.icons.concepts[concept], self.icons.style[icon], self.rng)
            if is_held_out(shot, concept) == self.held_out:
                return shot


def film_strip(clip: Tensor, every: int = 1) -> Tensor:
    """A clip's frames side by side, one in so many: float[F, 3, S, S] -> float[3, S, S * F / every]."""
    return torch.cat(list(clip[::every]), -1)
