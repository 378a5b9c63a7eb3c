"""Every loss that a stage of training may use.

Shapes: B batch, T tokens, S signal tokens, D LLM width, E embedding width.
"""

from collections.abc import Mapping
from copy import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anygen.errors import ConfigError
from anygen.features import Condition
from anygen.losses import AlignmentConfig, caption_alignment_loss, condition_loss, lm_loss, token_loss
from anygen.model import AnyGenModel, positions

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


def snr_weights(alphas_cumprod: Tensor, steps: Tensor, gamma: float | None, prediction_type: PredictionType) -> Tensor:
    """min-SNR weights of a batch of steps; ones if `gamma` is None.

    Source: Hang et al. (arXiv:2303.09556): min(SNR, gamma) in clean-sample space, hence divided by SNR for epsilon
    and by SNR + 1 for v.

    Returns:
        float32[B].
    """
    if gamma is None:
        return torch.ones(len(steps), device=steps.device)
    signal = alphas_cumprod.to(steps.device).float()[steps]
    snr = signal / (1 - signal)
    clipped = snr.clamp(max=gamma)
    return {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[prediction_type]


def diffusion_loss(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """float[B, ...] twice, float[B] -> float32[]: each sample's mean squared error, weighted, then averaged."""
    errors = (prediction.float() - target.float()).pow(2).flatten(1).mean(1)
    return errors.mean() if weights is None else (errors * weights.to(errors)).mean()


def prefix_alignment(
    model: AnyGenModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    conditions: Mapping[str, Mapping[str, Tensor]],
    media: Mapping[str, Any] | None = None,
) -> tuple[Tensor, dict[str, Condition]]:
    """Alignment of one run behind each prefix, the prefix read once and without autograd.

    The LLM is frozen and causal, so a prefix of plain words carries no gradient: its keys and values are computed
    under `no_grad`, and back-propagation goes through the S signal positions alone. The gradient is exact. One
    prefix serves the runs of all modalities, as branches over one cache.

    Args:
        model: with a frozen LLM and no trainable adapter.
        input_ids: long[B, T], the prefix; the run is put behind its last token.
        attention_mask: long[B, T], padded on either side.
        conditions: modality -> name -> float[B, ...], the targets.
        media: as for `AnyGenModel.forward`; carries no gradient either.

    Returns:
        float32[], the mean of the modalities' losses, and their conditions.

    Raises:
        ConfigError: something before the run is trainable, so that the gradient would not be exact.
    """
    if any(p.requires_grad for p in model.llm.parameters()):
        raise ConfigError("prefix_alignment needs a frozen LLM: its adapter is trainable; use the model's forward")
    if model.signal_tokens.rows.requires_grad and bool((input_ids >= model.signal_tokens.vocab_size).any()):
        raise ConfigError("prefix_alignment needs a prefix of plain words: it holds signal tokens, which train")
    with torch.no_grad():
        _, prefix = model.llm.hidden_states(
            model.embed(input_ids, media),
            attention_mask=attention_mask,
            position_ids=positions(attention_mask),
            use_cache=True,
        )
    lengths = attention_mask.long().sum(1, keepdim=True)
    losses, projected = [], {}
    for modality, target in conditions.items():
        run = model.run_embeddings(modality).expand(len(input_ids), -1, -1)
        hidden, _ = model.llm.hidden_states(
            run.to(model.llm.dtype),
            attention_mask=torch.cat([attention_mask, attention_mask.new_ones(run.shape[:2])], dim=1),
            position_ids=lengths + torch.arange(run.shape[1], device=lengths.device),
            cache=_branch(prefix),
        )
        projected[modality] = model.project(modality, hidden)
        losses.append(model.alignment_loss(modality, projected[modality], target))
    return torch.stack(losses).mean(), projected


def _branch(cache: Any) -> Any:
    """A cache that grows by itself and shares what it holds; a layer's update replaces its tensors."""
    branch = copy(cache)
    branch.layers = [copy(layer) for layer in cache.layers]
    return branch
