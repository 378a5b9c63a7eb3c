"""LLMs in fewer bits, and spread over devices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anygen import AnyGenPipeline, quantization
from anygen.errors import ConfigError
from anygen.llm import LLM
from anygen.quantization import check_quantization, transformers_config

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def having(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    monkeypatch.setattr(quantization, "_installed", lambda name: name in modules)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    having(monkeypatch)
    for device, told in ((CUDA, r"bitsandbytes` \(or 'torchao' or 'opt"), (CPU, r"torchao` \(or 'optimum-quanto'\)")):
        with pytest.raises(ConfigError, match=f"needs a package that is not installed: `pip install {told}"):
            transformers_config("4bit", device, torch.bfloat16)
    having(monkeypatch, "torchao")
    with pytest.raises(ConfigError, match="torchao has no 4-bit weights for cpu: `pip install optimum-quanto`"):
        transformers_config("4bit", CPU, torch.float32)
    with pytest.raises(ConfigError, match="quantization is one of 8bit, 4bit, or left out; got 'int2'"):
        check_quantization("int2")


def test_the_first_package_that_can_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    having(monkeypatch, "bitsandbytes", "optimum.quanto")
    assert quantization.backend(CUDA) == "bitsandbytes" and quantization.backend(CPU) == "optimum.quanto"
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    assert transformers_config("4bit", CPU, torch.float32).weights == "int4"


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_quantised_llm_nearly_says_the_same_and_its_adapter_works(
    kind: Any, tiny_directory: Path, pipe: AnyGenPipeline, tmp_path: Path, tiny_llm: Callable[..., LLM]
) -> None:
    try:
        transformers_config(kind, CPU, torch.float32)
    except ConfigError as error:
        pytest.skip(str(error))
    llm, ids = tiny_llm(hidden_size=128, intermediate_size=128), torch.tensor([[5, 6, 7, 8]])
    llm.save_base(tmp_path)
    small = LLM.from_pretrained(tmp_path, dtype=torch.float32, quantization=kind)
    wanted, made = (one.logits(one.hidden_states(one.embedding(ids))[0]) for one in (llm, small))
    error = (made - wanted).norm() / wanted.norm()
    assert 1e-5 < error < (0.03 if kind == "8bit" else 0.4)
    if kind == "8bit":
        whole = AnyGenPipeline.from_pretrained(tiny_directory, device="cpu", quantization=kind)
        assert whole.model.llm.has_adapter and whole.model.llm.placed and whole.model.llm.quantized
        assert whole("Draw", seed=1, max_new_tokens=4).media[0].modality == "image"
    with small.no_gradients():  # some packages' weights refuse inference mode
        small.hidden_states(small.embedding(ids))


def test_an_llm_spread_over_memory_and_disk_says_the_same(
    tiny_llm: Callable[..., LLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYGEN_HOME", str(tmp_path / "home"))
    llm, ids = tiny_llm(), torch.tensor([[5, 6, 7, 8]])
    llm.save_base(tmp_path / "llm")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = LLM.from_pretrained(tmp_path / "llm", dtype=torch.float32, device_map=places)
    weight: Any = spread.base.get_decoder().layers[1].self_attn.q_proj.weight  # type: ignore[union-attr]
    assert weight.is_meta and spread.placed and spread.tied and spread.device.type == "cpu"
    wanted, made = (one.logits(one.hidden_states(one.embedding(ids))[0]) for one in (llm, spread))
    torch.testing.assert_close(made, wanted)
    with pytest.raises(ConfigError, match="device_map: "):
        LLM.from_pretrained(tmp_path / "llm", device_map="everywhere")


def test_a_model_with_a_map_answers_as_without(tiny_directory: Path, pipe: AnyGenPipeline) -> None:
    spread = AnyGenPipeline.from_pretrained(tiny_directory, device="cpu", device_map={"": "cpu"})
    options: Any = {"seed": 3, "max_new_tokens": 5}
    assert spread.model.llm.placed and spread("Draw and play", **options) == pipe("Draw and play", **options)
    assert "LLM" not in str(spread.memory_plan) and "image generator" in str(spread.memory_plan)
