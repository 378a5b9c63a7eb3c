"""Encoder features -> prompt tokens in the LLM's embedding space, token by token.

Source: one linear map of a pooled ImageBind vector, PandaGPT (arXiv:2305.16355) and NExT-GPT (arXiv:2309.05519);
the MLP is LLaVA-1.5's mlpNx_gelu (arXiv:2310.03744); the memory of text features is DeCap's (arXiv:2303.03032).
Differs: a feature token may become several prompt tokens (`tokens`), because one 576-wide token cannot tell a small
LLM all that an ImageBind vector holds; `tokens=1` is the published form.
Shapes: B batch, T feature tokens, C feature width, N prompt tokens a feature token, D LLM width, K memories.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anygen.config import Config
from anygen.errors import ConfigError
from anygen.features import Features
from anygen.projectors.base import InputProjector


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearProjectorConfig(Config):
    tokens: int = 1
    """N, prompt tokens made of each feature token."""
    layer_norm: bool = False
    """Normalises the features first; for encoders whose features are not of unit size."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"a projector makes at least 1 token of each feature, got tokens={self.tokens}")


class LinearProjector(InputProjector):
    """One linear map, C -> N * D."""

    config_class = LinearProjectorConfig

    def __init__(self, config: LinearProjectorConfig, *, feature_dim: int, llm_dim: int) -> None:
        super().__init__(config, feature_dim=feature_dim, llm_dim=llm_dim)
        self.norm = nn.LayerNorm(feature_dim) if config.layer_norm else nn.Identity()
        self.proj = nn.Linear(feature_dim, config.tokens * llm_dim)

    def forward(self, features: Features) -> Features:
        """values float[B, T, C] -> values float[B, T * N, D]; the N tokens of a feature stand together."""
        return spread(self.proj(self.norm(features.values)), features.mask, self.config.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class MLPProjectorConfig(LinearProjectorConfig):
    depth: int = 2
    """Linear layers with a GELU between each two; 1 is a linear map."""

    def __post_init__(self) -> None:
        LinearProjectorConfig.__post_init__(self)
        if self.depth < 1:
            raise ConfigError(f"an MLP has at least 1 layer, got depth={self.depth}")


class MLPProjector(InputProjector):
    """LLaVA's mlpNx_gelu: Linear(C, D), then GELU and Linear(D, D) until `depth`; the last is N * D wide."""

    config_class = MLPProjectorConfig

    def __init__(self, config: MLPProjectorConfig, *, feature_dim: int, llm_dim: int) -> None:
        super().__init__(config, feature_dim=feature_dim, llm_dim=llm_dim)
        self.norm = nn.LayerNorm(feature_dim) if config.layer_norm else nn.Identity()
        widths = [feature_dim, *[llm_dim] * (config.depth - 1), config.tokens * llm_dim]
        layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
        for before, after in zip(widths[1:], widths[2:], strict=False):
            layers += [nn.GELU(), nn.Linear(before, after)]
        self.proj = nn.Sequential(*layers)

    def forward(self, features: Features) -> Features:
        """values float[B, T, C] -> values float[B, T * N, D]; the N tokens of a feature stand together."""
        return spread(self.proj(self.norm(features.values)), features.mask, self.config.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryProjectorConfig(Config):
    memories: int
    """K, text features that are remembered."""
    tokens: int = 1
    """N, prompt tokens made of each feature token."""
    width: int = 768
    """Of the hidden layer."""
    scale: float = 50.0
    """Inverse temperature of the recall at the start; it is learned."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.memories < 1:
            raise ConfigError(
                f"a memory projector has at least 1 memory and makes at least 1 token of each feature, "
                f"got memories={self.memories}, tokens={self.tokens}"
            )
        if self.scale <= 0:
            raise ConfigError(f"the scale of the recall must be positive, got {self.scale}")


class MemoryProjector(InputProjector):
    """An MLP that sees each feature beside what it recalls from a memory of text features.

    Media and texts share the encoder's space, but lie apart in it. The softmax over its similarities with remembered
    texts carries a feature over to their side, where what the LLM has to say of it is near; the feature itself keeps
    what the texts do not tell. Source: DeCap (arXiv:2303.03032).
    Differs: DeCap hands on the recalled vector alone; the temperature is learned here, the feature is kept, and both
    are brought to zero mean and unit spread.
    """

    config_class = MemoryProjectorConfig
    keys: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, config: MemoryProjectorConfig, *, feature_dim: int, llm_dim: int) -> None:
        super().__init__(config, feature_dim=feature_dim, llm_dim=llm_dim)
        self.register_buffer("keys", torch.zeros(config.memories, feature_dim))
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("deviation", torch.ones(feature_dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale)))
        self.proj = nn.Sequential(
            nn.Linear(2 * feature_dim, config.width), nn.GELU(), nn.Linear(config.width, config.tokens * llm_dim)
        )

    @torch.no_grad()
    def remember(self, keys: Tensor, features: Tensor) -> None:
        """Takes the texts to recall, and the mean and spread of the features to come.

        Args:
            keys: float[K, C], unit features of texts, in the features' space.
            features: float[P, C], a sample of what the projector will see.

        Raises:
            ConfigError: there are more or fewer keys than memories.
        """
        if keys.shape != self.keys.shape:
            raise ConfigError(f"the memory has the shape {tuple(self.keys.shape)}, got keys {tuple(keys.shape)}")
        self.keys.copy_(keys)
        self.mean.copy_(features.mean(0))
        self.deviation.copy_(features.std(0).clamp(min=1e-6))

    def recall(self, values: Tensor) -> Tensor:
        """float[..., C] -> float[..., C], the remembered texts' mean, weighted by their likeness to the feature."""
        # Half precision would blur likenesses by as much as the scaled softmax tells apart.
        with torch.autocast(values.device.type, enabled=False):
            values, keys = values.float(), self.keys.float()
            return (values @ keys.T * self.log_scale.float().exp()).softmax(-1) @ keys

    def forward(self, features: Features) -> Features:
        """values float[B, T, C] -> values float[B, T * N, D]; the N tokens of a feature stand together."""
        values, keys = features.values, self.keys.float()
        seen = (values - self.mean) / self.deviation
        recalled = (self.recall(values) - keys.mean(0)) / keys.std(0, correction=0).clamp(min=1e-6)
        both = torch.cat([seen, recalled.to(seen.dtype)], -1)
        return spread(self.proj(both), features.mask, self.config.tokens)


def spread(values: Tensor, mask: Tensor, tokens: int) -> Features:
    """float[B, T, N * D], bool[B, T] -> N tokens in place of each: float[B, T * N, D], bool[B, T * N]."""
    batch, length, width = values.shape
    return Features(
        values.reshape(batch, length * tokens, width // tokens),
        mask.repeat_interleave(tokens, dim=1),
    )
