"""Clips as latents with captions, kept on the training device and drawn from: moving, animated and still ones.

Shapes: B clips, F frames, L tokens, c latent channels, h w latent sides, S side in pixels.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.generators.latent import TextConditioner
from anygen.training.animations import AnimationSource, load_animations
from anygen.training.captions import canonical, said, varied
from anygen.training.icons import IconSet
from anygen.training.latent_diffusion import CaptionTokens
from anygen.training.motion import MotionSource, canonical_clip, said_of_clip, varied_clip
from anygen.training.pictures import PictureSource


class ClipSettings(Protocol):
    """What a recipe says of its clips."""

    @property
    def seed(self) -> int: ...
    @property
    def frames(self) -> int:
        """Of a clip."""
        ...

    @property
    def moving(self) -> int:
        """Clips of synthetic motion."""
        ...

    @property
    def animated(self) -> int:
        """Clips of animated icons."""
        ...

    @property
    def animations(self) -> str | None:
        """Directory of the built animations."""
        ...

    @property
    def animations_checksum(self) -> str | None: ...


class MixedClips(ClipSettings, Protocol):
    """And of their shares."""

    @property
    def side(self) -> int:
        """Of a frame, in pixels."""
        ...

    @property
    def still(self) -> int:
        """Pictures."""
        ...

    @property
    def mix(self) -> tuple[float, float, float]:
        """Shares of moving, animated and still clips."""
        ...


def encode_clips(vae: Any, pixels: Tensor) -> Tensor:
    """float[B, F, 3, S, S] in [0, 1] -> scaled latents bfloat16[B, c, F, h, w].

    The posterior's mean: samples would flicker from frame to frame.
    """
    frames = (pixels.flatten(0, 1) * 2 - 1).to(vae.dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in frames.split(1024)])
    latents = (latents * vae.config.scaling_factor).to(torch.bfloat16)
    return latents.unflatten(0, pixels.shape[:2]).transpose(1, 2).contiguous()


Said = tuple[Tensor, list[str]]
"""Clips float[B, F, 3, S, S] in [0, 1], and two captions for each, one after the other."""


def moving_clips(recipe: ClipSettings, icons: IconSet, side: int, device: torch.device) -> Iterator[Said]:
    """`recipe.moving` clips of synthetic motion."""
    rng = random.Random(recipe.seed + 1)
    source = MotionSource(icons, seed=recipe.seed, side=side, frames=recipe.frames, device=device)
    for batch in source.clips(recipe.moving):
        captions = []
        for concept, shot in zip(batch.concepts, batch.shots, strict=True):
            captions.append(canonical_clip(said_of_clip(shot, icons.concepts[concept], rng)))
            captions.append(varied_clip(said_of_clip(shot, icons.concepts[concept], rng), rng))
        yield batch.pixels, captions


def animated_clips(recipe: ClipSettings, icons: IconSet, side: int, device: torch.device) -> Iterator[Said]:
    """`recipe.animated` clips of animated icons; every second caption does not say that it moves."""
    rng, animations = (
        random.Random(recipe.seed + 2),
        load_animations(recipe.animations or "", recipe.animations_checksum),
    )
    source = AnimationSource(animations, icons, seed=recipe.seed + 2, side=side, frames=recipe.frames, device=device)
    for batch in source.clips(recipe.animated):
        captions = []
        for concept, shot in zip(batch.concepts, batch.shots, strict=True):
            captions.append(canonical_clip(said_of_clip(shot, icons.concepts[concept], rng, open_motion=0.5)))
            captions.append(varied_clip(said_of_clip(shot, icons.concepts[concept], rng, open_motion=0.5), rng))
        yield batch.pixels, captions


def still_clips(recipe: MixedClips, icons: IconSet, side: int, device: torch.device) -> Iterator[Said]:
    """`recipe.still` composed pictures, as clips of one frame."""
    rng = random.Random(recipe.seed + 3)
    concepts: list[int] = icons.concept.tolist()
    for batch in PictureSource(icons, seed=recipe.seed + 3, device=device).pictures(recipe.still):
        captions = []
        for icon, drawing in zip(batch.icons, batch.drawings, strict=True):
            concept = icons.concepts[concepts[icon]]
            captions.append(canonical(said(drawing, concept, rng, open_style=0.08)))
            captions.append(varied(said(drawing, concept, rng), rng))
        pixels = batch.pixels
        if pixels.shape[-1] != side:
            pixels = F.interpolate(pixels, size=side, mode="area")
        yield pixels[:, None], captions


class LatentClips:
    """Clips of one kind as latents, each with two captions, on the training device."""

    def __init__(self, clips: Iterator[Said], number: int, vae: Any, tokenize: CaptionTokens) -> None:
        """Encodes `number` clips as they come."""
        tokens: list[Tensor] = []
        self.latents, done = torch.empty(0), 0
        for pixels, captions in clips:
            latents = encode_clips(vae, pixels)
            if not done:  # written in place: parts and their concatenation would need the memory twice
                self.latents = torch.empty(number, *latents.shape[1:], dtype=latents.dtype, device=latents.device)
            self.latents[done : done + len(latents)] = latents
            tokens.append(tokenize(captions))
            done += len(latents)
        self.tokens = torch.cat(tokens).view(number, 2, -1).to(self.latents.device)  # [N, 2, L]

    def draw(self, size: int, frames: int) -> tuple[Tensor, Tensor]:
        """float[B, c, F, h, w] and int64[B, L], with replacement; what is stored as one frame is repeated."""
        device = self.latents.device
        rows = torch.randint(len(self.latents), (size,), device=device)
        tokens = self.tokens[rows, torch.randint(2, (size,), device=device)]
        return self.latents[rows].float().expand(-1, -1, frames, -1, -1), tokens


class ClipPool:
    """The kinds of clips of a recipe's mix, drawn from together."""

    def __init__(
        self, recipe: MixedClips, icons: IconSet, vae: Any, text: TextConditioner, device: torch.device
    ) -> None:
        tokenize = CaptionTokens(text)
        makers = (moving_clips, animated_clips, still_clips)
        numbers = (recipe.moving, recipe.animated, recipe.still)
        self.frames = recipe.frames
        self.parts = [
            (share, LatentClips(make(recipe, icons, recipe.side, device), number, vae, tokenize))
            for share, make, number in zip(recipe.mix, makers, numbers, strict=True)
            if share > 0
        ]
        self.empty = tokenize([""])[0].to(device)

    def __len__(self) -> int:
        return sum(len(part.latents) for _, part in self.parts)

    def draw(self, size: int, dropout: float) -> tuple[Tensor, Tensor]:
        """float[B, c, F, h, w] latents and int64[B, L] captions, a share of them empty."""
        sizes = shares_of(size, [share for share, _ in self.parts])
        drawn = [part.draw(count, self.frames) for count, (_, part) in zip(sizes, self.parts, strict=True)]
        latents, tokens = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        dropped = torch.rand(size, 1, device=tokens.device) < dropout
        return latents, torch.where(dropped, self.empty, tokens)


def shares_of(size: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in those proportions that sum to `size`."""
    ends = [round(size * sum(shares[: number + 1]) / sum(shares)) for number in range(len(shares))]
    return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


class ClipFrames:
    """Single frames of moving and animated clips, early ones above all.

    A frame by itself does not show where things go. That a clip which moves to the left begins on the right, and one
    that grows begins small, is what a picture can say of a motion's words.
    """

    def __init__(self, recipe: ClipSettings, icons: IconSet, vae: Any, text: TextConditioner, device: torch.device):
        """Frames have the icons' side."""
        side = icons.pixels.shape[-1]
        tokenize, self.frames = CaptionTokens(text), recipe.frames
        kinds = ((moving_clips, recipe.moving), (animated_clips, recipe.animated))
        self.parts = [
            LatentClips(make(recipe, icons, side, device), number, vae, tokenize) for make, number in kinds if number
        ]

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        """float[B, c, h, w] and int64[B, L], with replacement, of each kind as many as there are clips of it."""
        counts = shares_of(size, [len(part.latents) for part in self.parts])
        drawn = [part.draw(count, self.frames) for count, part in zip(counts, self.parts, strict=True)]
        clips, tokens = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        when = (torch.rand(size, device=clips.device).square() * self.frames).long()
        return clips[torch.arange(size, device=clips.device), :, when], tokens
