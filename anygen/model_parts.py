"""The parts of a model by what its configuration says of them: fresh projectors, encoders from their directories."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anygen.config import Config
from anygen.encoders.base import Encoder
from anygen.errors import AnyGenError, CheckpointError, ConfigError
from anygen.features import ConditionSpec
from anygen.model_config import InputConfig, OutputConfig, PartConfig, SourceConfig, SourcedPartConfig
from anygen.projectors.base import InputProjector, OutputProjector
from anygen.projectors.input import FeatureShift
from anygen.registry import Kind, lookup


def input_projector(config: InputConfig, width: int) -> InputProjector | FeatureShift:
    """Fresh, for an LLM of that width; ConfigError if its options do not fit."""
    if config.shares is not None:
        return FeatureShift(config.feature_dim)
    cls = lookup("input_projector", config.projector.name)
    return cls(_options(cls, "input_projector", config.projector), feature_dim=config.feature_dim, llm_dim=width)


def output_projector(config: OutputConfig, width: int) -> OutputProjector:
    """Fresh, for an LLM of that width; ConfigError if its options do not fit."""
    cls = lookup("output_projector", config.projector.name)
    spec = ConditionSpec(shapes={name: tuple(shape) for name, shape in config.condition.items()})
    options = _options(cls, "output_projector", config.projector)
    return cls(options, llm_dim=width, signal_tokens=config.signal_tokens, spec=spec)


def _options(cls: type[Any], kind: Kind, part: PartConfig) -> Config:
    try:
        return cls.config_class.from_dict(part.options)
    except ConfigError as error:
        raise ConfigError(f"options of the {kind} '{part.name}': {error}") from None


def load_encoder(config: SourcedPartConfig, find: Callable[[SourceConfig], Path]) -> Encoder:
    """The encoder in the directory that `find` gives for its source; CheckpointError if it is missing or not whole."""
    directory = find(config.source)
    if not directory.is_dir():
        raise CheckpointError(f"the encoder '{config.name}' is missing: there is no directory {directory}")
    with files_of(f"the encoder '{config.name}'", directory):
        return lookup("encoder", config.name).from_pretrained(directory, **config.options)


@contextmanager
def files_of(part: str, directory: Path) -> Iterator[None]:
    """Inside, a file that a part's own code, such as a plugin's, cannot open is told with the part.

    Raises:
        CheckpointError: there is one.
    """
    try:
        yield
    except AnyGenError:
        raise
    except OSError as error:
        raise CheckpointError(f"{part} cannot be read from {directory}: {error}") from error


def resolve_by_hub(name: str) -> Path:
    """The directory of "repo" or "repo@revision"; HubError if it cannot be had."""
    from anygen import hub

    return hub.resolve(name)
