"""Trains the vocoder of the embedded default's sound generator: log-mel spectrogram -> waveform.

Source: HiFi-GAN (Kong et al. 2020, arXiv:2010.05646) for the network and the mel loss; the multi-resolution STFT loss
of Parallel WaveGAN (arXiv:1910.11480); discriminators on spectrograms of three resolutions from UnivNet
(arXiv:2106.07889), least-squares losses and feature matching. Differs: no weight normalisation, so that the module is
trained as `SpeechT5HifiGan` stores it; the discriminators join when the spectral losses have done most of the work; a
share of the spectrograms is read back from the mel autoencoder first, because those are what it will be given.

Shapes: B clips, N samples, T frames, F mel bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anygen.config import Config
from anygen.errors import ConfigError
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
from anygen.training.sound_autoencoder import DECIBELS, as_pictures, convergence
from anygen.training.sound_mixing import SoundPool, SoundSource
from anygen.training.sound_packages import RATE
from anygen.training.sounds import load_sounds

RESOLUTIONS = ((512, 128), (1024, 256), (2048, 512))
"""Window and hop, in samples, of the spectrograms that losses and discriminators look at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VocoderRecipe(Config):
    """Everything that decides the result."""

    sounds: str
    """Directory of the built sound bank."""
    checksum: str | None = None
    """The sound bank's checksum; None accepts any."""
    start: str | None = None
    """Directory of a vocoder that such a recipe trained, to go on from; its own sizes then hold."""
    vae: str | None = None
    """Directory of the trained mel autoencoder, for `restored`."""
    restored: float = 0.0
    """Share of the spectrograms that are read back from the autoencoder."""
    width: int = 256
    """Channels before the first upsampling; each of the five halves them, and multiples of 8 are what GPUs are fast
    at."""
    kernels: tuple[int, ...] = (3, 7)
    dilations: tuple[int, ...] = (1, 3)
    """Kernels and dilations of the residual blocks, all kernels at all dilations."""
    pool: int = 30_000
    """Clips that are composed once and drawn from."""
    frames: int = 64
    """Length of what is trained on, 10 ms each."""
    batch_size: int = 64
    steps: int = 20_000
    minutes: float | None = None
    """Ends the run earlier by the clock; see `Progress`."""
    learning_rate: float = 8e-4
    adversarial_from: float = 0.4
    """The share of the run after which the discriminators join; 1 leaves them out."""
    adversarial_weight: float = 0.5
    """Of the generator's adversarial loss; feature matching has twice as much."""
    ema: float = 0.999
    compile: bool = False
    compile_mode: str = "default"
    """`torch.compile`'s, of the generator network alone: transforms of the losses hold complex numbers."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.restored and self.vae is None:
            raise ConfigError("restored needs a vae to restore from")


def build(recipe: VocoderRecipe) -> Any:
    """The `SpeechT5HifiGan` for 64 mel bins at 16 kHz, 160 samples a frame: untrained, or that of `recipe.start`."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    if recipe.start is not None:
        return SpeechT5HifiGan.from_pretrained(recipe.start, dtype=torch.float32)
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=64,
            sampling_rate=RATE,
            upsample_initial_channel=recipe.width,
            upsample_rates=[5, 4, 2, 2, 2],
            upsample_kernel_sizes=[15, 12, 8, 4, 4],
            resblock_kernel_sizes=list(recipe.kernels),
            resblock_dilation_sizes=[list(recipe.dilations)] * len(recipe.kernels),
            normalize_before=False,
        )
    )
    for module in vocoder.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            module.reset_parameters()  # transformers' own is meant for weight normalisation
    return vocoder


def magnitudes(waveform: Tensor, window: int, hop: int) -> Tensor:
    """float[B, N] -> float32[B, window / 2 + 1, frames], with a gradient everywhere."""
    with torch.autocast(waveform.device.type, enabled=False):
        hann = torch.hann_window(window, device=waveform.device)
        waves = torch.stft(waveform.float(), window, hop, window=hann, return_complex=True)
        return torch.view_as_real(waves).square().sum(-1).clamp(min=1e-7).sqrt()


def spectral_loss(made: Tensor, real: Tensor) -> Tensor:
    """Spectral convergence and log-magnitude error, averaged over `RESOLUTIONS`: float[B, N] twice -> a scalar."""
    losses = []
    for window, hop in RESOLUTIONS:
        got, wanted = magnitudes(made, window, hop), magnitudes(real, window, hop)
        losses.append((wanted - got).norm() / wanted.norm().clamp(min=1e-6))
        losses.append(F.l1_loss(got.log(), wanted.log()))
    return torch.stack(losses).sum() / len(RESOLUTIONS)


class SpectrogramJudge(nn.Module):
    """One discriminator: a spectrogram of one resolution -> a map of scores, 1 for real."""

    def __init__(self, window: int, hop: int, width: int = 24) -> None:
        super().__init__()
        self.window, self.hop = window, hop
        layers = [nn.Conv2d(1, width, (9, 3), padding=(4, 1))]
        layers += [nn.Conv2d(width, width, (9, 3), stride=(2, 1), padding=(4, 1)) for _ in range(3)]
        layers += [nn.Conv2d(width, width, 3, padding=1)]
        self.layers, self.score = nn.ModuleList(layers), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, waveform: Tensor) -> list[Tensor]:
        """float[B, N] -> the features of each layer and, last, the scores."""
        hidden, seen = magnitudes(waveform, self.window, self.hop).log()[:, None], []
        for layer in self.layers:
            hidden = F.leaky_relu(layer(hidden), 0.2)
            seen.append(hidden)
        return [*seen, self.score(hidden)]


class Judges(nn.Module):
    """A discriminator for each resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.judges = nn.ModuleList(SpectrogramJudge(window, hop) for window, hop in RESOLUTIONS)

    def losses(self, made: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """For the generator: (least-squares adversarial loss, feature matching)."""
        adversarial, matching = [], []
        for judge in self.judges:
            fake = judge(made)
            with torch.no_grad():
                true = judge(real)
            adversarial.append((fake[-1].float() - 1).square().mean())
            matching += [F.l1_loss(a.float(), b.float()) for a, b in zip(fake[:-1], true[:-1], strict=True)]
        return torch.stack(adversarial).mean(), torch.stack(matching).mean()

    def own_loss(self, made: Tensor, real: Tensor) -> Tensor:
        """For the discriminators: real towards 1, made towards 0."""
        losses = [
            (judge(real)[-1].float() - 1).square().mean() + judge(made)[-1].float().square().mean()
            for judge in self.judges
        ]
        return torch.stack(losses).mean()


@lowering("batch_size", "pool")
def train(recipe: VocoderRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe, writes `out/vocoder` (transformers format, fp16) and returns the figures of `measure`."""
    from diffusers import AutoencoderKL

    accelerator = start(recipe.seed)
    device, log = accelerator.device, RunLog(out, "vocoder")
    bank = load_sounds(recipe.sounds, recipe.checksum)
    pool = SoundPool.fill(SoundSource(bank, seed=recipe.seed, device=device), recipe.pool)
    log_mel, vocoder, judges = LogMel().to(device), build(recipe).to(device).train(), Judges().to(device)
    vae: Any = None
    if recipe.vae is not None:
        vae = AutoencoderKL.from_pretrained(recipe.vae, torch_dtype=torch.float32).to(device).eval()
    log.write(pool=len(pool), parameters=sum(p.numel() for p in vocoder.parameters()))
    maker, critic = (
        torch.optim.AdamW(
            part.parameters(),
            lr=recipe.learning_rate,
            betas=(0.8, 0.99),
            weight_decay=1e-3,
            fused=device.type == "cuda",
        )
        for part in (vocoder, judges)
    )
    average = AveragedWeights(vocoder, recipe.ema)
    speak = compiled(vocoder, recipe.compile_mode if recipe.compile else None)
    hop, progress, pace = log_mel.config.hop, Progress(recipe.steps, recipe.minutes), Pace()
    adversarial = torch.zeros((), device=device)
    while not progress.done:
        for optimizer in (maker, critic):
            for group in optimizer.param_groups:
                group["lr"] = progress.learning_rate(recipe.learning_rate)
        clips = pool.draw(recipe.batch_size)
        mel = log_mel(clips)
        begin = int(torch.randint(mel.shape[1] - recipe.frames + 1, ()))
        real = clips[:, begin * hop : (begin + recipe.frames) * hop]
        with bf16_on_gpu(device):
            given = mel[:, begin : begin + recipe.frames]
            if recipe.restored:
                first, last = around(begin, recipe.frames, mel.shape[1])
                given = restored(vae, mel[:, first:last], recipe.restored)[:, begin - first :][:, : recipe.frames]
            made = speak(given).float()
            # The frames at the ends look beyond the stretch; both sides look at the same mirror image.
            distance = F.l1_loss(log_mel(made), log_mel(real))
            loss = spectral_loss(made, real) + distance
            if progress.fraction >= recipe.adversarial_from:
                own = judges.own_loss(made.detach(), real)
                critic.zero_grad(set_to_none=True)
                own.backward()
                nn.utils.clip_grad_norm_(judges.parameters(), 5.0)
                critic.step()
                adversarial, matching = judges.losses(made, real)
                loss = loss + recipe.adversarial_weight * (adversarial + 2 * matching)
        loss.backward()
        nn.utils.clip_grad_norm_(vocoder.parameters(), 5.0)
        maker.step()
        maker.zero_grad(set_to_none=True)
        average.update(vocoder, progress.step)
        progress.step += 1
        if progress.step % 200 == 0 or progress.done:
            seen = progress.step * recipe.batch_size
            log.write(
                step=progress.step,
                loss=loss.item(),
                error=DECIBELS * distance.item(),
                adversarial=adversarial.item(),
                clips_per_second=pace.report(seen),
            )
    figures = measure(average.module, SoundSource(bank, seed=1, device=device, held_out=True), out)
    average.module.half().save_pretrained(out / "vocoder", max_shard_size="15MB")
    log.write(final=True, step=progress.step, **figures)
    return figures


def around(begin: int, frames: int, length: int, margin: int = 32) -> tuple[int, int]:
    """The first and last frame of what the autoencoder reads for a stretch: a margin on each side where there is room.

    Whole spectrograms would be read four times for what is used. Bounds are multiples of 4, as latents want them.
    """
    return max(0, begin - margin) // 4 * 4, min(length, begin + frames + margin + 3) // 4 * 4


@torch.no_grad()
def restored(vae: Any, mel: Tensor, share: float) -> Tensor:
    """The first rows read back from the autoencoder, the rest as they are: float[B, T, F]."""
    count = round(share * len(mel))
    back = vae.decode(vae.encode(mel[:count, None]).latent_dist.sample()).sample[:, 0]
    return torch.cat([back.to(mel.dtype), mel[count:]])


@torch.no_grad()
def measure(vocoder: Any, source: SoundSource, out: Path | None = None, count: int = 128) -> dict[str, float]:
    """Over `count` held-out clips, from their own spectrograms.

    Returns:
        `error`, mean absolute error in dB between the log-mel spectrograms of what went in and what came out;
        `convergence`, spectral convergence of the same.
    """
    log_mel = LogMel().to(source.device)
    errors, convergences = [], []
    for number, batch in enumerate(source.clips(count, most=32)):
        mel = log_mel(batch.waveforms)
        made = vocoder(mel.to(vocoder.dtype)).float()
        again = log_mel(made)
        errors.append((again - mel).abs().mean((1, 2)) * DECIBELS)
        convergences.append(convergence(again, mel))
        if number == 0 and out is not None:
            pictures = torch.stack([as_pictures(mel), as_pictures(again)], 1).flatten(0, 1)[:32]
            save_grid(pictures, out / "vocoder.png", columns=4)
            pairs = [wave for pair in zip(batch.waveforms[:6], made[:6], strict=True) for wave in pair]
            save_waves(pairs, out / "vocoder.wav")
    return {"error": torch.cat(errors).mean().item(), "convergence": torch.cat(convergences).mean().item()}


def save_waves(waveforms: Sequence[Tensor], path: Path) -> None:
    """Writes float[N] waveforms one after the other, with pauses of 0.3 s, as 16-bit WAV."""
    from scipy.io import wavfile

    pause = np.zeros(round(0.3 * RATE), np.float32)
    parts = [part for wave in waveforms for part in (wave.float().cpu().numpy(), pause)]
    wavfile.write(path, RATE, (np.concatenate(parts).clip(-1, 1) * 32_767).astype(np.int16))
