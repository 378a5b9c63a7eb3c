"""Every loss that a stage of training may use.

Shapes: B batch, T tokens, S signal tokens, D LLM width, E embedding width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anygen.errors import ConfigError
from anygen.generators.denoising import snr_weights
from anygen.losses import AlignmentConfig, caption_alignment_loss, condition_loss, lm_loss, token_loss
from anygen.training.prefix import prefix_alignment

__all__ = [
    "AlignmentConfig",
    "caption_alignment_loss",
    "condition_loss",
    "contrastive_loss",
    "diffusion_loss",
    "diffusion_target",
    "lm_loss",
    "prefix_alignment",
    "snr_weights",
    "token_loss",
]


def contrastive_loss(left: Tensor, right: Tensor, scale: Tensor | float, labels: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE between two views of a batch.

    Source: CLIP (arXiv:2103.00020); with `labels`, UniCL (arXiv:2204.03610): all pairs of one label are positives,
    so that two pictures of one thing do not push each other away.

    Args:
        left: float[B, E], of any length; compared by cosine.
        right: float[B, E].
        scale: the inverse temperature.
        labels: long[B]; pairs with equal labels count as positive. None: each row has its own.

    Returns:
        float32[].
    """
    with torch.autocast(left.device.type, enabled=False):
        left, right = F.normalize(left.float(), dim=-1), F.normalize(right.float(), dim=-1)
        logits = scale * left @ right.T
        if labels is None:
            targets = torch.eye(len(left), device=left.device)
        else:
            targets = (labels[:, None] == labels[None]).float()
        targets = targets / targets.sum(1, keepdim=True)  # the matrix is symmetric before this line
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


PredictionType = Literal["epsilon", "v_prediction", "sample"]


def diffusion_target(
    clean: Tensor, noise: Tensor, alphas_cumprod: Tensor, steps: Tensor, prediction_type: PredictionType
) -> Tensor:
    """What the denoiser is to predict.

    Source: epsilon, DDPM (arXiv:2006.11239); v = alpha * noise - sigma * clean, Salimans & Ho (arXiv:2202.00512).

    Args:
        clean: float[B, ...], the latents.
        noise: float[B, ...], standard normal.
        alphas_cumprod: float[steps of the schedule], the squared signal rates.
        steps: long[B].
        prediction_type: diffusers' names.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return clean
    if prediction_type != "v_prediction":
        raise ConfigError(f"unknown prediction type '{prediction_type}'; known: epsilon, v_prediction, sample")
    signal = alphas_cumprod.to(clean.device)[steps].view(-1, *[1] * (clean.ndim - 1))
    return signal.sqrt().to(clean.dtype) * noise - (1 - signal).sqrt().to(clean.dtype) * clean


def diffusion_loss(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """float[B, ...] twice, float[B] -> float32[]: each sample's mean squared error, weighted, then averaged."""
    errors = (prediction.float() - target.float()).pow(2).flatten(1).mean(1)
    return errors.mean() if weights is None else (errors * weights.to(errors)).mean()
