"""A trained part that is saved and loaded alone: `config.json` beside sharded safetensors, strict both ways."""

import json
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from anygen.config import Config
from anygen.errors import CheckpointError

SHARD = "15MB"
"""Largest weight file written; the repository's hosts and mirrors refuse files over 16 MiB."""


class Component(nn.Module):
    """An `nn.Module` that owns a configuration and knows how to be written to and read from a directory."""

    config_class: ClassVar[type[Config]]
    config: Any

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json` and `model*.safetensors` (shards with an index once over 15 MB)."""
        from huggingface_hub import save_torch_state_dict

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.config.save(directory / "config.json")
        save_torch_state_dict(self.state_dict(), directory, max_shard_size=SHARD)

    @classmethod
    def from_pretrained(cls, directory: str | Path, **kwargs: Any) -> Self:
        """Builds the part from `config.json` and loads every weight, in evaluation mode.

        Raises:
            ConfigError: the configuration does not fit.
            CheckpointError: a file or key is missing, unexpected or mis-shaped.
        """
        directory = Path(directory)
        part = cls(cls.config_class.load(directory / "config.json"), **kwargs)
        load_strict(part, read_safetensors(directory), f"{cls.__name__} from {directory}")
        return part.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' floating-point type."""
        return next(self.parameters()).dtype


def read_safetensors(directory: Path, stem: str = "model") -> dict[str, torch.Tensor]:
    """All tensors of `stem.safetensors` or of the shards that `stem.safetensors.index.json` lists.

    Raises:
        CheckpointError: neither is there, a listed shard is missing, or a file is not readable as safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = directory / f"{stem}.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = [f"{stem}.safetensors"]
    state: dict[str, torch.Tensor] = {}
    for name in files:
        if not (directory / name).exists():
            raise CheckpointError(f"the weight file {directory / name} is missing")
        try:
            state |= load_file(directory / name)
        except SafetensorError as error:
            raise CheckpointError(f"{directory / name} is not a readable safetensors file: {error}") from None
    return state


def load_strict(module: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    """Copies `state` into `module`; nothing may be left over, left out or of another shape.

    Raises:
        CheckpointError: lists the missing, the unexpected and the mis-shaped keys.
    """
    check_fit(module.state_dict(), state, what)
    module.load_state_dict(state)


def check_fit(own: dict[str, torch.Tensor], state: dict[str, torch.Tensor], what: str) -> None:
    """Compares the keys and shapes of `state` with those wanted.

    Raises:
        CheckpointError: lists the missing, the unexpected and the mis-shaped keys.
    """
    faults = [f"missing {key}" for key in own if key not in state]
    faults += [f"unexpected {key}" for key in state if key not in own]
    faults += [
        f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(f"{what} does not fit: {'; '.join(faults[:8])}{more}")
