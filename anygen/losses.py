"""The losses that the joined model computes by itself; `anygen.training.losses` offers them with the others.

Shapes: B batch, T tokens, V classes, M media, L condition tokens, C condition width, K columns of a metric.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anygen.config import Config
from anygen.errors import ConfigError

IGNORED = -100
"""The label of a position that is not learned, as everywhere in transformers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentConfig(Config):
    """A weighted sum of distances between a projected condition and the generator's own.

    Source: mean squared error, MM-LLMs survey (arXiv:2401.13601) equation 4; row norms, NExT-GPT's and GILL's code.
    """

    mse: float = 1.0
    """Weight of the mean squared error over all entries."""
    l2_norm: float = 0.0
    """Weight of the mean Euclidean length of the rows' differences."""
    cosine: float = 0.0
    """Weight of one minus the rows' mean cosine."""

    def __post_init__(self) -> None:
        if min(self.mse, self.l2_norm, self.cosine) < 0 or self.mse + self.l2_norm + self.cosine <= 0:
            raise ConfigError("alignment weights are not negative, and at least one of mse, l2_norm, cosine is > 0")


def lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token cross-entropy (survey equation 2, signal tokens among the targets), in float32.

    Args:
        logits: float[B, T, V], position t predicting label t + 1.
        labels: long[B, T], -100 where nothing is learned.

    Returns:
        float32[], zero if no label is learned.
    """
    wanted = labels[:, 1:] != IGNORED
    return token_loss(logits[:, :-1][wanted], labels[:, 1:][wanted])


def token_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy, zero (and still differentiable) if M is 0.

    Args:
        logits: float[M, V].
        targets: long[M].
        weights: float[M], how much each target counts; None counts all alike.

    Returns:
        float32[].
    """
    if not len(targets):
        return logits.float().sum()
    if weights is None:
        return F.cross_entropy(logits.float(), targets)
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum() / weights.sum()


def caption_alignment_loss(
    prediction: Tensor, target: Tensor, config: AlignmentConfig | None = None, *, metric: Tensor | None = None
) -> Tensor:
    """Distance between a projected condition and the generator's text encoder on the caption (survey equation 4).

    Args:
        prediction: float[M, L, C] (or [M, C]).
        target: of the same shape; carries no gradient.
        config: which distances, how weighted; mean squared error by default.
        metric: float[C, K]; distances are taken of `u @ metric` and `v @ metric`, so that directions count as much
            as their reader, such as a generator's cross-attention keys and values, sees of them.

    Returns:
        float32[].
    """
    config = config or AlignmentConfig()
    if prediction.shape != target.shape:
        raise ConfigError(f"the projector made {tuple(prediction.shape)}, the target is {tuple(target.shape)}")
    with torch.autocast(prediction.device.type, enabled=False):
        u, v = prediction.float(), target.detach().float()
        if metric is not None:
            u, v = u @ metric.float(), v @ metric.float()
        loss = u.new_zeros(())
        if config.mse:
            loss = loss + config.mse * F.mse_loss(u, v)
        if config.l2_norm:
            # the norm's gradient at zero distance is not a number without the small constant
            loss = loss + config.l2_norm * (u - v).pow(2).sum(-1).add(1e-12).sqrt().mean()
        if config.cosine:
            loss = loss + config.cosine * (1 - F.cosine_similarity(u, v, dim=-1)).mean()
    return loss


def condition_loss(
    prediction: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    config: AlignmentConfig | None = None,
    *,
    metrics: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """`caption_alignment_loss` summed over the named tensors of a condition.

    Raises:
        ConfigError: the names differ.
    """
    if set(prediction) != set(target):
        raise ConfigError(f"the projector makes {sorted(prediction)}, the targets are {sorted(target)}")
    losses = [
        caption_alignment_loss(prediction[name], target[name], config, metric=(metrics or {}).get(name))
        for name in prediction
    ]
    return torch.stack(losses).sum()
