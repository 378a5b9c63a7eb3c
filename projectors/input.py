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
    words: int
    """U, different tokens that are told of them."""
    tokens: int = 1
    """N, prompt tokens made of each feature token."""
    width: int = 384
    """Of the hidden layer."""
    scale: float = 150.0
    """Inverse temperature of the recall at the start; it is learned."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.memories, self.words) < 1:
            raise ConfigError(
                f"a memory projector has at least 1 memory and 1 word, and makes at least 1 token of each feature, "
                f"got memories={self.memories}, words={self.words}, tokens={self.tokens}"
            )
        if self.scale <= 0:
            raise ConfigError(f"the scale of the recall must be positive, got {self.scale}")


class MemoryProjector(InputProjector):
    """Tells the names that a feature recalls from a memory of texts, and adds what an MLP makes of the feature itself.

    Media and texts share the encoder's space, but lie apart in it. The softmax over a feature's likenesses with
    remembered texts says which of them it is near; for each, N tokens such as the LLM's embeddings of a name are told.

    ```
    feature ─┬─ likenesses with keys ─ softmax ─┬─ told words ──────────────────┐
             │                                  └─ keys ─ recalled ─┐           + ─► N tokens
             └─ zero mean, unit spread ─────────────────────────── MLP ─────────┘
    ```

    Source: DeCap (arXiv:2303.03032), for the recall; keys and values apart, Miller et al. 2016 (arXiv:1606.03126).
    Differs: DeCap hands on the recalled text feature alone; here the temperature is learned, a memory tells tokens of
    the LLM's, and the feature is kept.
    """

    config_class = MemoryProjectorConfig
    keys: Tensor
    mean: Tensor
    deviation: Tensor
    spelling: Tensor

    def __init__(self, config: MemoryProjectorConfig, *, feature_dim: int, llm_dim: int) -> None:
        super().__init__(config, feature_dim=feature_dim, llm_dim=llm_dim)
        self.register_buffer("keys", torch.zeros(config.memories, feature_dim))
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("deviation", torch.ones(feature_dim))
        # long[K, N], rows of `words`: names share words, so that these are far fewer than the names' tokens
        self.register_buffer("spelling", torch.zeros(config.memories, config.tokens, dtype=torch.long))
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale)))
        self.words = nn.Parameter(torch.randn(config.words, llm_dim))
        self.proj = nn.Sequential(
            nn.Linear(2 * feature_dim, config.width), nn.GELU(), nn.Linear(config.width, config.tokens * llm_dim)
        )

    @torch.no_grad()
    def remember(self, keys: Tensor, features: Tensor, told: Tensor) -> None:
        """Takes the texts to recall, what to tell of each, and the mean and spread of the features to come.

        Until it is trained, the MLP adds nothing to what is told.

        Args:
            keys: float[K, C], unit features of texts, in the features' space.
            features: float[P, C], a sample of what the projector will see.
            told: float[K, N, D], the tokens that each text stands for, of which U are different.

        Raises:
            ConfigError: there are more or fewer keys than memories, or different tokens than words.
        """
        if keys.shape != self.keys.shape:
            raise ConfigError(f"the memory has the shape {tuple(self.keys.shape)}, got keys {tuple(keys.shape)}")
        words, spelling = torch.unique(told.flatten(0, 1).float(), dim=0, return_inverse=True)
        if words.shape != self.words.shape:
            raise ConfigError(f"the memory has {len(self.words)} words, {len(words)} different tokens are told")
        self.keys.copy_(keys)
        self.mean.copy_(features.mean(0))
        self.deviation.copy_(features.std(0).clamp(min=1e-6))
        self.words.copy_(words)
        self.spelling.copy_(spelling.view(told.shape[:2]))
        last = self.proj[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def likeness(self, values: Tensor) -> Tensor:
        """float[..., C] -> float32[..., K], how much of each memory a feature recalls; sums to 1."""
        # Half precision would blur likenesses by as much as the scaled softmax tells apart.
        with torch.autocast(values.device.type, enabled=False):
            return (values.float() @ self.keys.float().T * self.log_scale.float().exp()).softmax(-1)

    def forward(self, features: Features) -> Features:
        """values float[B, T, C] -> values float[B, T * N, D]; the N tokens of a feature stand together."""
        values, keys = features.values, self.keys.float()
        recalled = self.likeness(values)
        seen = (values - self.mean) / self.deviation
        text = (recalled @ keys - keys.mean(0)) / keys.std(0, correction=0).clamp(min=1e-6)
        both = torch.cat([seen, text.to(seen.dtype)], -1)
        told = nn.functional.embedding(self.spelling, self.words).flatten(1)  # [K, N * D]
        made = recalled.to(told.dtype) @ told + self.proj(both)
        return spread(made, features.mask, self.config.tokens)


class FeatureShift(nn.Module):
    """Brings the features of one modality to where those of another lie, whose projector then reads them.

    Each modality lies at a distance of its own from the texts (Liang et al. 2022, arXiv:2203.02053, the modality gap).
    """

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(feature_dim))
        self.shift = nn.Parameter(torch.zeros(feature_dim))

    @torch.no_grad()
    def bridge(self, own: Tensor, other: Tensor) -> None:
        """Starts from the difference of the two gaps.

        Args:
            own: float[C], the mean of this modality's features less those of the texts for them.
            other: float[C], the other's.
        """
        self.scale.fill_(1.0)
        self.shift.copy_(other - own)

    def forward(self, features: Features) -> Features:
        """values float[B, T, C] -> the same shape; the mask stays."""
        return Features(features.values * self.scale + self.shift, features.mask)


def spread(values: Tensor, mask: Tensor, tokens: int) -> Features:
    """float[B, T, N * D], bool[B, T] -> N tokens in place of each: float[B, T * N, D], bool[B, T * N]."""
    batch, length, width = values.shape
    return Features(
        values.reshape(batch, length * tokens, width // tokens),
        mask.repeat_interleave(tokens, dim=1),
    )
