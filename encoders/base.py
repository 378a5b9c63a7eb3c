"""The contract of an encoder: media in, a padded batch of feature tokens out.

Shapes: B batch, T feature tokens, C feature width.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from anygen.component import Component
from anygen.features import Features


class Encoder(Component):
    """Turns media of one modality into features. Frozen everywhere but in its own training."""

    modality: str
    """What it reads: image, video, audio, or a plugin's modality."""
    feature_dim: int
    """C, the width of the features."""
    name: ClassVar[str] = ""

    @abstractmethod
    def preprocess(self, media: Sequence[Any]) -> dict[str, Tensor]:
        """Media values -> CPU tensors, first axis B; the keyword arguments of `forward`."""

    @abstractmethod
    def forward(self, **tensors: Tensor) -> Features:
        """The tensors of `preprocess`, moved to the device -> values float[B, T, C], mask bool[B, T]."""
