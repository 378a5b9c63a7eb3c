"""Encoder features -> prompt tokens in the LLM's embedding space, token by token.

Source: one linear map of a pooled ImageBind vector, PandaGPT (arXiv:2305.16355) and NExT-GPT (arXiv:2309.05519);
the MLP is LLaVA-1.5's mlpNx_gelu (arXiv:2310.03744).
Differs: a feature token may become several prompt tokens (`tokens`), because one 576-wide token cannot tell a small
LLM all that an ImageBind vector holds; `tokens=1` is the published form.
Shapes: B batch, T feature tokens, C feature width, N prompt tokens a feature token, D LLM width.
"""

from dataclasses import dataclass

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


def spread(values: Tensor, mask: Tensor, tokens: int) -> Features:
    """float[B, T, N * D], bool[B, T] -> N tokens in place of each: float[B, T * N, D], bool[B, T * N]."""
    batch, length, width = values.shape
    return Features(
        values.reshape(batch, length * tokens, width // tokens),
        mask.repeat_interleave(tokens, dim=1),
    )
