"""`kept`: tells inductor, PyTorch's compiler, to compute values once and leave them in memory.

Inductor joins what computes values with what reads them, as it sees fit, and chooses the order in which those that it
writes lie in memory. Where that is slower than writing them as they are, code says `kept(values)`.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("anygen::kept", mutates_args=())
def kept(values: Tensor) -> Tensor:
    """The values, computed once, in the order of memory that their strides tell; differentiable."""
    return values.clone()


@kept.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


kept.register_autograd(lambda _, gradient: gradient)


def teach_inductor() -> None:
    """To inductor `kept` copies nothing; called before something that says it is compiled."""
    from torch._inductor import lowering

    if torch.ops.anygen.kept.default not in lowering.lowerings:
        lowering.register_lowering(torch.ops.anygen.kept.default, type_promotion_kind=None)(_realised)


def _realised(values: Any) -> Any:
    from torch._inductor.ir import ExternKernel
    from torch._inductor.virtualized import V

    told = V.graph.current_node.meta["val"]
    if told.ndim == 4 and told.is_contiguous(memory_format=torch.channels_last):
        values = ExternKernel.require_channels_last(values)
    values.realize()
    return values
