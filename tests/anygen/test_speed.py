"""Which way is chosen, and what happens where it cannot be gone."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anygen import AnyGenPipeline, compiling
from anygen.errors import ConfigError
from anygen.model import AnyGenModel
from anygen.speed import Speed, check_layers
from anygen.static_rows import StaticMemories

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def test_graphs_are_the_default_where_there_is_cuda_and_compiling_never_is() -> None:
    assert Speed.chosen(CUDA, compile=False, graphs=None) == Speed(graphs=True)
    assert Speed.chosen(CUDA, compile=True, graphs=False) == Speed(graphs=False, compile=True)
    assert Speed.chosen(CPU, compile=False, graphs=None) == Speed()
    with pytest.raises(ConfigError, match="graphs=True needs a CUDA device, not 'cpu'; leave it out"):
        Speed.chosen(CPU, compile=False, graphs=True)
    with pytest.raises(ConfigError, match="compile is True, False or one of blocks, whole; got 'fast'"):
        Speed.chosen(CUDA, compile="fast", graphs=None)


def test_a_compiled_pipeline_answers_as_the_plain_one(
    tiny_directory: Path, pipe: AnyGenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        compiled.append(module)
        return module.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    fast = AnyGenPipeline.from_pretrained(tiny_directory, device="cpu", compile=True)
    assert fast.model.memories is not None and fast.model.memories.capture is None
    options: Any = {"seed": 3, "max_new_tokens": 5, "progress": False}
    made, wanted = fast("Draw", **options), pipe("Draw", **options)
    assert made.text == wanted.text and [m.modality for m in made.media] == [m.modality for m in wanted.media]
    difference = abs(made.images[0].array.astype(int) - wanted.images[0].array.astype(int))
    assert difference.max() <= 1 and len(compiled) > 3  # the LLM's layer, and blocks of UNet and VAE


def test_an_llm_that_cannot_go_the_fast_way_goes_the_plain_one_and_says_why(
    tiny_model: Callable[..., AnyGenModel], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    config: Any = model.llm.base.config
    config._attn_implementation = "eager"
    with caplog.at_level(logging.WARNING, logger="anygen"):
        Speed(graphs=True).apply_to_llm(model)
    assert model.memories is None
    assert caplog.messages == ["the LLM goes the plain way: its attention is 'eager', not 'sdpa'"]
    config._attn_implementation = "sdpa"
    assert StaticMemories.reason_against(model) is None
    config.sliding_window, config.layer_types = 4, ["sliding_attention", "full_attention"]
    assert StaticMemories.reason_against(model) == "its layers do not all see the whole text"
    Speed().apply_to_llm(model)
    assert model.memories is None


def test_layers_that_depend_on_their_number_are_not_compiled_as_one(
    tiny_model: Callable[..., AnyGenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    check_layers(model)
    layers: Any = model.llm.base.get_decoder().layers  # type: ignore[union-attr]
    kind = type(layers[0])
    plain = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = plain(self, *args, **kwargs)
        return made + self.self_attn.layer_idx * made.flip(-1)

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(ConfigError, match="the layers of LlamaModel depend on their number and are not compiled as"):
        check_layers(model)
