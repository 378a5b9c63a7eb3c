"""The training loss of a diffusers pipeline's denoiser: noise a latent, predict, compare.

Source: Ho et al. 2020 (arXiv:2006.11239) for noise, Salimans & Ho 2022 (arXiv:2202.00512) for velocity, Lipman et al.
2023 (arXiv:2210.02747) for flows. Times are uniform over the scheduler's own training times, and not weighted.
Differs: flow schedulers of diffusers run from noise to data, sigma 1 to 0, so the target is noise - data.
Shapes: B batch, c latent channels, h w latent sides, H W sides in pixels.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.errors import ConfigError

Predict = Callable[[Any, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(pipeline, noisy float[B, c, h, w], times [B], condition) -> what the denoiser predicts, float[B, c, h, w]."""


def pipeline_loss(
    pipeline: Any,
    predict: Predict,
    condition: Mapping[str, Tensor],
    pixels: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean squared error of the prediction for pictures at random times, a scalar.

    Args:
        pipeline: with an `AutoencoderKL`, a denoiser and a scheduler.
        predict: calls the denoiser.
        condition: name -> float[B, ...]; gradients flow into it.
        pixels: float[B, 3, H, W] in [-1, 1].
        generator: for the posterior sample, the noise and the times.

    Raises:
        ConfigError: the scheduler's prediction type is unknown.
    """
    vae = pipeline.vae
    with torch.no_grad():
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        latents = (posterior.sample(generator) - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor
    latents = latents.to(next(iter(condition.values())).dtype)
    noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    noisy, times, target = noised(pipeline.scheduler, latents, noise, generator)
    predicted = predict(pipeline, noisy, times, condition)
    # a UNet that predicts its variance as well does so in channels behind
    return F.mse_loss(predicted[:, : target.shape[1]].float(), target.float())


def noised(
    scheduler: Any, latents: Tensor, noise: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents float[B, c, ...] at random times, those times [B], and what is to be predicted there.

    Args:
        scheduler: of diffusers; it is not changed.
        latents: float[B, c, ...], as the denoiser knows them.
        noise: float[B, c, ...], of unit variance.
        generator: for the times.

    Raises:
        ConfigError: the scheduler's prediction type is unknown.
    """
    fresh = type(scheduler).from_config(scheduler.config)  # sampling leaves the times of its steps
    drawn = torch.randint(fresh.config.num_train_timesteps, (len(latents),), generator=generator, device=latents.device)
    kept = getattr(fresh, "alphas_cumprod", None)
    kind = fresh.config.get("prediction_type", "epsilon" if kept is not None else "flow")
    if kept is None or kind == "flow_prediction":
        if not hasattr(fresh, "sigmas") or kind not in ("flow", "flow_prediction"):
            raise ConfigError(f"{type(fresh).__name__} with prediction type '{kind}' has no training target here")
        sigma = fresh.sigmas.to(latents.device)[drawn].to(latents.dtype)
        sigma = sigma.view(-1, *[1] * (latents.ndim - 1))
        times = fresh.timesteps.to(latents.device)[drawn]
        return (1 - sigma) * latents + sigma * noise, times, noise - latents
    kept = kept.to(latents.device)[drawn].to(latents.dtype).view(-1, *[1] * (latents.ndim - 1))
    signal, sigma = kept.sqrt(), (1 - kept).sqrt()
    targets = {"epsilon": noise, "v_prediction": signal * noise - sigma * latents}
    if kind not in targets:
        raise ConfigError(f"{type(fresh).__name__} with prediction type '{kind}' has no training target here")
    return signal * latents + sigma * noise, drawn, targets[kind]
