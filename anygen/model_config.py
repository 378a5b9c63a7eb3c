"""`anygen.json`: which parts a model is made of, and where they lie. Read without torch.

An example, as short as it can be:

    {"llm": {"repo": "smollm2-135m-instruct"}, "modalities": {"image": {"output": {
        "signal_tokens": 4, "condition": {"prompt_embeds": [77, 768]},
        "generator": {"name": "stable_diffusion", "source": {"path": "generators/image"}}}}}}
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anygen.config import Config
from anygen.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig(Config):
    """Where a part lies."""

    path: str | None = None
    """A directory inside the model's own."""
    repo: str | None = None
    """A name that the hub resolves."""
    revision: str | None = None
    """Its pinned version."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.repo is None):
            raise ConfigError("a part has either a 'path' inside the model's directory or a 'repo', not both")
        if self.path is not None and (Path(self.path).is_absolute() or ".." in Path(self.path).parts):
            raise ConfigError(f"'path' stays inside the model's directory, got '{self.path}'")


@dataclass(frozen=True, kw_only=True, slots=True)
class PartConfig(Config):
    """A registered part that is built from options and whose weights lie in `projectors.safetensors`."""

    name: str
    """Its name in the registry."""
    options: dict[str, Any] = field(default_factory=dict)
    """The fields of its configuration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcedPartConfig(Config):
    """A registered part that lies in a directory of its own."""

    name: str
    """Its name in the registry."""
    source: SourceConfig
    """Where it lies."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of its `from_pretrained`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConfig(Config):
    """How a modality is read."""

    encoder: SourcedPartConfig
    feature_dim: int
    """C, the width of the encoder's features."""
    slots: int = 1
    """N, the prompt tokens of one media value: the encoder's tokens times the projector's `tokens`."""
    projector: PartConfig = PartConfig(name="linear")
    shares: str | None = None
    """Another input modality, whose projector makes this one's tokens as well; of its own it has but a scale and a
    shift, which bring its features to where the other's lie."""
    before: str = ""
    """Text before the slots of a media value, such as NExT-GPT's `<Img>`."""
    after: str = ""
    """Text behind them."""

    def __post_init__(self) -> None:
        if self.shares is not None and self.projector != PartConfig(name="linear"):
            raise ConfigError(f"an input has a 'projector' of its own or 'shares' that of {self.shares}, not both")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig(Config):
    """How a modality is made."""

    signal_tokens: int
    """S, the tokens of a run."""
    condition: dict[str, tuple[int, ...]]
    """The generator's condition: name -> shape without the batch axis."""
    generator: SourcedPartConfig
    projector: PartConfig = PartConfig(name="text_fc")
    shares: str | None = None
    """Another output modality with as many signal tokens and the same condition, whose projector makes this one's
    conditions as well. A projector reads a run's own embeddings beside its states, which tell the two apart."""

    def __post_init__(self) -> None:
        if self.shares is not None and self.projector != PartConfig(name="text_fc"):
            raise ConfigError(f"an output has a 'projector' of its own or 'shares' that of {self.shares}, not both")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModalityConfig(Config):
    """What the model does with a modality."""

    input: InputConfig | None = None
    """None: it cannot be read."""
    output: OutputConfig | None = None
    """None: it cannot be made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnyGenConfig(Config):
    """`anygen.json`. The order of the modalities is the order of the signal rows."""

    llm: SourceConfig
    modalities: dict[str, ModalityConfig]
    name: str = ""
    """What the model is called in replies and saved media."""
    routes: bool = True
    """Whether an answer begins with a route. If not (NExT-GPT), the adapted LLM gives every answer, and the rows of
    `<|words|>` and `<|media|>` are never read."""
    plugins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Package -> the parts that it brings, as "encoder pointcloud"; written when a model is saved."""

    def __post_init__(self) -> None:
        for modality, config in self.inputs.items():
            if (owner := config.shares) is None:
                continue
            owners = [name for name, other in self.inputs.items() if other.shares is None]
            if owner not in owners:
                raise ConfigError(
                    f"{modality} shares the projector of {owner}, which has none; "
                    f"inputs with a projector of their own: {', '.join(owners) or 'none'}"
                )
            if (width := self.inputs[owner].feature_dim) != config.feature_dim:
                raise ConfigError(
                    f"{modality} cannot share the projector of {owner}: "
                    f"its features are {config.feature_dim} wide, those of {owner} {width}"
                )
        for modality, config in self.outputs.items():
            if config.shares is not None:
                self._check_shared(modality, config, config.shares)

    def _check_shared(self, modality: str, config: OutputConfig, owner: str) -> None:
        owners = {name: other for name, other in self.outputs.items() if other.shares is None}
        if owner not in owners:
            raise ConfigError(
                f"{modality} shares the projector of {owner}, which has none; "
                f"outputs with a projector of their own: {', '.join(owners) or 'none'}"
            )
        told = [(one.signal_tokens, one.condition) for one in (config, owners[owner])]
        if told[0] != told[1]:
            (tokens, condition), (own_tokens, own_condition) = told
            raise ConfigError(
                f"{modality} cannot share the projector of {owner}: it has {tokens} signal tokens and the condition "
                f"{condition}, {owner} has {own_tokens} and {own_condition}"
            )

    @property
    def inputs(self) -> dict[str, InputConfig]:
        """The modalities that can be read."""
        return {m: c.input for m, c in self.modalities.items() if c.input is not None}

    @property
    def outputs(self) -> dict[str, OutputConfig]:
        """The modalities that can be made."""
        return {m: c.output for m, c in self.modalities.items() if c.output is not None}

    @property
    def slots(self) -> dict[str, int]:
        """Input modality -> N."""
        return {m: c.slots for m, c in self.inputs.items()}
