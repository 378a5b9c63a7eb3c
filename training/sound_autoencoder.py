"""Trains the mel autoencoder of the embedded default's sound generator.

Source: AudioLDM 2 (arXiv:2308.05734) compresses log-mel spectrograms fourfold in time and in pitch, as Rombach et al.
2022 (arXiv:2112.10752) do pictures. Differs: no discriminator; edges in both directions keep onsets and partials sharp.

Shapes: B clips, T frames, F mel bins, c latent channels, f = 2 ** (levels - 1).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anygen.config import Config
from anygen.generators.latent import save_part
from anygen.generators.mel import LogMel
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
from anygen.training.sound_mixing import SoundPool, SoundSource
from anygen.training.sounds import load_sounds

MEAN = -6.0
"""About the mean of a log-mel spectrogram, where the untrained decoder begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundAutoencoderRecipe(Config):
    """Everything that decides the result."""

    sounds: str
    """Directory of the built sound bank."""
    checksum: str | None = None
    """The sound bank's checksum; None accepts any."""
    channels: tuple[int, ...] = (32, 48, 64)
    """Widths of the levels; each but the last halves frames and bins."""
    latent_channels: int = 8
    layers_per_block: int = 1
    pool: int = 60_000
    """Clips that are composed once and drawn from."""
    batch_size: int = 64
    steps: int = 8000
    minutes: float | None = None
    """Ends the run earlier by the clock; see `Progress`."""
    learning_rate: float = 8e-4
    kl_weight: float = 3e-4
    ema: float = 0.999
    compile: bool = False
    compile_mode: str = "default"
    """`torch.compile`'s; "reduce-overhead" replays the step as a CUDA graph."""
    seed: int = 0


def build(recipe: SoundAutoencoderRecipe) -> Any:
    """The untrained `AutoencoderKL` of one channel, in float32."""
    from diffusers import AutoencoderKL

    levels = len(recipe.channels)
    blocks: dict[str, Any] = {  # diffusers annotates these as one-tuples
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": recipe.channels,
    }
    vae: Any = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        **blocks,
        layers_per_block=recipe.layers_per_block,
        latent_channels=recipe.latent_channels,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=256,
    )
    nn.init.constant_(vae.decoder.conv_out.bias, MEAN)
    return vae


class _Objective(nn.Module):
    """Reconstruction and KL in one module, so that it compiles as one graph."""

    def __init__(self, vae: Any, kl_weight: float) -> None:
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, mel: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """mel float[B, 1, T, F], noise float[B, c, T / f, F / f] -> (loss, mean absolute error)."""
        mean, logvar = self.vae.quant_conv(self.vae.encoder(mel)).chunk(2, 1)
        logvar = logvar.float().clamp(-30, 20)
        latents = mean + noise * torch.exp(0.5 * logvar)
        error = self.vae.decoder(self.vae.post_quant_conv(latents)).float() - mel
        kl = 0.5 * (mean.float() ** 2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean() / mel[0].numel()
        absolute = error.abs().mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        coarse = F.avg_pool2d(error, 4).abs().mean()
        loss = absolute + 0.2 * error.square().mean() + 0.3 * edges + 0.3 * coarse + self.kl_weight * kl
        return loss, absolute


@lowering("batch_size", "pool")
def train(recipe: SoundAutoencoderRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe, writes `out/vae` (diffusers format, fp16) and returns the held-out figures.

    Returns:
        `error` and `convergence` as in `measure`, `scaling_factor` = 1 / standard deviation of the latents.
    """
    accelerator = start(recipe.seed)
    device, log = accelerator.device, RunLog(out, "sound-vae")
    bank = load_sounds(recipe.sounds, recipe.checksum)
    pool = SoundPool.fill(SoundSource(bank, seed=recipe.seed, device=device), recipe.pool)
    log_mel = LogMel().to(device)
    vae = build(recipe)
    log.write(pool=len(pool), parameters=sum(p.numel() for p in vae.parameters()))
    objective: Any = _Objective(vae, recipe.kl_weight).to(device)
    optimizer: Any = torch.optim.AdamW(
        vae.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=device.type == "cuda"
    )
    objective, optimizer = accelerator.prepare(objective, optimizer)
    average = AveragedWeights(vae, recipe.ema)
    step_fn = compiled(objective, recipe.compile_mode if recipe.compile else None)
    factor = 2 ** (len(recipe.channels) - 1)
    progress, pace = Progress(recipe.steps, recipe.minutes), Pace()
    while not progress.done:
        for group in optimizer.param_groups:
            group["lr"] = progress.learning_rate(recipe.learning_rate)
        mel = log_mel(pool.draw(recipe.batch_size))[:, None]
        shape = (len(mel), recipe.latent_channels, mel.shape[2] // factor, mel.shape[3] // factor)
        with bf16_on_gpu(device):
            loss, absolute = step_fn(mel, torch.randn(shape, device=device))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(vae, progress.step)
        progress.step += 1
        if progress.step % 200 == 0 or progress.done:
            clips = progress.step * recipe.batch_size
            log.write(
                step=progress.step,
                loss=loss.item(),
                error=absolute.item(),
                clips=clips,
                clips_per_second=pace.report(clips),
            )
    figures = measure(average.module, SoundSource(bank, seed=1, device=device, held_out=True), out)
    average.module.register_to_config(scaling_factor=figures["scaling_factor"])
    save_part(average.module.half(), out / "vae")
    log.write(final=True, step=progress.step, **figures)
    return figures


@torch.no_grad()
def measure(vae: Any, source: SoundSource, out: Path | None = None, count: int = 256) -> dict[str, float]:
    """Over `count` held-out clips, restored from the mode of their latents.

    Returns:
        `error`, mean absolute error of log-mel magnitudes in dB; `convergence`, the mean over clips of
        |M - M'| / |M| for magnitudes M (spectral convergence, arXiv:1808.06719); `scaling_factor`.
    """
    log_mel = LogMel().to(source.device)
    errors, convergences, latents = [], [], []
    for number, batch in enumerate(source.clips(count, most=32)):
        mel = log_mel(batch.waveforms)[:, None]
        posterior = vae.encode(mel.to(vae.dtype)).latent_dist
        restored = vae.decode(posterior.mode()).sample.float()
        errors.append((restored - mel).abs().mean((1, 2, 3)) * DECIBELS)
        convergences.append(convergence(restored, mel))
        latents.append(posterior.sample().float())
        if number == 0 and out is not None:
            save_grid(torch.stack([as_pictures(mel[:, 0]), as_pictures(restored[:, 0])], 1).flatten(0, 1)[:32],
                      out / "vae.png", columns=4)  # fmt: skip
    return {
        "error": torch.cat(errors).mean().item(),
        "convergence": torch.cat(convergences).mean().item(),
        "scaling_factor": 1 / torch.cat(latents).std().item(),
    }


DECIBELS = 8.685889638
"""Decibels of one unit of a natural logarithm of magnitudes: 20 / ln 10."""


def convergence(restored: Tensor, mel: Tensor) -> Tensor:
    """Spectral convergence of log-mel spectrograms, one a clip: float[B, ...] twice -> float[B]."""
    wanted, got = mel.exp().flatten(1), restored.exp().flatten(1)
    return (wanted - got).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-6)


def as_pictures(mel: Tensor) -> Tensor:
    """Spectrograms float[B, T, F] -> float[B, 3, F, T] in [0, 1], time to the right, high tones on top."""
    level = ((mel.float() + 11.5) / 13).clamp(0, 1).transpose(1, 2).flip(1)
    return level[:, None].expand(-1, 3, -1, -1)
