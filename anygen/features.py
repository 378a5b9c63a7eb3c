"""What flows between parts: feature tokens with their mask, and named conditions with their specification.

Shapes: B batch, T tokens, C width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True)
class Features:
    """A padded batch of tokens."""

    values: Tensor
    """float[B, T, C]."""
    mask: Tensor
    """bool[B, T], false where a sample is padded."""

    @classmethod
    def cat(cls, parts: Sequence["Features"]) -> Self:
        """Joins batches; samples of the shorter ones are padded behind their tokens with zeros."""
        longest = max(part.values.shape[1] for part in parts)
        values, masks = [], []
        for part in parts:
            missing = longest - part.values.shape[1]
            values.append(F.pad(part.values, (0, 0, 0, missing)))
            masks.append(F.pad(part.mask, (0, missing)))
        return cls(torch.cat(values), torch.cat(masks))


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditionSpec:
    """Which tensors a generator is conditioned on: name -> shape without the batch axis.

    Stable Diffusion 1.5 has `{"prompt_embeds": (77, 768)}`; AudioLDM2 has two entries and a mask.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def check(self, condition: "Condition") -> "Condition":
        """Returns `condition` if it has exactly these tensors.

        Raises:
            ConfigError: names the tensor and both shapes.
        """
        got = {name: tuple(value.shape[1:]) for name, value in condition.tensors.items()}
        if got != dict(self.shapes):
            raise ConfigError(f"a condition of {dict(self.shapes)} is wanted, got {got}")
        return condition


@dataclass(frozen=True, slots=True)
class Condition:
    """What a generator is conditioned on, for B samples."""

    tensors: dict[str, Tensor]
    """name -> float[B, ...] (a mask is bool[B, L])."""

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: int | slice | Tensor) -> Self:
        """Samples `rows`; an integer keeps the batch axis."""
        if isinstance(rows, int):
            rows = slice(rows, rows + 1 or None)
        return type(self)({name: value[rows] for name, value in self.tensors.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moved to `device`; floating tensors also cast to `dtype`."""
        return type(self)(
            {
                name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
                for name, value in self.tensors.items()
            }
        )

    @classmethod
    def cat(cls, parts: Sequence["Condition"]) -> Self:
        """Joins batches.

        Raises:
            CheckpointError: the parts name different tensors.
        """
        names = [list(part.tensors) for part in parts]
        if any(sorted(other) != sorted(names[0]) for other in names):
            raise CheckpointError(f"conditions of different kinds cannot be joined: {names}")
        return cls({name: torch.cat([part.tensors[name] for part in parts]) for name in names[0]})
