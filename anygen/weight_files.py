"""What safetensors files hold, read from their headers: no torch, no weights in memory."""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anygen.errors import CheckpointError

_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header


@dataclass(frozen=True, slots=True)
class Header:
    """One tensor's."""

    name: str
    dtype: str
    """As safetensors has it, such as "BF16"."""
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many it has."""
        return math.prod(self.shape)


def headers(path: Path) -> Iterator[Header]:
    """The tensors of one file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(_LENGTH_BYTES))
            header = json.loads(file.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                yield Header(name, tensor["dtype"], tuple(tensor["shape"]))
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
        raise CheckpointError(f"{path} is not a readable safetensors file") from None
