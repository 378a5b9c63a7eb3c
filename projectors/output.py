"""LLM states at the signal tokens -> a generator's condition.

Source: `TextFcLayer` is NExT-GPT's output projector (arXiv:2309.05519; GILL's mapper, arXiv:2305.17216), with the
published names `fc`, `tfm`, `model`, `query_embs`, so that its checkpoints load; the MLP follows CoDi-2's
(arXiv:2311.18775).
Differs: a generator with several condition tensors gets queries and a head for each, over a shared trunk.
Shapes: B batch, S signal tokens, D LLM width, E projector width, L condition tokens, C condition width.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anygen.config import Config
from anygen.errors import ConfigError
from anygen.features import Condition, ConditionSpec
from anygen.projectors.base import OutputProjector


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFcLayerConfig(Config):
    width: int = 512
    """E, the transformer's width."""
    encoder_layers: int = 4
    """Blocks over the signal states."""
    decoder_layers: int = 4
    """Blocks over the queries."""
    heads: int = 4
    """Attention heads of every block."""
    ffn: int = 2048
    """Width inside the feed-forward blocks."""
    query_std: float = 1.0
    """Spread of the queries at the start; 0 makes all condition tokens equal (NExT-GPT's second code line)."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not divisible by {self.heads} heads")


class TextFcLayer(OutputProjector):
    """Learned queries read the projected signal states through a small encoder-decoder transformer.

    ```
    states + embeddings [B,S,D] ─ fc ─► [B,S,E] ─ encoder ─┐
                         query_embs [1,L,E] ─────────── decoder ─ model ─► [B,L,C]
    ```
    """

    config_class = TextFcLayerConfig

    def __init__(self, config: TextFcLayerConfig, *, llm_dim: int, signal_tokens: int, spec: ConditionSpec) -> None:
        super().__init__(config, llm_dim=llm_dim, signal_tokens=signal_tokens, spec=spec)
        self.sizes = sizes(spec)
        queries = sum(length for length, _ in self.sizes.values())
        self.fc = nn.Linear(llm_dim, config.width)
        block: dict[str, Any] = dict(
            nhead=config.heads, dim_feedforward=config.ffn, dropout=0.0, norm_first=True, batch_first=True
        )
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(config.width, **block),
            config.encoder_layers,
            nn.LayerNorm(config.width),
            enable_nested_tensor=False,  # it could not be used with norm_first, and warns
        )
        self.tfm = nn.Transformer(
            config.width, num_decoder_layers=config.decoder_layers, custom_encoder=encoder, **block
        )
        self.model = heads(self.sizes, config.width)
        self.query_embs = nn.Parameter(torch.randn(1, queries, config.width) * config.query_std)

    def forward(self, states: Tensor, embeddings: Tensor) -> Condition:
        """float[B, S, D] twice -> name -> float[B, L, C]."""
        source = self.fc(states + embeddings)
        read = self.tfm(source, self.query_embs.to(source.dtype).expand(len(source), -1, -1))
        return split(read, self.model, self.sizes, self.spec)


@dataclass(frozen=True, kw_only=True, slots=True)
class MLPOutputProjectorConfig(Config):
    width: int = 1024
    """E, the hidden width."""
    activation: Literal["gelu", "silu"] = "gelu"
    """The nonlinearity, used twice."""


class MLPOutputProjector(OutputProjector):
    """CoDi-2's Linear-GELU-LayerNorm-Linear on every token, with one linear map S -> L over the tokens between.

    Differs from CoDi-2, where each signal token becomes one condition token, in that map and the L learned rows
    that tell the condition tokens apart.
    """

    config_class = MLPOutputProjectorConfig

    def __init__(
        self, config: MLPOutputProjectorConfig, *, llm_dim: int, signal_tokens: int, spec: ConditionSpec
    ) -> None:
        super().__init__(config, llm_dim=llm_dim, signal_tokens=signal_tokens, spec=spec)
        self.sizes = sizes(spec)
        length = sum(length for length, _ in self.sizes.values())
        self.fc = nn.Linear(llm_dim, config.width)
        self.act = nn.GELU() if config.activation == "gelu" else nn.SiLU()
        self.norm = nn.LayerNorm(config.width)
        self.mix = nn.Linear(signal_tokens, length, bias=False)
        self.places = nn.Parameter(torch.randn(length, config.width))
        self.model = heads(self.sizes, config.width)

    def forward(self, states: Tensor, embeddings: Tensor) -> Condition:
        """float[B, S, D] twice -> name -> float[B, L, C]."""
        tokens = self.norm(self.act(self.fc(states + embeddings)))
        mixed = self.mix(tokens.transpose(1, 2)).transpose(1, 2)  # [B, S, E] -> [B, L, E]
        return split(self.act(mixed + self.places), self.model, self.sizes, self.spec)


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankProjectorConfig(Config):
    rank: int = 256
    """Width between the two linear maps."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1, got {self.rank}")


class LowRankProjector(OutputProjector):
    """Two linear maps, all signal states at once -> all condition tokens at once, with nothing between.

    NExT-GPT's mode "linear" maps token by token; here the map is over the whole run, and of low rank. It can be fitted
    without gradients (`anygen.training.alignment.fit_low_rank`: reduced-rank ridge regression, seconds on a CPU), which
    makes it the first projector to try for a new generator.
    """

    config_class = LowRankProjectorConfig

    def __init__(
        self, config: LowRankProjectorConfig, *, llm_dim: int, signal_tokens: int, spec: ConditionSpec
    ) -> None:
        super().__init__(config, llm_dim=llm_dim, signal_tokens=signal_tokens, spec=spec)
        self.sizes = sizes(spec)
        self.down = nn.Linear(signal_tokens * llm_dim, config.rank, bias=False)
        self.up = nn.Linear(config.rank, sum(length * width for length, width in self.sizes.values()))

    def forward(self, states: Tensor, embeddings: Tensor) -> Condition:
        """float[B, S, D] states; the embeddings are the same for every run and not used -> name -> float[B, L, C]."""
        made = self.up(self.down(states.flatten(1)))
        parts = made.split([length * width for length, width in self.sizes.values()], dim=1)
        shapes = self.spec.shapes.items()
        return Condition({name: part.reshape(-1, *shape) for (name, shape), part in zip(shapes, parts, strict=True)})


def sizes(spec: ConditionSpec) -> dict[str, tuple[int, int]]:
    """name -> (L, C); a tensor without a token axis, such as a pooled embedding, counts as one token.

    Raises:
        ConfigError: a tensor has more than two axes.
    """
    for name, shape in spec.shapes.items():
        if len(shape) not in (1, 2):
            raise ConfigError(f"condition '{name}' has shape {tuple(shape)}; projectors make (tokens, width)")
    return {name: (1 if len(shape) == 1 else shape[0], shape[-1]) for name, shape in spec.shapes.items()}


def heads(sizes: dict[str, tuple[int, int]], width: int) -> nn.Module:
    """One linear head, or one a tensor by name."""
    if len(sizes) == 1:
        return nn.Linear(width, next(iter(sizes.values()))[1])
    return nn.ModuleDict({name: nn.Linear(width, channels) for name, (_, channels) in sizes.items()})


def split(read: Tensor, model: nn.Module, sizes: dict[str, tuple[int, int]], spec: ConditionSpec) -> Condition:
    """float[B, all tokens, E] -> each tensor's tokens through its own head, in its shape."""
    parts = read.split([length for length, _ in sizes.values()], dim=1)
    tensors = {}
    for (name, shape), part in zip(spec.shapes.items(), parts, strict=True):
        head = model[name] if isinstance(model, nn.ModuleDict) else model
        tensors[name] = head(part).reshape(len(read), *shape)
    return Condition(tensors)
