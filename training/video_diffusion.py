"""Trains the video generator of the embedded default: temporal layers in the image generator's UNet.

Autoencoder, text encoder and the UNet's spatial layers are the image generator's and stay as they are: clips show what
pictures show, and what is learned is how they move. Three kinds of clips are mixed: icons in synthetic motion, icons
that were drawn moving, and pictures that stay still, which carry counts, places and words that the others lack.

Source: Guo et al. 2023 (arXiv:2307.04725) and Blattmann et al. 2023 (arXiv:2304.08818), temporal layers that start as
the identity in a frozen UNet that draws pictures; Wang et al. 2023 (arXiv:2308.06571), the layers. Objective as
`diffusion`'s.

Shapes: B clips, F frames, L tokens, c latent channels, h w latent sides, S side in pixels.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anygen.component import check_fit
from anygen.errors import ConfigError
from anygen.generators.clip_unet import animated, temporal_state
from anygen.generators.latent import TextConditioner
from anygen.generators.stable_diffusion import StableDiffusionGenerator
from anygen.generators.zeroscope import ClipDefaults, ZeroscopeGenerator
from anygen.training.animations import AnimationSource, load_animations
from anygen.training.captions import canonical, said, varied
from anygen.training.icons import IconSet
from anygen.training.latent_diffusion import (
    CaptionTokens,
    LatentDiffusionRecipe,
    VelocityObjective,
    build_scheduler,
    disturbed,
    fit,
    replace_folder,
)
from anygen.training.loop import (
    AveragedWeights,
    RunLog,
    save_grid,
    start,
)
from anygen.training.motion import FPS, FRAMES, MotionSource, canonical_clip, said_of_clip, varied_clip
from anygen.training.pictures import PictureSource, load_icons


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoDiffusionRecipe(LatentDiffusionRecipe):
    """Everything that decides the result."""

    icons: str
    """Directory of the built icon set."""
    generator: str
    """Directory of a trained image generator, whose autoencoder, text encoder and spatial layers are used."""
    animations: str | None = None
    """Directory of the built animations; needed if the mix has a share of them."""
    checksum: str | None = None
    """The icon set's checksum; None accepts any."""
    animations_checksum: str | None = None
    """The animations' checksum; None accepts any."""
    start: str | None = None
    """Directory of a generator trained by such a recipe, whose temporal layers are the start."""
    temporal_levels: tuple[int, ...] | None = (0, 1)
    """Levels that have temporal layers, as in `clip_unet`; None: all that diffusers' class has. Only convolutions know
    the order of the frames, only attention sees all of them: a level has both, where the image UNet attends."""
    frames: int = FRAMES
    side: int = 128
    """Of a frame, in pixels."""
    moving: int = 60_000
    """Clips of synthetic motion that are encoded once and drawn from."""
    animated: int = 14_000
    """Clips of animated icons, likewise."""
    still: int = 100_000
    """Composed pictures, likewise; each stays still for a clip."""
    mix: tuple[float, float, float] = (0.6, 0.2, 0.2)
    """Shares of moving, animated and still clips in a batch."""
    batch_size: int = 64
    """Times h w below 65,536: so many sequences at most go through one call of a GPU's temporal attention."""
    steps: int = 8_000
    learning_rate: float = 5e-4
    ema: float = 0.999
    sampling: ClipDefaults = field(default_factory=lambda: ClipDefaults(steps=12, guidance_scale=4.0, fps=FPS))

    def __post_init__(self) -> None:
        if min(self.mix) < 0 or abs(sum(self.mix) - 1) > 1e-6:
            raise ConfigError(f"mix: three shares that sum to 1 are wanted, not {list(self.mix)}")
        if self.mix[1] > 0 and self.animations is None:
            raise ConfigError("mix: a share of animated clips needs animations, the directory that holds them")


def channels_last(module: nn.Module) -> nn.Module:
    """Lays out the weights of convolutions over pictures and over clips as tensor cores take them."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if layout := formats.get(parameter.ndim):
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return module


def build_unet(recipe: VideoDiffusionRecipe, image: StableDiffusionGenerator) -> Any:
    """The UNet to train, in float32: the image generator's, frozen, with temporal layers that do nothing yet or go on.

    Raises:
        ConfigError: the image UNet has what a UNet over clips cannot have, or no such levels.
        CheckpointError: there is no generator in `recipe.start`, or its temporal layers are others.
    """
    unet = animated(image.unet, recipe.temporal_levels)
    unet.register_to_config(sample_size=recipe.side // image.factor)
    if recipe.start is not None:
        given = temporal_state(ZeroscopeGenerator.from_pretrained(recipe.start).unet)
        check_fit(temporal_state(unet), given, f"start: the temporal part of {recipe.start}")
        unet.load_state_dict(given, strict=False)
    return unet


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


def moving_clips(recipe: VideoDiffusionRecipe, icons: IconSet, device: torch.device) -> Iterator[Said]:
    """`recipe.moving` clips of synthetic motion."""
    rng = random.Random(recipe.seed + 1)
    source = MotionSource(icons, seed=recipe.seed, side=recipe.side, frames=recipe.frames, device=device)
    for batch in source.clips(recipe.moving):
        captions = []
        for concept, shot in zip(batch.concepts, batch.shots, strict=True):
            captions.append(canonical_clip(said_of_clip(shot, icons.concepts[concept], rng)))
            captions.append(varied_clip(said_of_clip(shot, icons.concepts[concept], rng), rng))
        yield batch.pixels, captions


def animated_clips(recipe: VideoDiffusionRecipe, icons: IconSet, device: torch.device) -> Iterator[Said]:
    """`recipe.animated` clips of animated icons; every second caption does not say that it moves."""
    rng, animations = (
        random.Random(recipe.seed + 2),
        load_animations(recipe.animations or "", recipe.animations_checksum),
    )
    source = AnimationSource(
        animations, icons, seed=recipe.seed + 2, side=recipe.side, frames=recipe.frames, device=device
    )
    for batch in source.clips(recipe.animated):
        captions = []
        for concept, shot in zip(batch.concepts, batch.shots, strict=True):
            captions.append(canonical_clip(said_of_clip(shot, icons.concepts[concept], rng, open_motion=0.5)))
            captions.append(varied_clip(said_of_clip(shot, icons.concepts[concept], rng, open_motion=0.5), rng))
        yield batch.pixels, captions


def still_clips(recipe: VideoDiffusionRecipe, icons: IconSet, device: torch.device) -> Iterator[Said]:
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
        if pixels.shape[-1] != recipe.side:
            pixels = F.interpolate(pixels, size=recipe.side, mode="area")
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
        self, recipe: VideoDiffusionRecipe, icons: IconSet, vae: Any, text: TextConditioner, device: torch.device
    ) -> None:
        tokenize = CaptionTokens(text)
        makers = (moving_clips, animated_clips, still_clips)
        numbers = (recipe.moving, recipe.animated, recipe.still)
        self.frames = recipe.frames
        self.parts = [
            (share, LatentClips(make(recipe, icons, device), number, vae, tokenize))
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


class _Objective(VelocityObjective):
    """With the image generator's frozen `CLIPTextModel`; latents are float[B, c, F, h, w]."""

    def predict(self, noisy: Tensor, tokens: Tensor, times: Tensor) -> Tensor:
        with torch.no_grad():
            embeds = self.text(input_ids=tokens).last_hidden_state
            if self.condition_noise:
                embeds = disturbed(embeds, self.condition_noise)
        return self.unet(noisy, times, encoder_hidden_states=embeds, return_dict=False)[0]


def train(recipe: VideoDiffusionRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/generator`, a diffusers folder in fp16 with all its parts.

    Raises:
        CheckpointError: there is no generator, icon set or animation set where the recipe has one.
        ConfigError: one of them is not what the recipe needs.
    """
    accelerator = start(recipe.seed)
    device, log = accelerator.device, RunLog(out, "video_diffusion")
    icons = load_icons(recipe.icons, recipe.checksum)
    image = StableDiffusionGenerator.from_pretrained(recipe.generator)
    unet, scheduler = build_unet(recipe, image), build_scheduler()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = image.vae.to(device, memory_format=torch.channels_last)
    vae = vae.bfloat16() if dtype is torch.bfloat16 else vae
    pool = ClipPool(recipe, icons, vae, image.text, device)
    log.write(pool=len(pool), latent_std=pool.parts[0][1].latents[:4096].float().std().item())
    sizes = {learns: sum(p.numel() for p in unet.parameters() if p.requires_grad is learns) for learns in (False, True)}
    log.write(spatial=sizes[False], temporal=sizes[True])
    text = image.text.encoder.requires_grad_(False)
    objective: Any = _Objective(
        unet.train(), text, scheduler.alphas_cumprod, recipe.min_snr, recipe.condition_noise
    ).to(device)
    if device.type == "cuda":  # on a CPU nothing is gained, and PyTorch 2.13 crashes in frozen convolutions' backward
        channels_last(objective)
    average = AveragedWeights(objective.unet, recipe.ema)

    def pack() -> ZeroscopeGenerator:
        return ZeroscopeGenerator(
            vae=vae,
            unet=average.module,
            scheduler=scheduler,
            unconditional=image.unconditional.to(device),
            text=image.text,
            defaults=recipe.sampling,
        )

    def shown(step: int | None) -> None:
        show(pack(), out / ("clips.png" if step is None else f"clips-{step}.png"), dtype)

    return fit(
        recipe,
        accelerator,
        objective,
        average,
        objective.unet,
        pool.draw,
        log,
        counted="clips",
        show=shown,
        show_every=2000,
        write=lambda: save_half(pack(), Path(recipe.generator), out / "generator"),
    )


SHOWN = (
    "a rocket moving up, in the flat style, in the sky",
    "a dog moving left, in the cartoon style",
    "a red apple moving right, in the 3D style, on a blue background",
    "a trumpet spinning, in the sticker style",
    "a tiger growing, in the retro style",
    "a guitar shrinking, in the 3D style, on a green background",
    "a soccer ball bouncing, in the flat style",
    "a face with tears of joy in motion, in the 3D style",
    "an automobile in a panning view, in the sticker style, in a city",
    "three pizzas, in the flat style, on a pink background",
)


def show(generator: ZeroscopeGenerator, path: Path, dtype: torch.dtype) -> None:
    """Draws each caption of SHOWN as a film strip of at most eight frames, one a row."""
    condition = generator.encode_text(SHOWN)
    with torch.autocast(generator.device.type, dtype=dtype, enabled=dtype != torch.float32):
        latents = generator.sample(condition, seeds=list(range(len(SHOWN))))
    latents = latents[:, :, :: max(1, latents.shape[2] // 8)]
    save_grid(generator.decode(latents).flatten(0, 1), path, columns=latents.shape[2])


def save_half(generator: ZeroscopeGenerator, image: Path, out: Path) -> None:
    """Writes the generator in fp16, whole; all but the temporal layers is the image generator's, as it was trained.

    An earlier one in `out` is replaced when the new one is whole.
    """
    given = StableDiffusionGenerator.from_pretrained(image, dtype=torch.float16)
    half = ZeroscopeGenerator(
        vae=given.vae,
        unet=copy.deepcopy(generator.unet).half(),
        scheduler=generator.scheduler,
        unconditional=given.unconditional,
        text=given.text,
        defaults=generator.defaults,
    )
    replace_folder(half, out)
