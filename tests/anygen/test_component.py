import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from anygen import component
from anygen.component import Component, read_safetensors
from anygen.config import Config
from anygen.errors import CheckpointError, ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class PartConfig(Config):
    width: int = 4


class Part(Component):
    config_class = PartConfig

    def __init__(self, config: PartConfig) -> None:
        super().__init__()
        self.config = config
        self.first, self.second = nn.Linear(config.width, config.width), nn.Linear(config.width, 2)


def test_what_is_saved_is_loaded_in_evaluation_mode(tmp_path: Path) -> None:
    part = Part(PartConfig(width=6))
    part.save_pretrained(tmp_path)
    loaded = Part.from_pretrained(tmp_path)
    assert loaded.config == part.config and not loaded.training
    for name, value in part.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert loaded.dtype == torch.float32 and loaded.device.type == "cpu"


def test_large_parts_are_sharded_and_a_missing_shard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(component, "SHARD", "10KB")
    part = Part(PartConfig(width=60))
    part.save_pretrained(tmp_path)
    shards = sorted(set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values()))
    assert len(shards) > 1
    assert torch.equal(Part.from_pretrained(tmp_path).first.weight, part.first.weight)
    (tmp_path / shards[0]).unlink()
    with pytest.raises(CheckpointError, match=f"{shards[0]} is missing"):
        Part.from_pretrained(tmp_path)


def test_missing_unexpected_and_misshapen_keys_are_listed(tmp_path: Path) -> None:
    Part(PartConfig()).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["first.bias"]
    state["third.weight"] = torch.zeros(1)
    state["second.weight"] = torch.zeros(2, 9)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        Part.from_pretrained(tmp_path)
    message = str(caught.value)
    for fault in ("missing first.bias", "unexpected third.weight", "second.weight is (2, 9), not (2, 4)"):
        assert fault in message


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    Part(PartConfig()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(CheckpointError, match="model.safetensors is not a readable safetensors file"):
        read_safetensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        read_safetensors(tmp_path)


def test_a_directory_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file .*config.json"):
        Part.from_pretrained(tmp_path)
