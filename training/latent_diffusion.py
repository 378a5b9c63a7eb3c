"""What the trainings of latent-diffusion generators share: settings, caption ids, loss and loop.

Source: velocity target (arXiv:2202.00512), min-SNR weighting (arXiv:2303.09556), zero terminal signal-to-noise ratio
(arXiv:2305.08891). `diffusion`, `video_diffusion` and `sound_diffusion` add their data, networks and folders.
Shapes: B batch, L tokens; latents are [B, c, ...].
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from anygen.config import Config
from anygen.generators.base import Generator
from anygen.training.loop import Alarm, AveragedWeights, Pace, Progress, RunLog, bf16_on_gpu, compiled
from anygen.training.losses import diffusion_loss, diffusion_target, snr_weights

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentDiffusionRecipe(Config):
    """How a generator is trained, whatever it makes."""

    batch_size: int = 512
    steps: int = 16_000
    minutes: float | None = None
    learning_rate: float = 8e-4
    decay: bool = True
    """Lets the learning rate fall along a cosine; without, it stays at its peak, for another run to go on from."""
    ema: float = 0.9995
    caption_dropout: float = 0.1
    condition_noise: float = 0.0
    """Most noise on the text side's output, in its standard deviations; see `disturbed`."""
    min_snr: float | None = 5.0
    """Gamma of min-SNR weighting; None: all times weigh alike, so that what is settled while there is little but noise
    (where things are, how they go on) counts as much as what they look like."""
    compile: bool = False
    compile_mode: str = "default"
    """`torch.compile`'s; "reduce-overhead" replays the step as a CUDA graph."""
    checkpoint_minutes: float | None = None
    """Writes the generator as it is so far, every so often."""
    seed: int = 0


def build_scheduler() -> Any:
    """DPM-Solver++ over the scaled-linear schedule, rescaled so that the last step is pure noise."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # without effect here; StableDiffusionPipeline warns of 0
        final_sigmas_type="zero",
    )


class CaptionTokens:
    """Token ids of many captions at once: those of `text.tokenize`, with little Python per caption.

    Args:
        text: a generator's text side, with a `tokenizer` of transformers and a `context` length.
    """

    def __init__(self, text: Any) -> None:
        """Copies the tokenizer's fast backend, whose settings a call through transformers would change."""
        from tokenizers import Tokenizer

        self.context, self.padding = text.context, text.tokenizer.pad_token_id
        self.backend = Tokenizer.from_str(text.tokenizer.backend_tokenizer.to_str())
        self.backend.no_padding()
        self.backend.enable_truncation(self.context)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """int64[B, L], on the CPU."""
        rows = [encoding.ids for encoding in self.backend.encode_batch_fast(captions)]
        lengths = np.array([len(row) for row in rows])
        ids = np.full((len(rows), self.context), self.padding)
        ids[np.arange(self.context) < lengths[:, None]] = np.fromiter(chain.from_iterable(rows), np.int64)
        return torch.from_numpy(ids)


def disturbed(embeds: Tensor, most: float) -> Tensor:
    """Gaussian noise on a condition, as an output projector's estimate of it errs: float[B, L, C].

    A sample's level is uniform in [0, most], in standard deviations of each position's channel over the batch: where
    all captions agree, as at the start token, a projector does not err. Half of the variance is shared by the tokens
    of a sample, half drawn for each.
    """
    level = most * torch.rand(len(embeds), 1, 1, device=embeds.device)
    spread = embeds.detach().float().std(0, correction=0)
    shared, own = torch.randn_like(embeds[:, :1]), torch.randn_like(embeds)
    return embeds + level * spread * 0.5**0.5 * (shared + own)


class VelocityObjective(nn.Module, ABC):
    """Text side, UNet and loss in one module, so that it compiles as one graph; `predict` calls the two.

    Args:
        unet: predicts velocities.
        text: what makes conditions of token ids.
        alphas_cumprod: float[steps of the schedule], the squared signal rates.
        min_snr: as the recipe's.
        condition_noise: as the recipe's.
    """

    def __init__(
        self, unet: Any, text: Any, alphas_cumprod: Tensor, min_snr: float | None, condition_noise: float = 0.0
    ) -> None:
        super().__init__()
        self.unet, self.text = unet, text
        self.min_snr, self.condition_noise = min_snr, condition_noise
        self.alphas_cumprod: Tensor
        self.register_buffer("alphas_cumprod", alphas_cumprod.clone())

    @abstractmethod
    def predict(self, noisy: Tensor, tokens: Tensor, times: Tensor) -> Tensor:
        """float[B, c, ...], long[B, L], long[B] -> the UNet's velocities."""

    def forward(self, latents: Tensor, tokens: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The velocity loss, weighted by min(SNR, gamma) / (SNR + 1), or not at all."""
        kept = self.alphas_cumprod[times].view(-1, *[1] * (latents.ndim - 1))
        signal, sigma = kept.sqrt(), (1 - kept).sqrt()
        predicted = self.predict(signal * latents + sigma * noise, tokens, times)
        target = diffusion_target(latents, noise, self.alphas_cumprod, times, "v_prediction")
        if self.min_snr is None:
            return diffusion_loss(predicted, target, None)
        weights = snr_weights(self.alphas_cumprod, times, self.min_snr, "v_prediction")
        # At pure noise the weight would vanish, but there the velocity is all that sets the sample.
        return diffusion_loss(predicted, target, weights.clamp(min=0.1))


def fit(
    recipe: LatentDiffusionRecipe,
    accelerator: "Accelerator",
    objective: VelocityObjective,
    average: AveragedWeights,
    averaged: nn.Module,
    draw: Callable[[int, float], tuple[Tensor, Tensor]],
    log: RunLog,
    *,
    counted: str,
    show: Callable[[int | None], None],
    show_every: int,
    write: Callable[[], None],
) -> dict[str, float]:
    """Trains what in `objective` is trainable, and writes the averaged generator at the end and at checkpoints.

    Args:
        recipe: of which the fields of `LatentDiffusionRecipe` count.
        accelerator: of the run.
        objective: on the device.
        average: of `averaged`, a part of the objective or all of it.
        averaged: the module that is averaged.
        draw: (batch size, caption dropout) -> latents and token ids.
        log: gets the loss and the pace every 250 steps.
        counted: what the log calls the samples: "images", "clips".
        show: makes samples to look at; given the step, or None at the end.
        show_every: steps between them.
        write: writes the generator as it is.

    Returns:
        The last `loss` and the `steps`.
    """
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    device = accelerator.device
    optimizer: Any = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    prepared, optimizer = accelerator.prepare(objective, optimizer)
    step_fn = compiled(prepared, recipe.compile_mode if recipe.compile else None)
    progress, pace, alarm = Progress(recipe.steps, recipe.minutes), Pace(), Alarm(recipe.checkpoint_minutes)
    last = torch.zeros(())
    while not progress.done:
        for group in optimizer.param_groups:
            group["lr"] = progress.learning_rate(recipe.learning_rate, warmup=300, decay=recipe.decay)
        latents, tokens = draw(recipe.batch_size, recipe.caption_dropout)
        times = torch.randint(len(objective.alphas_cumprod), (len(latents),), device=device)
        with bf16_on_gpu(device):
            loss = step_fn(latents, tokens, torch.randn_like(latents), times)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(averaged, progress.step)
        last = loss.detach().clone()
        progress.step += 1
        if progress.step % 250 == 0 or progress.done:
            seen = progress.step * recipe.batch_size
            log.write(
                step=progress.step, loss=last.item(), **{counted: seen, f"{counted}_per_second": pace.report(seen)}
            )
        if progress.step % show_every == 0:
            show(progress.step)
        if alarm.rings():
            write()
            log.write(checkpoint=True, step=progress.step)
    show(None)
    write()
    log.write(final=True, step=progress.step, loss=last.item())
    return {"loss": last.item(), "steps": float(progress.step)}


def replace_folder(generator: Generator, out: Path) -> None:
    """Writes the generator to `out`; an earlier one there is replaced when the new one is whole."""
    fresh = out.with_name(f"{out.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    generator.save_pretrained(fresh)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
