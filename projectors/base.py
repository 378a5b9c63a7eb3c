"""The two contracts of this folder.

Shapes: B batch, T feature tokens, C feature width, N prompt tokens, S signal tokens, D LLM width.
"""

from abc import abstractmethod
from typing import Any

from torch import Tensor

from anygen.component import Component
from anygen.config import Config
from anygen.features import Condition, ConditionSpec, Features


class InputProjector(Component):
    """Encoder features -> tokens in the LLM's embedding space. Built from `(config, feature_dim, llm_dim)`."""

    def __init__(self, config: Config, *, feature_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.config: Any = config
        self.feature_dim, self.llm_dim = feature_dim, llm_dim

    @abstractmethod
    def forward(self, features: Features) -> Features:
        """values float[B, T, C] -> values float[B, N, D]."""


class OutputProjector(Component):
    """LLM states at the signal tokens -> a generator's condition. Built from `(config, llm_dim, spec)`."""

    def __init__(self, config: Config, *, llm_dim: int, signal_tokens: int, spec: ConditionSpec) -> None:
        super().__init__()
        self.config: Any = config
        self.llm_dim, self.signal_tokens, self.spec = llm_dim, signal_tokens, spec

    @abstractmethod
    def forward(self, states: Tensor, embeddings: Tensor) -> Condition:
        """float[B, S, D] hidden states at the signal positions, and the signal tokens' own input
        embeddings float[B, S, D] -> a condition that matches `spec`."""
