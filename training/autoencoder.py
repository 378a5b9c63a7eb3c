"""Trains the image autoencoder of the embedded default.

Source: Rombach et al. 2022 (arXiv:2112.10752), section 3.1, without its patch discriminator: icons have no texture to
hallucinate, and an L1 + gradient loss keeps their edges. Pictures come from a pool on the device, some of them turned
and mirrored: latents are to hold whatever is drawn, not only what stands upright.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anygen.config import Config
from anygen.generators.latent import save_part
from anygen.training.loop import (
    AveragedWeights,
    Pace,
    Progress,
    RunLog,
    bf16_on_gpu,
    compiled,
    lowering,
    save_grid,
    start,
)
from anygen.training.pictures import PicturePool, PictureSource, load_icons, turned


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderRecipe(Config):
    """Everything that decides the result."""

    icons: str
    """Directory of the built icon set."""
    checksum: str | None = None
    """The icon set's checksum; None accepts any."""
    start: str | None = None
    """Directory of a trained autoencoder to go on from; its own sizes then hold."""
    freeze_encoder: bool = False
    """Trains the decoder alone: the latents, and so a UNet trained on them, stay valid."""
    channels: tuple[int, ...] = (48, 96, 128, 160)
    """Widths of the levels; each but the last halves the side."""
    latent_channels: int = 12
    layers_per_block: int = 1
    pool: int = 60_000
    """Pictures that are composed once and drawn from."""
    turned: float = 0.5
    """Share of each batch that is mirrored, or turned by quarters, or both."""
    batch_size: int = 64
    steps: int = 8000
    minutes: float | None = None
    """Ends the run earlier by the clock; see `Progress`."""
    learning_rate: float = 6e-4
    kl_weight: float = 1e-4
    ema: float = 0.999
    compile: bool = False
    compile_mode: str = "default"
    """`torch.compile`'s; "reduce-overhead" replays the step as a CUDA graph."""
    seed: int = 0


def build(recipe: AutoencoderRecipe) -> Any:
    """The untrained `AutoencoderKL`, or the one to go on from, in float32."""
    from diffusers import AutoencoderKL

    if recipe.start is not None:
        return AutoencoderKL.from_pretrained(recipe.start, torch_dtype=torch.float32)
    levels = len(recipe.channels)
    blocks: dict[str, Any] = {  # diffusers annotates these as one-tuples
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": recipe.channels,
    }
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        **blocks,
        layers_per_block=recipe.layers_per_block,
        latent_channels=recipe.latent_channels,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=128,
    )


class _Objective(nn.Module):
    """Reconstruction and KL in one module, so that it compiles as one graph."""

    def __init__(self, vae: Any, kl_weight: float) -> None:
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight
        laplacian = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]]).view(1, 1, 3, 3).repeat(3, 1, 1, 1)
        self.laplacian: Tensor
        self.register_buffer("laplacian", laplacian)

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """pixels float[B, 3, H, W] in [-1, 1], noise float[B, c, h, w] -> (loss, mean squared error)."""
        mean, logvar = self.vae.quant_conv(self.vae.encoder(pixels)).chunk(2, 1)
        logvar = logvar.float().clamp(-30, 20)
        latents = mean + noise * torch.exp(0.5 * logvar)
        restored = self.vae.decoder(self.vae.post_quant_conv(latents)).float()
        kl = 0.5 * (mean.float() ** 2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean() / pixels[0].numel()
        squared = F.mse_loss(restored, pixels)
        edges = F.l1_loss(self._edges(restored), self._edges(pixels))
        coarse = sum(F.l1_loss(F.avg_pool2d(restored, k), F.avg_pool2d(pixels, k)) for k in (2, 4))
        loss = F.l1_loss(restored, pixels) + 3 * squared + 0.4 * edges + 0.2 * coarse + self.kl_weight * kl
        return loss, squared

    def _edges(self, pixels: Tensor) -> Tensor:
        return F.conv2d(pixels, self.laplacian, groups=3)


@lowering("batch_size", "pool")
def train(recipe: AutoencoderRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe, writes `out/vae` (diffusers format, fp16) and returns the held-out figures.

    Returns:
        `psnr` in dB on held-out compositions, `scaling_factor` = 1 / standard deviation of the latents.
    """

    accelerator = start(recipe.seed)
    device, log = accelerator.device, RunLog(out, "vae")
    icons = load_icons(recipe.icons, recipe.checksum)
    pool = PicturePool(PictureSource(icons, seed=recipe.seed, device=device), recipe.pool)
    log.write(pool=len(pool))
    vae = build(recipe)
    if recipe.freeze_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    objective: Any = _Objective(vae, recipe.kl_weight)
    objective = objective.to(device, memory_format=torch.channels_last)
    optimizer: Any = torch.optim.AdamW(
        trained, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=device.type == "cuda"
    )
    objective, optimizer = accelerator.prepare(objective, optimizer)
    average = AveragedWeights(vae, recipe.ema)
    step_fn = compiled(objective, recipe.compile_mode if recipe.compile else None)
    side = icons.pixels.shape[-1] // 2 ** (len(vae.config.block_out_channels) - 1)
    noise_shape = (recipe.batch_size, vae.config.latent_channels, side, side)
    progress, pace = Progress(recipe.steps, recipe.minutes), Pace()
    while not progress.done:
        for group in optimizer.param_groups:
            group["lr"] = progress.learning_rate(recipe.learning_rate)
        pixels = turned(pool.draw(recipe.batch_size), recipe.turned)
        noise = torch.randn(noise_shape, device=device).contiguous(memory_format=torch.channels_last)
        with bf16_on_gpu(device):
            loss, squared = step_fn(pixels, noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(vae, progress.step)
        progress.step += 1
        if progress.step % 200 == 0 or progress.done:
            psnr, images = -10 * torch.log10(squared / 4).item(), progress.step * recipe.batch_size
            log.write(
                step=progress.step,
                loss=loss.item(),
                batch_psnr=psnr,
                images=images,
                images_per_second=pace.report(images),
            )
    figures = measure(average.module, PictureSource(icons, seed=1, device=device, held_out=True), out)
    if recipe.freeze_encoder:
        figures["scaling_factor"] = vae.config.scaling_factor
    average.module.register_to_config(scaling_factor=figures["scaling_factor"])
    save_part(average.module.half(), out / "vae")
    log.write(final=True, step=progress.step, **figures)
    return figures


@torch.no_grad()
def measure(vae: Any, source: PictureSource, out: Path | None = None, count: int = 512) -> dict[str, float]:
    """Mean PSNR in dB over `count` held-out pictures (latent mode), and the latents' scale."""
    errors, latents = [], []
    batches = source.batches(64)
    for number in range(max(1, count // 64)):
        pixels = next(batches).pixels
        posterior = vae.encode(pixels.to(vae.dtype) * 2 - 1).latent_dist
        restored = (vae.decode(posterior.mode()).sample.float() / 2 + 0.5).clamp(0, 1)
        errors.append((restored - pixels).square().mean((1, 2, 3)))
        latents.append(posterior.sample().float())
        if number == 0 and out is not None:
            save_grid(torch.stack([pixels[:32], restored[:32]], 1).flatten(0, 1), out / "vae.png")
    psnr = -10 * torch.log10(torch.cat(errors).clamp(min=1e-8))
    return {"psnr": psnr.mean().item(), "scaling_factor": 1 / torch.cat(latents).std().item()}
