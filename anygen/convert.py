"""Published checkpoints -> safetensors: reading them safely, comparing them whole, and ImageBind's own.

A pickle can run code. These are read with `torch.load(weights_only=True)`, which builds tensors and refuses the rest;
nothing else in anygen reads pickles at all.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anygen.encoders.imagebind_config import ImageBindConfig
from anygen.errors import CheckpointError, ConfigError

IMAGEBIND = "imagebind_huge.pth"
"""What ImageBind's release is called."""
SHARD = "2GB"
"""Largest weight file written."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """How a checkpoint compares with what its architecture has."""

    matched: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Key -> shape of those that fit."""
    missing: list[str] = field(default_factory=list)
    """Keys that the architecture has and the checkpoint lacks."""
    unexpected: list[str] = field(default_factory=list)
    """Keys that the checkpoint has beside."""
    shapes: list[str] = field(default_factory=list)
    """Keys of another shape, with both shapes."""

    def check(self, what: str) -> None:
        """Refuses anything partial.

        Raises:
            CheckpointError: counts the faults of each kind and lists the first keys.
        """
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.shapes}
        faults = [f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in kinds.items() if keys]
        if faults:
            raise CheckpointError(f"{what} does not fit, nothing was written: {'; '.join(faults)}")


def compare(wanted: Mapping[str, Sequence[int]], state: Mapping[str, Tensor]) -> Coverage:
    """The keys and shapes of `state` beside those wanted."""
    coverage = Coverage()
    for key, shape in wanted.items():
        if key not in state:
            coverage.missing.append(key)
        elif (found := tuple(state[key].shape)) != tuple(shape):
            coverage.shapes.append(f"{key} is {found}, not {tuple(shape)}")
        else:
            coverage.matched[key] = found
    coverage.unexpected.extend(key for key in state if key not in wanted)
    return coverage


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, on the CPU; large ones are mapped, not read.

    Raises:
        CheckpointError: it is not there, is damaged, holds something other than a table of tensors, or holds
            anything that would run code on loading; names that.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged bytes raise anything
        named = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if named is None:
            raise CheckpointError(f"{path} is not a readable checkpoint") from None
        raise CheckpointError(
            f"{path} holds {named[1]} beside tensors, which could run code on loading, so it is not read; "
            "save its state dict alone"
        ) from None
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} holds something other than a table of tensors; save its state dict alone")
    return {str(key): value.detach() for key, value in loaded.items()}


def convert_imagebind(
    checkpoint: str | Path,
    out: str | Path,
    *,
    config: ImageBindConfig | None = None,
    vocabulary: str | Path | None = None,
    overwrite: bool = False,
) -> Coverage:
    """ImageBind's release -> `config.json`, sharded `model*.safetensors` and, for texts, `tokenizer.json`.

    Args:
        checkpoint: `imagebind_huge.pth`, or a directory that holds it.
        out: the new directory; `ImageBindEncoder.from_pretrained` reads it.
        config: other sizes than those of the release.
        vocabulary: the release's `bpe_simple_vocab_16e6.txt.gz`; without it the result cannot read texts.
        overwrite: replaces an ImageBind that lies there.

    Returns:
        What was compared; all of it fits.

    Raises:
        CheckpointError: as `read_pickle` and `Coverage.check`, or the vocabulary does not fit.
        ConfigError: a vocabulary was given for an ImageBind without texts.
        OutputError: `out` is not empty, or cannot be written.
    """
    from huggingface_hub import save_torch_state_dict

    from anygen.encoders.imagebind import ImageBindModel
    from anygen.encoders.imagebind_inputs import clip_tokenizer
    from anygen.saving import replacing

    path = Path(checkpoint)
    if path.is_dir():
        path /= IMAGEBIND
    config = config or ImageBindConfig.huge()
    with replacing(Path(out), overwrite=overwrite, holds="config.json") as temporary:
        state = read_pickle(path)
        with torch.device("meta"):
            wanted = {key: value.shape for key, value in ImageBindModel(config).state_dict().items()}
        coverage = compare(wanted, state)
        coverage.check(str(path))
        config.save(temporary / "config.json")
        if vocabulary is not None:
            if config.text is None:
                raise ConfigError("this ImageBind reads no texts, so it takes no vocabulary")
            clip_tokenizer(Path(vocabulary), config.text.vocab_size).save(str(temporary / "tokenizer.json"))
        # one copy a tensor: in the file several may lie in one storage
        save_torch_state_dict({key: state[key].clone() for key in wanted}, temporary, max_shard_size=SHARD)
    return coverage


def _first(keys: Sequence[str], count: int = 3) -> str:
    return ", ".join(keys[:count]) + (", …" if len(keys) > count else "")
