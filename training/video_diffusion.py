"""Trains the video generator of the embedded default: a UNet over clips, in the image generator's own spaces.

The image generator's autoencoder and text encoder are used as they are, so that clips and pictures share the latents
and the conditions. Three kinds of clips are mixed: icons in synthetic motion, icons that were drawn moving, and
pictures that stay still, which carry counts, places and words that the others lack. With `frames: 1` the same recipe
learns pictures far faster, its temporal layers left out, for a run over clips to start from.

Source: Wang et al. 2023 (arXiv:2308.06571), the architecture; Blattmann et al. 2023 (arXiv:2304.08818), temporal layers
that start as the identity in a UNet that draws pictures. Objective as `diffusion`'s.

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

from anygen.errors import ConfigError
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

HEAD = 16
"""Channels of an attention head; at 8, a step takes a sixth longer on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoDiffusionRecipe(LatentDiffusionRecipe):
    """Everything that decides the result."""

    icons: str
    """Directory of the built icon set."""
    generator: str
    """Directory of a trained image generator, whose autoencoder and text encoder are used."""
    animations: str | None = None
    """Directory of the built animations; needed if the mix has a share of them."""
    checksum: str | None = None
    """The icon set's checksum; None accepts any."""
    animations_checksum: str | None = None
    """The animations' checksum; None accepts any."""
    start: str | None = None
    """Directory of a generator trained by such a recipe, to go on from; its own sizes then hold."""
    start_image: str | None = None
    """Directory of an image generator whose UNet gives the spatial layers that have its shapes."""
    frames: int = FRAMES
    """1 leaves the temporal layers out, which begin as the identity: the spatial ones learn from pictures."""
    side: int = 128
    """Of a frame, in pixels."""
    channels: tuple[int, ...] = (64, 96, 128)
    layers_per_block: int = 1
    moving: int = 60_000
    """Clips of synthetic motion that are encoded once and drawn from."""
    animated: int = 14_000
    """Clips of animated icons, likewise."""
    still: int = 100_000
    """Composed pictures, likewise; each stays still for a clip."""
    mix: tuple[float, float, float] = (0.6, 0.2, 0.2)
    """Shares of moving, animated and still clips in a batch."""
    batch_size: int = 64
    steps: int = 8_000
    learning_rate: float = 5e-4
    ema: float = 0.999
    sampling: ClipDefaults = field(default_factory=lambda: ClipDefaults(steps=12, guidance_scale=4.0, fps=FPS))

    def __post_init__(self) -> None:
        if min(self.mix) < 0 or abs(sum(self.mix) - 1) > 1e-6:
            raise ConfigError(f"mix: three shares that sum to 1 are wanted, not {list(self.mix)}")
        if self.mix[1] > 0 and self.animations is None:
            raise ConfigError("mix: a share of animated clips needs animations, the directory that holds them")
        if self.start is not None and self.start_image is not None:
            raise ConfigError("start and start_image exclude each other: a video generator has its spatial layers")


def build_unet(recipe: VideoDiffusionRecipe, latent_channels: int, latent_side: int, text_width: int) -> Any:
    """The untrained UNet, laid out as the image generator's; its temporal layers do nothing yet."""
    from diffusers import UNet3DConditionModel

    unet: Any = UNet3DConditionModel(
        sample_size=latent_side,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=recipe.channels,
        layers_per_block=recipe.layers_per_block,
        cross_attention_dim=text_width,
        attention_head_dim=HEAD,
        norm_num_groups=32,
    )
    for name, parameter in unet.named_parameters():
        if is_temporal(name) and ".proj_out." in f".{name}":  # the convolutions' last layer is zero already
            nn.init.zeros_(parameter)
    return unet


def is_temporal(name: str) -> bool:
    """Whether a parameter of a `UNet3DConditionModel` is of a layer that an image UNet lacks."""
    return name.startswith("transformer_in.") or ".temp_convs." in name or ".temp_attentions." in name


def without_time(unet: Any) -> Any:
    """Leaves the temporal layers of a `UNet3DConditionModel` out of its passes; they are kept and saved as they are.

    Attention over one frame would cost more than all else: a sequence of length 1 for every place of every picture.
    """
    from diffusers.models.resnet import TemporalConvLayer
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

    for module in unet.modules():
        if isinstance(module, TemporalConvLayer):
            module.forward = _kept  # type: ignore[method-assign]
        elif isinstance(module, TransformerTemporalModel):
            module.forward = _kept_alone  # type: ignore[method-assign]
    return unet


def _kept(hidden_states: Tensor, **_: Any) -> Tensor:
    return hidden_states


def _kept_alone(hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
    return (hidden_states,)


def channels_last(module: nn.Module) -> nn.Module:
    """Lays out the weights of convolutions over pictures and over clips as tensor cores take them."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if layout := formats.get(parameter.ndim):
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return module


def copy_spatial(unet: Any, image_unet: Any) -> int:
    """Copies what has the same name and shape from a `UNet2DConditionModel`; a 1×1 convolution fits a linear layer.

    The clips' UNet then draws each frame as the pictures' did, but for its attention where a level is not 128 wide:
    diffusers' 3D UNet cuts a level into heads of `HEAD` channels, `diffusion.build_unet`'s into 8 heads.

    Returns:
        The number of parameters copied.

    Raises:
        ConfigError: nothing fits.
    """
    given, copied = image_unet.state_dict(), 0
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            value = given.get(name)
            if value is not None and value.shape[:2] == parameter.shape[:2] and value.numel() == parameter.numel():
                parameter.copy_(value.view_as(parameter))
                copied += parameter.numel()
    # Biases and norms may have a fitting length by chance; no weight of the entry means other widths.
    if given["conv_in.weight"].shape != unet.conv_in.weight.shape:
        theirs, own = (tuple(u.config.block_out_channels) for u in (image_unet, unet))
        raise ConfigError(f"start_image: its UNet has channels {theirs}, this one {own}: nothing to start from")
    return copied


def build_parts(recipe: VideoDiffusionRecipe, image: StableDiffusionGenerator) -> tuple[Any, int]:
    """The UNet to train, in float32, and how many of its parameters an image UNet gave.

    Raises:
        CheckpointError: there is no generator where the recipe has one.
        ConfigError: the start draws other latents than the image generator's, or nothing of it fits.
    """
    latent_channels, text_width = image.vae.config.latent_channels, image.unconditional.shape[-1]
    if recipe.start is not None:
        unet = ZeroscopeGenerator.from_pretrained(recipe.start).unet
        if (drawn := unet.config.in_channels) != latent_channels:
            raise ConfigError(f"{recipe.start} draws {drawn} latent channels, the autoencoder has {latent_channels}")
        return unet, 0
    unet = build_unet(recipe, latent_channels, recipe.side // image.factor, text_width)
    if recipe.start_image is None:
        return unet, 0
    return unet, copy_spatial(unet, StableDiffusionGenerator.from_pretrained(recipe.start_image).unet)


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
    (unet, given), scheduler = build_parts(recipe, image), build_scheduler()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = image.vae.to(device, memory_format=torch.channels_last)
    vae = vae.bfloat16() if dtype is torch.bfloat16 else vae
    pool = ClipPool(recipe, icons, vae, image.text, device)
    log.write(pool=len(pool), latent_std=pool.parts[0][1].latents[:4096].float().std().item())
    temporal = sum(p.numel() for name, p in unet.named_parameters() if is_temporal(name))
    log.write(unet=sum(p.numel() for p in unet.parameters()), temporal=temporal, from_image=given)
    text = image.text.encoder.requires_grad_(False)
    if recipe.frames == 1:
        without_time(unet)
    objective: Any = channels_last(
        _Objective(unet.train(), text, scheduler.alphas_cumprod, recipe.min_snr, recipe.condition_noise).to(device)
    )
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
    """Writes the generator in fp16; autoencoder and text encoder are the image generator's, as they were trained.

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
