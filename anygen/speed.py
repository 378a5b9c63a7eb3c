"""Which way a pipeline goes: the plain one, CUDA graphs, or compiled.

| | LLM | generators |
|---|---|---|
| plain | transformers' growing cache | diffusers' models as they are |
| `graphs`, the default on a GPU | memory of a fixed size, a step is one CUDA graph | a call of a model is one |
| `compile=True` | and its layers compiled, one for all | and their blocks compiled, projections fused, channels last |
| `compile="whole"` | the same | and each model compiled at once: minutes when a machine does it first |

All of them answer alike: in float32 the tests hold them to the same tokens and to equal media; in bfloat16 sums round
otherwise, as they do from one GPU to another. The generators of one answer take turns, each on a stream of its own
(`anygen.together`).
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from anygen.compiling import CompiledLayers
from anygen.errors import ConfigError
from anygen.generators.base import Generator
from anygen.generators.quick import check_compile
from anygen.graphs import cuda_capture
from anygen.model import AnyGenModel
from anygen.static_rows import StaticMemories, StaticMemory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Speed:
    """The way to go."""

    graphs: bool = False
    """Whether CUDA graphs are captured."""
    compile: bool | str = False
    """Whether, and how, models are compiled."""

    @classmethod
    def chosen(cls, device: torch.device, *, compile: bool | str, graphs: bool | None) -> "Speed":
        """What a user's choice means on a device.

        Raises:
            ConfigError: graphs are asked for where there is no CUDA, or `compile` is no way to compile.
        """
        check_compile(compile)
        if graphs and device.type != "cuda":
            raise ConfigError(f"graphs=True needs a CUDA device, not '{device}'; leave it out")
        return cls(graphs=device.type == "cuda" if graphs is None else graphs, compile=compile)

    def apply(self, generator: Generator) -> Generator:
        """The generator, on its way."""
        return generator.quicken(graphs=self.graphs, compile=self.compile) if self.graphs or self.compile else generator

    def apply_to_llm(self, model: AnyGenModel) -> None:
        """Sets the model's LLM on its way; where it cannot go the fast one, a line is logged and it goes the plain."""
        model.memories = None
        if not self.graphs and not self.compile:
            return
        if (reason := StaticMemories.reason_against(model)) is None and self.compile:
            try:
                check_layers(model)
            except ConfigError as error:
                reason = str(error)
        if reason is not None:
            logger.warning("the LLM goes the plain way: %s", reason)
            return
        region = None
        if self.compile:
            region = CompiledLayers(model.llm.base.get_decoder(), model.llm.cache_name)  # type: ignore[arg-type]
        model.memories = StaticMemories(model, capture=cuda_capture if self.graphs else None, region=region)


def check_layers(model: AnyGenModel) -> None:
    """Compares two tokens through the layers as they are compiled (without compiling) with the plain way.

    Raises:
        ConfigError: they differ: this family's layers depend on their number, so that one cannot stand for all.
    """
    decoder: Any = model.llm.base.get_decoder()
    layers = CompiledLayers(decoder, model.llm.cache_name, compiler=lambda function, **_: function)
    ids = torch.tensor([[model.llm.vocab_size // 2, model.llm.vocab_size // 3]], device=model.device)
    real = torch.ones_like(ids, dtype=torch.bool)
    with model.llm.no_gradients():
        embeds = model.llm.embedding(ids)
        wanted, _ = model.llm.hidden_states(embeds, attention_mask=real)
        memory = StaticMemory(model, 1, 8, adapted=True)
        memory.begin()
        memory.run(embeds[:, :1], real[:, :1], fresh=True)
        with layers(memory.cache):
            made = memory.run(embeds[:, 1:], real[:, 1:])
        largest = float(wanted.abs().max())
        alike = torch.allclose(made[:, 0].float(), wanted[:, 1].float(), rtol=3e-2, atol=3e-2 * largest)
    if not alike:
        raise ConfigError(f"the layers of {type(decoder).__name__} depend on their number and are not compiled as one")
