"""`torch.compile` by region: one block is compiled and serves all that are like it, in seconds in place of minutes.

What was compiled is kept in anygen's cache (`ANYGEN_HOME`), so that the next process reads it.

Source: PyTorch's recipe on regional compilation; diffusers' `compile_repeated_blocks`.
Shapes: B rows, h heads of keys, N columns, d their width, q tokens.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anygen.environment import home
from anygen.errors import ConfigError
from anygen.kept import kept, teach_inductor

BACKEND = "inductor"
"""Of `torch.compile`; tests take one that needs no C++ compiler."""
LAYER_OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}
"""Of a decoder's layers: with it inductor writes its own kernels for products with one row, fused with their
neighbours (as gpt-fast has them), where cuBLAS leaves a fifth of the bandwidth."""
BLOCK_OPTIONS: dict[str, Any] = {}
"""Of a generator's blocks; inductor's `max_autotune_gemm` tries its own products too, for minutes."""
RECOMPILATIONS = 256
"""Shapes of one block that may be compiled: a UNet has a dozen, but UNets, VAEs and batch sizes add up."""


def keep_compiled() -> None:
    """Points inductor's cache into anygen's, unless the user has chosen another place, and allows for many shapes."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # inductor writes its default, which the system deletes, into the variable as soon as it is imported
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(home() / "compiled")
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, RECOMPILATIONS)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` compiled for each shape by itself: shapes are few here, and dynamic ones are slower."""
    keep_compiled()
    teach_inductor()
    return torch.compile(function, **_settings(options))


def compile_in_place(block: nn.Module) -> None:
    """As `compiled`, for a module that stays what it is."""
    keep_compiled()
    teach_inductor()
    block.compile(**_settings(BLOCK_OPTIONS))


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    chosen = options if BACKEND == "inductor" and options else None
    return {"backend": BACKEND, "dynamic": False, "options": chosen}


class _KeptLinear(nn.Linear):
    """A product of what is computed once. Inductor computes what a product of one row reads anew for each of its
    outputs: of activations with an exponential in them that takes longer than reading the weights."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(kept(input), self.weight, self.bias)


class LayerColumns:
    """What one decoder layer sees of a static cache. It knows no layer's number, so that all layers are the same code.

    Args:
        layer: of `anygen.static_rows`, initialised.
    """

    def __init__(self, layer: Any) -> None:
        self.place = layer.place
        # other views of the same memory: transformers marks its own as of a fixed address, which is one code a layer
        self.keys: Tensor = layer.keys.view_as(layer.keys)
        self.values: Tensor = layer.values.view_as(layer.values)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """float[B, h, q, d] twice -> float[B, h, N, d] twice, as `StaticLayer.update`."""
        self.keys.index_copy_(2, self.place.columns, keys)
        self.values.index_copy_(2, self.place.columns, values)
        return self.keys, self.values


class CompiledLayers:
    """The layers of a decoder, compiled as one; a call gives the context in which they are.

    Args:
        decoder: with a list `layers` of modules of one class; what is called once a step, `norm` and `rotary_emb`, is
            compiled where it is there.
        cache_name: the argument that takes a layer's cache.
        compiler: in place of `compiled`.

    Raises:
        ConfigError: the decoder has no such list.
    """

    def __init__(
        self, decoder: nn.Module, cache_name: str, *, compiler: Callable[..., Callable[..., Any]] | None = None
    ) -> None:
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or len({type(layer) for layer in layers}) != 1:
            raise ConfigError(f"{type(decoder).__name__} has no list of layers of one kind, so it cannot be compiled")
        self.layers, self.cache_name = list(layers), cache_name
        plain = type(self.layers[0]).forward

        def forward(layer: nn.Module, columns: LayerColumns, *args: Any, **kwargs: Any) -> Any:
            kwargs[cache_name] = columns
            return plain(layer, *args, **kwargs)

        self._forward = (compiler or compiled)(forward, **LAYER_OPTIONS)
        inner = [module for layer in self.layers for module in layer.modules()]
        self._numbered = [module for module in inner if isinstance(_number(module), int)]
        self._kept = [m for m in inner if type(m) is nn.Linear and m.in_features > m.out_features]
        around = [getattr(decoder, name, None) for name in ("norm", "rotary_emb")]
        self._around = [
            (module, (compiler or compiled)(module.forward)) for module in around if isinstance(module, nn.Module)
        ]

    @contextmanager
    def __call__(self, cache: Any) -> Iterator[None]:
        """Inside, the decoder's layers are compiled and read and write `cache`."""
        numbers = [_number(module) for module in self._numbered]
        try:
            for module in self._numbered:
                module.__dict__["layer_idx"] = 0  # a number of its own would be code of its own
            for module in self._kept:
                module.__class__ = _KeptLinear
            for module, forward in self._around:
                module.forward = forward  # type: ignore[method-assign]
            for layer, static in zip(self.layers, cache.layers, strict=True):
                layer.forward = self._bound(layer, LayerColumns(static))  # type: ignore[method-assign]
            yield
        finally:
            for module, number in zip(self._numbered, numbers, strict=True):
                module.__dict__["layer_idx"] = number
            for module in self._kept:
                module.__class__ = nn.Linear
            for module in (*self.layers, *(module for module, _ in self._around)):
                module.__dict__.pop("forward", None)

    def _bound(self, layer: nn.Module, columns: LayerColumns) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._forward(layer, columns, *args, **kwargs)


def _number(module: nn.Module) -> Any:
    return module.__dict__.get("layer_idx")
