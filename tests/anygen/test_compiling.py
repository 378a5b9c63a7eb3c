"""What is compiled is kept, and stays compiled for many shapes."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from anygen import compiling
from anygen.compiling import CompiledLayers, keep_compiled
from anygen.errors import ConfigError


def test_what_is_compiled_is_kept_in_anygens_cache_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv("ANYGEN_HOME", str(tmp_path))
    for before, after in (
        (None, str(tmp_path / "compiled")),
        (default_cache_dir(), str(tmp_path / "compiled")),
        ("/somewhere/else", "/somewhere/else"),
    ):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if before is not None:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        keep_compiled()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == after


def test_a_function_is_compiled_anew_for_each_of_many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        shapes.append(tuple(inputs[0].shape))
        return module.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    fast = compiling.compiled(lambda values: values * 2 + 1)
    wanted = [(count,) for count in range(2, 20)]
    for _ in range(2):
        for (count,) in wanted:
            torch.testing.assert_close(fast(torch.ones(count)), torch.full((count,), 3.0))
    assert shapes == wanted  # none was dropped for another, none made of changing shape


def test_a_decoder_without_layers_of_one_kind_is_refused() -> None:
    decoder = nn.Module()
    with pytest.raises(ConfigError, match="Module has no list of layers of one kind, so it cannot be compiled"):
        CompiledLayers(decoder, "cache")
    decoder.layers = nn.ModuleList([nn.Linear(1, 1), nn.ReLU()])
    with pytest.raises(ConfigError, match="no list of layers of one kind"):
        CompiledLayers(decoder, "cache")


def test_what_narrows_reads_what_is_computed_once() -> None:
    layer = nn.Module()
    layer.up, layer.down, layer.square = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4)
    decoder = nn.Module()
    decoder.layers = nn.ModuleList([layer])
    layers = CompiledLayers(decoder, "cache", compiler=lambda function, **_: function)
    values = torch.randn(1, 8)
    wanted = layer.down(values)
    with layers(SimpleNamespace(layers=[SimpleNamespace(place=None, keys=values, values=values)])):
        kinds = [type(module).__name__ for module in (layer.up, layer.down, layer.square)]
        torch.testing.assert_close(layer.down(values), wanted, rtol=0, atol=0)
    assert kinds == ["Linear", "_KeptLinear", "Linear"] and type(layer.down) is nn.Linear
