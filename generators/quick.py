"""A generator's models on the fast way: CUDA graphs, regional compilation, memory layout, fused projections.

Nothing here changes what is computed, but for rounding. Graphs alone (`graphs`) cost a fraction of a second and are the
default on a GPU; compiling (`compile`) costs minutes at full size when a machine does it first, and is kept.

Source: diffusers' guide "Accelerate inference"; BASELINE of this project: at batch 1 every UNet but a clip's waits for
the host.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from anygen import compiling
from anygen.errors import ConfigError
from anygen.generators import channels_last, group_norm, short_attention
from anygen.graphs import Capture, Graphed, PooledCapture

Compile = Literal["blocks", "whole"]
BLOCKS = frozenset(
    {
        "Attention",
        "BasicTransformerBlock",
        "ChannelsLastResnetBlock2D",
        "ChannelsLastTransformer2D",
        "ChannelsLastTransformerTemporal",
        "ChannelwiseGroupNorm",
        "CrossAttnDownBlock2D",
        "CrossAttnUpBlock2D",
        "DownBlock2D",
        "Downsample2D",
        "HifiGanResidualBlock",
        "NarrowConv2d",
        "RepeatingUpsample2D",
        "ResnetBlock2D",
        "TemporalConvLayer",
        "Transformer2DModel",
        "TransformerTemporalModel",
        "UNetMidBlock2DCrossAttn",
        "UpBlock2D",
        "Upsample2D",
    }
)
"""Classes of diffusers and transformers that are compiled where they are outermost. Blocks of an image UNet are so as
wholes: what those of the way up join is then copied by what reads it, which is 4 % of its kernels."""


def check_compile(compile: bool | str) -> Compile | None:
    """What `compile` asks for: True is "blocks", False is nothing.

    Raises:
        ConfigError: it is neither a truth value nor one of the kinds.
    """
    if isinstance(compile, bool):
        return "blocks" if compile else None
    if compile not in get_args(Compile):
        raise ConfigError(f"compile is True, False or one of {', '.join(get_args(Compile))}; got {compile!r}")
    return compile  # type: ignore[return-value]


class Quick:
    """Models whose `forward` goes the fast way, until `undo`.

    Args:
        models: name -> a model of diffusers or transformers; each is called as a whole.
        graphs: captures each model's calls, shape by shape.
        compile: "blocks" compiles what repeats, "whole" each model at once: longer, and a little faster.
        layout: puts weights of convolutions into channels-last order, and what is between them into layers that keep
            it. Only compiled code gains: uncompiled, normalisations are computed, and left, in the usual order.
        capture: how graphs are captured; by default in a pool of memory for all of them.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        *,
        graphs: bool,
        compile: Compile | None = None,
        layout: bool = False,
        capture: Capture | None = None,
    ) -> None:
        self.models, self.compile = dict(models), compile
        capture = capture or PooledCapture()
        self.graphs: list[Graphed] = []
        for name, model in self.models.items():
            if layout:
                weights_channels_last(model)
            forward: Any = model.forward
            if compile is not None:
                fuse(model)
                if layout:
                    group_norm.adopt(model)
                    channels_last.adopt(model)
            short_attention.adopt(model)
            if compile == "whole":
                forward = compiling.compiled(forward, **compiling.BLOCK_OPTIONS)
            elif compile == "blocks":
                for block in outermost(model):
                    compiling.compile_in_place(block)
            if graphs:
                forward = Graphed(forward, f"the {name}", capture=capture)
                self.graphs.append(forward)
                model._apply = _forgetting(model, forward)
            if forward is not model.forward:
                model.forward = forward

    def undo(self) -> None:
        """The plain way again."""
        for model in self.models.values():
            for name in ("forward", "_apply"):
                model.__dict__.pop(name, None)
            for block in model.modules():
                block._compiled_call_impl = None
            short_attention.release(model)
            unfuse(model)
            group_norm.release(model)
            channels_last.release(model)
        self.graphs.clear()


def _forgetting(model: nn.Module, graphed: Graphed) -> Callable[..., nn.Module]:
    """The model's `_apply`, by which `to` moves weights: a graph knows them by their old address."""
    plain = model._apply

    def apply(*args: Any, **kwargs: Any) -> nn.Module:
        graphed.clear()
        return plain(*args, **kwargs)

    return apply


def outermost(model: nn.Module) -> Iterable[nn.Module]:
    """The modules to be compiled: of `BLOCKS`, or what the model itself names as repeated, none inside another."""
    names = BLOCKS | frozenset(getattr(model, "_repeated_blocks", None) or ())
    for child in model.children():
        if type(child).__name__ in names:
            yield child
        else:
            yield from outermost(child)


def weights_channels_last(model: nn.Module) -> None:
    """Puts channels last in the weights of convolutions; what they return follows.

    Where frames fold into the batch and out again, both orders are then the same memory and nothing is copied.
    """
    orders = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
    for module in model.modules():
        if (order := orders.get(type(module))) is not None:
            module.to(memory_format=order)  # type: ignore[call-overload]


def fuse(model: Any) -> None:
    """Joins the projections of queries, keys and values, where the model can."""
    if hasattr(model, "fuse_qkv_projections"):
        model.fuse_qkv_projections()


def unfuse(model: Any) -> None:
    """The reverse of `fuse`, without the joined weights, so that the model is saved as it was."""
    if getattr(model, "original_attn_processors", None) is None:
        return
    model.unfuse_qkv_projections()
    for module in model.modules():
        if getattr(module, "fused_projections", False):
            module.fused_projections = False
            for name in ("to_qkv", "to_kv"):
                module._modules.pop(name, None)
    model.original_attn_processors = None
