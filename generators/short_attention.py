"""Attention between the frames of a clip.

A clip's temporal layers attend over sixteen frames, tens of thousands of times at once. Kernels that PyTorch prefers on
a GPU work through tiles of 64 or 128 tokens, most of them empty; the memory-efficient one takes two thirds of their
time (Zeroscope at 320 x 576 on an H200: 312 us in place of 462 for one layer).
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT = 32
"""Tokens up to which it pays."""
TEMPORAL = "TransformerTemporalModel"
"""diffusers' class of layers that attend over frames."""


class ShortAttention:
    """An attention processor of diffusers, with the kernel for short sequences where there is a GPU.

    Args:
        inner: the processor that does the work.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """float[B, T, D] -> float[B, T, D]."""
        if not hidden_states.is_cuda or hidden_states.shape[1] > SHORT:
            return self.inner(attn, hidden_states, *args, **kwargs)
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return self.inner(attn, hidden_states, *args, **kwargs)


def adopt(model: nn.Module) -> None:
    """The temporal layers of a model attend by `ShortAttention`."""
    for module in _attentions(model):
        if not isinstance(module.processor, ShortAttention):
            module.processor = ShortAttention(module.processor)


def release(model: nn.Module) -> None:
    """The reverse of `adopt`."""
    for module in _attentions(model):
        if isinstance(module.processor, ShortAttention):
            module.processor = module.processor.inner


def _attentions(model: nn.Module) -> list[Any]:
    temporal = [m for m in model.modules() if TEMPORAL in {kind.__name__ for kind in type(m).__mro__}]
    return [m for layer in temporal for m in layer.modules() if hasattr(m, "processor") and hasattr(m, "heads")]
