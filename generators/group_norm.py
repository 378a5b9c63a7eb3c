"""Group normalisation for code that is compiled with channels last.

`F.group_norm` reads a group at a time: with channels last that is a few bytes here and there, and inductor's kernel
takes a quarter of an image UNet's step and half of a decoder's. Channel by channel the same memory is read in order;
what groups need follows from a few numbers of each channel.

Shapes: B rows, C channels, G groups.
"""

from typing import cast

import torch
from torch import Tensor, nn


def group_norm(values: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As `torch.nn.functional.group_norm`, with statistics of channels joined to those of groups.

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
    variance, mean = torch.var_mean(wide, tuple(range(2, values.ndim)), correction=0)
    variance, mean = variance.unflatten(1, (groups, -1)), mean.unflatten(1, (groups, -1))  # [B, G, C / G]
    middle = mean.mean(2, keepdim=True)
    spread = (variance + (mean - middle).square()).mean(2, keepdim=True)
    scale = (spread + eps).rsqrt().expand_as(mean).flatten(1)  # [B, C]
    middle = middle.expand_as(mean).flatten(1)
    if weight is not None:
        scale = scale * weight.to(wide.dtype)
    shift = -middle * scale
    if bias is not None:
        shift = shift + bias.to(wide.dtype)
    ones = (1,) * (values.ndim - 2)
    return (wide * scale.unflatten(1, (-1, *ones)) + shift.unflatten(1, (-1, *ones))).to(values.dtype)


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
