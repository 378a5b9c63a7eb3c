"""Group normalisation for code that is compiled with channels last.

`F.group_norm` reads a group at a time: with channels last that is a few bytes here and there, and inductor's kernel
takes a quarter of an image UNet's step and half of a decoder's. Channel by channel the same memory is read in order;
what groups need follows from a few numbers of each channel. A channel is read in parts, by as many programs as keep a
GPU busy, whose numbers are joined with those of its group at once.

Shapes: B rows, C channels, G groups, P parts.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

MOST, LEAST = 256, 128
"""Parts into which a channel's places are split, and places of a part."""


def group_norm(values: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As `torch.nn.functional.group_norm`, with statistics of parts of channels joined to those of groups.

    Variances are joined without a difference of large squares (Chan, Golub and LeVeque, 1979), so that nothing is lost
    where the mean is large. Statistics are of float32 at least.

    Args:
        values: float[B, C, ...], with at least one more axis.
        groups: G.
        weight: float[C].
        bias: float[C].
        eps: added to the variance.

    Returns:
        The values' shape, order in memory and dtype.
    """
    wide = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
    parts = wide.flatten(2).unflatten(2, (_parts(math.prod(values.shape[2:])), -1)).permute(0, 2, 3, 1)
    variance, mean = torch.var_mean(parts, 2, correction=0)  # [B, P, C]
    variance, mean = (of.unflatten(2, (groups, -1)) for of in (variance, mean))  # [B, P, G, C / G]
    middle = mean.mean((1, 3))  # [B, G]
    spread = (variance + (mean - middle.unsqueeze(1).unsqueeze(3)).square()).mean((1, 3))
    each = (values.shape[0], groups, values.shape[1] // groups)
    scale = (spread + eps).rsqrt().unsqueeze(2).expand(each).flatten(1)  # [B, C]
    middle = middle.unsqueeze(2).expand(each).flatten(1)
    if weight is not None:
        scale = scale * weight.to(wide.dtype)
    shift = -middle * scale
    if bias is not None:
        shift = shift + bias.to(wide.dtype)
    ones = (1,) * (values.ndim - 2)
    return (wide * scale.unflatten(1, (-1, *ones)) + shift.unflatten(1, (-1, *ones))).to(values.dtype)


def _parts(places: int) -> int:
    """P; without, inductor splits what is long by itself, and joins it in a step of its own."""
    parts = 1
    while parts < MOST and places % (2 * parts) == 0 and places // (2 * parts) >= LEAST:
        parts *= 2
    return parts


class ChannelwiseGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` by `group_norm`; a module becomes one by `adopt`, and is itself again after `release`."""

    def forward(self, input: Tensor) -> Tensor:
        """float[B, C, ...] -> the same."""
        if input.ndim < 3:
            return super().forward(input)
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def adopt(model: nn.Module) -> None:
    """All of a model's group normalisations go channel by channel."""
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            cast(nn.Module, module).__class__ = ChannelwiseGroupNorm


def release(model: nn.Module) -> None:
    """The reverse of `adopt`."""
    for module in model.modules():
        if type(module) is ChannelwiseGroupNorm:
            cast(nn.Module, module).__class__ = nn.GroupNorm
