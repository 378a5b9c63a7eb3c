"""Trains the video generator of the embedded default: temporal layers in the image generator's UNet.

Autoencoder, text encoder and the UNet's spatial layers are the image generator's and stay as they are: clips show what
pictures show, and what is learned is how they move. Three kinds of clips are mixed: icons in synthetic motion, icons
that were drawn moving, and pictures that stay still, which carry counts, places and words that the others lack.

Source: Guo et al. 2023 (arXiv:2307.04725) and Blattmann et al. 2023 (arXiv:2304.08818), temporal layers that start as
the identity in a frozen UNet that draws pictures; Wang et al. 2023 (arXiv:2308.06571), the layers. Objective as
`diffusion`'s.

Shapes: as in `clip_pools`.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anygen.component import check_fit
from anygen.errors import ConfigError
from anygen.generators.clip_unet import animated, temporal_state
from anygen.generators.stable_diffusion import StableDiffusionGenerator
from anygen.generators.zeroscope import ClipDefaults, ZeroscopeGenerator
from anygen.training.clip_pools import ClipPool
from anygen.training.latent_diffusion import (
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
    lowering,
    save_grid,
    start,
)
from anygen.training.motion import FPS, FRAMES
from anygen.training.pictures import load_icons


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


class _Objective(VelocityObjective):
    """With the image generator's frozen `CLIPTextModel`; latents are float[B, c, F, h, w]."""

    def predict(self, noisy: Tensor, tokens: Tensor, times: Tensor) -> Tensor:
        with torch.no_grad():
            embeds = self.text(input_ids=tokens).last_hidden_state
            if self.condition_noise:
                embeds = disturbed(embeds, self.condition_noise)
        return self.unet(noisy, times, encoder_hidden_states=embeds, return_dict=False)[0]


@lowering("batch_size")
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
