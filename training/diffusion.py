"""Trains the image generator of the embedded default on latents kept on the device.

First UNet and text encoder together, then, from that start, the UNet alone: the text encoder's output is the space that
an output projector is fitted to, and it can be fitted while the UNet goes on, because `freeze_text` keeps the space.
Later the two may learn the words of clips as well, from frames (`moving`, `animated`); `keep_text` holds what captions
of pictures mean, so that what was fitted to them stays right.

Source: Rombach et al. 2022 (arXiv:2112.10752), where the text encoder of the text-to-image model is trained with the
UNet; velocity target (arXiv:2202.00512), zero terminal signal-to-noise ratio (arXiv:2305.08891), min-SNR weighting
(arXiv:2303.09556), noise on the condition (Ho et al. 2021, arXiv:2106.15282, "conditioning augmentation").
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anygen.errors import ConfigError
from anygen.generators.stable_diffusion import SamplingDefaults, StableDiffusionGenerator, TextConditioner
from anygen.training.captions import canonical, caption_corpus, said, varied
from anygen.training.clip_pools import ClipFrames
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
    lowering,
    save_grid,
    start,
)
from anygen.training.motion import FRAMES
from anygen.training.pictures import PictureSource, load_icons
from anygen.training.tokenizer import train_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionRecipe(LatentDiffusionRecipe):
    """Everything that decides the result."""

    icons: str
    """Directory of the built icon set."""
    vae: str
    """Directory of the trained autoencoder."""
    checksum: str | None = None
    """The icon set's checksum; None accepts any."""
    start: str | None = None
    """Directory of a generator trained by such a recipe, to go on from; its own sizes and tokenizer then hold."""
    freeze_text: bool = False
    """Trains the UNet alone; the text encoder is written as it was read."""
    channels: tuple[int, ...] = (128, 224, 288)
    transformer_layers: tuple[int, ...] = (1, 1, 1)
    layers_per_block: int = 1
    text_width: int = 256
    text_layers: int = 4
    context: int = 32
    """Tokens of a caption, and of the condition."""
    vocab_size: int = 4096
    pool: int = 200_000
    """Composed pictures that are encoded once and drawn from."""
    moving: int = 0
    """Clips of synthetic motion whose frames are drawn from as well."""
    animated: int = 0
    """Clips of animated icons, likewise."""
    animations: str | None = None
    """Directory of the built animations; needed for animated clips."""
    animations_checksum: str | None = None
    """The animations' checksum; None accepts any."""
    frames: int = FRAMES
    """Of a clip."""
    frame_share: float = 0.0
    """Of a batch, of frames of clips."""
    keep_text: float | None = None
    """Weight of what holds the text encoder at its start for captions of pictures: the mean squared change, as a share
    of the output's variance. None: nothing does."""
    sampling: SamplingDefaults = field(default_factory=lambda: SamplingDefaults(steps=16, guidance_scale=3.5))

    def __post_init__(self) -> None:
        if self.freeze_text and self.start is None:
            raise ConfigError("freeze_text needs a start: an untrained text encoder would stay as it is")
        if self.keep_text is not None and (self.start is None or self.freeze_text):
            raise ConfigError("keep_text needs a start to keep, and a text encoder that is trained")
        if not 0 <= self.frame_share < 1 or (self.frame_share > 0) != (self.moving + self.animated > 0):
            raise ConfigError("frame_share: a share below 1 needs moving or animated clips, and they need a share")
        if self.animated and self.animations is None:
            raise ConfigError("animated: needs animations, the directory that holds them")

    @property
    def pictures(self) -> int:
        """Rows of a batch that are pictures; they come first."""
        return self.batch_size - round(self.batch_size * self.frame_share)


def build_unet(recipe: DiffusionRecipe, latent_channels: int, side: int) -> Any:
    """The untrained UNet: cross-attention at the two finer levels and in the middle."""
    from diffusers import UNet2DConditionModel

    transformers: dict[str, Any] = {"transformer_layers_per_block": recipe.transformer_layers}
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=recipe.channels,
        layers_per_block=recipe.layers_per_block,
        **transformers,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=8,
        norm_num_groups=32,
    )


def build_text(recipe: DiffusionRecipe, icons: IconSet) -> TextConditioner:
    """The untrained text encoder, and its tokenizer trained on captions of every concept."""
    from transformers import CLIPTextConfig, CLIPTextModel

    corpus = caption_corpus(icons.concepts, recipe.seed)
    tokenizer = train_tokenizer(corpus, vocab_size=recipe.vocab_size, context=recipe.context)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=4,
        max_position_embeddings=recipe.context,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TextConditioner(CLIPTextModel(config), tokenizer)


def build_parts(recipe: DiffusionRecipe, icons: IconSet, vae: Any) -> tuple[Any, TextConditioner]:
    """The UNet and the text encoder to train, in float32: untrained, or those of `recipe.start`.

    Raises:
        CheckpointError: there is no generator in `recipe.start`.
        ConfigError: it draws other latents than the autoencoder's.
    """
    latent_channels = vae.config.latent_channels
    if recipe.start is None:
        side = icons.pixels.shape[-1] // 2 ** (len(vae.config.block_out_channels) - 1)
        return build_unet(recipe, latent_channels, side), build_text(recipe, icons)
    generator = StableDiffusionGenerator.from_pretrained(recipe.start)
    if (drawn := generator.unet.config.in_channels) != latent_channels:
        raise ConfigError(f"{recipe.start} draws {drawn} latent channels, the autoencoder has {latent_channels}")
    return generator.unet, generator.text


class LatentPool:
    """Composed pictures as latents, each with two captions, on the training device."""

    def __init__(self, recipe: DiffusionRecipe, source: PictureSource, vae: Any, text: TextConditioner) -> None:
        rng, icons, tokenize = random.Random(recipe.seed + 1), source.icons, CaptionTokens(text)
        concepts: list[int] = icons.concept.tolist()
        latents: list[Tensor] = []
        tokens: list[Tensor] = []
        for batch in source.pictures(recipe.pool):
            with torch.no_grad():
                pixels = (batch.pixels * 2 - 1).to(vae.dtype).contiguous(memory_format=torch.channels_last)
                posterior = vae.encode(pixels).latent_dist
                latents.append((posterior.sample() * vae.config.scaling_factor).to(torch.bfloat16))
            captions = []
            for icon, drawing in zip(batch.icons, batch.drawings, strict=True):
                concept = icons.concepts[concepts[icon]]
                captions.append(canonical(said(drawing, concept, rng, open_style=0.08)))
                captions.append(varied(said(drawing, concept, rng), rng))
            tokens.append(tokenize(captions))
        self.latents = torch.cat(latents)
        device = self.latents.device
        self.tokens = torch.cat(tokens).view(len(self.latents), 2, -1).to(device)
        self.empty = tokenize([""])[0].to(device)

        self.frames, self.share = None, recipe.frame_share
        if self.share:
            self.frames = ClipFrames(recipe, icons, vae, text, device)

    def draw(self, size: int, dropout: float) -> tuple[Tensor, Tensor]:
        """float[B, c, h, w] latents, frames of clips last, and int64[B, L] captions, a share of them empty."""
        device, others = self.latents.device, round(size * self.share)
        rows = torch.randint(len(self.latents), (size - others,), device=device)
        latents, tokens = self.latents[rows].float(), self.tokens[rows, torch.randint(2, rows.shape, device=device)]
        if self.frames is not None:
            more, said_of = self.frames.draw(others)
            latents, tokens = torch.cat([latents, more]), torch.cat([tokens, said_of])
        dropped = torch.rand(size, 1, device=device) < dropout
        return latents, torch.where(dropped, self.empty, tokens)


class _Objective(VelocityObjective):
    """With a `CLIPTextModel`.

    Args:
        keep: weight of the text encoder's change from what it was when this was built, or None.
        kept: rows of a batch that it counts for, the first ones.
    """

    def __init__(self, *args: Any, keep: float | None = None, kept: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.keep, self.kept = keep, kept
        self.given = None if keep is None else copy.deepcopy(self.text).requires_grad_(False)

    def forward(self, latents: Tensor, tokens: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The velocity loss, and how far captions have moved."""
        loss = super().forward(latents, tokens, noise, times)
        return loss if self.given is None else loss + (self.keep or 0) * self.moved(tokens[: self.kept])

    def moved(self, tokens: Tensor) -> Tensor:
        """Mean squared change of the text encoder's output, as a share of its variance: int64[B, L] -> float32[]."""
        assert self.given is not None
        with torch.no_grad():
            before = self.given(input_ids=tokens).last_hidden_state.float()
        after = self.text(input_ids=tokens).last_hidden_state.float()
        return (after - before).square().mean() / before.var(0, correction=0).mean().clamp(min=1e-6)

    def predict(self, noisy: Tensor, tokens: Tensor, times: Tensor) -> Tensor:
        embeds = self.text(input_ids=tokens).last_hidden_state
        if self.condition_noise:
            embeds = disturbed(embeds, self.condition_noise)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        return self.unet(noisy, times, encoder_hidden_states=embeds, return_dict=False)[0]


@lowering("batch_size", "pool")
def train(recipe: DiffusionRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/generator`, a diffusers folder in fp16.

    Raises:
        CheckpointError: there is no generator in `recipe.start`.
        ConfigError: the icon set, or the start, is not what the recipe needs.
    """
    from diffusers import AutoencoderKL

    accelerator = start(recipe.seed)
    device, log = accelerator.device, RunLog(out, "diffusion")
    icons = load_icons(recipe.icons, recipe.checksum)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae: Any = AutoencoderKL.from_pretrained(recipe.vae, torch_dtype=dtype)
    vae = vae.to(device, memory_format=torch.channels_last).eval()
    (unet, text), scheduler = build_parts(recipe, icons, vae), build_scheduler()
    pool = LatentPool(recipe, PictureSource(icons, seed=recipe.seed, device=device), vae, text)
    log.write(pool=len(pool.latents), latent_std=pool.latents.float().std().item())
    text.encoder.requires_grad_(not recipe.freeze_text)
    objective: Any = _Objective(
        unet,
        text.encoder,
        scheduler.alphas_cumprod,
        recipe.min_snr,
        recipe.condition_noise,
        keep=recipe.keep_text,
        kept=recipe.pictures,
    )
    objective = objective.to(device, memory_format=torch.channels_last)
    log.write(unet=sum(p.numel() for p in unet.parameters()), text=sum(p.numel() for p in text.encoder.parameters()))
    average = AveragedWeights(objective, recipe.ema)

    def pack() -> StableDiffusionGenerator:
        conditioner = TextConditioner(average.module.text, text.tokenizer)
        with torch.no_grad():
            unconditional = conditioner(pool.empty[None])[0]
        return StableDiffusionGenerator(
            vae=vae,
            unet=average.module.unet,
            scheduler=scheduler,
            unconditional=unconditional,
            text=conditioner,
            defaults=recipe.sampling,
        )

    def shown(step: int | None) -> None:
        captions = SHOWN + FRAMES_SHOWN if recipe.frame_share else SHOWN
        show(pack(), out / ("samples.png" if step is None else f"samples-{step}.png"), dtype, captions)

    def write() -> None:
        if recipe.keep_text is not None:
            with torch.no_grad():
                moved = average.module.moved(pool.draw(recipe.batch_size, 0.0)[1][: recipe.pictures])
            log.write(text_moved=moved.item())
        save_half(pack(), Path(recipe.vae), out / "generator")

    return fit(
        recipe,
        accelerator,
        objective,
        average,
        objective,
        pool.draw,
        log,
        counted="images",
        show=shown,
        show_every=4000,
        write=write,
    )


SHOWN = (
    "a red apple, in the 3D style",
    "a dog, in the flat style, on a blue background",
    "three trumpets, in the cartoon style",
    "a small rocket on the left, in the sticker style, in the sky",
    "a tiger, in the retro style",
    "a guitar, in the 3D style, in a forest",
    "two pizzas, in the flat style, on a pink background",
    "a face with tears of joy",
)
FRAMES_SHOWN = (
    "a dog moving left, in the cartoon style",
    "a trumpet spinning, in the sticker style",
    "a tiger growing, in the retro style",
    "a red apple moving right, in the 3D style, on a blue background",
)


def show(generator: StableDiffusionGenerator, path: Path, dtype: torch.dtype, captions: Sequence[str] = SHOWN) -> None:
    """Draws each caption with four seeds."""
    condition = generator.encode_text([caption for caption in captions for _ in range(4)])
    with torch.autocast(generator.device.type, dtype=dtype, enabled=dtype != torch.float32):
        latents = generator.sample(condition, seeds=list(range(4)) * len(captions))
    save_grid(generator.decode(latents), path, columns=8)


def save_half(generator: StableDiffusionGenerator, vae: Path, out: Path) -> None:
    """Writes the generator in fp16 and leaves it as it is; the autoencoder is copied as it was trained.

    An earlier one in `out` is replaced when the new one is whole.
    """
    from diffusers import AutoencoderKL

    half = StableDiffusionGenerator(
        vae=AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float16),
        unet=copy.deepcopy(generator.unet).half(),
        scheduler=generator.scheduler,
        unconditional=generator.unconditional.half(),
        text=TextConditioner(copy.deepcopy(generator.text.encoder).half(), generator.text.tokenizer),
        defaults=generator.defaults,
    )
    replace_folder(half, out)
