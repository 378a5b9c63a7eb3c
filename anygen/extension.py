"""What a user's package declares so that a model can be given a new sense, or a new way to answer.

A declaration is refused where it is made if a name is taken or a shape does not fit: the parts are built once, small
if the declaration says how, and tried on an example. `docs/new-modality.md` is the tutorial.

Source: the five facts of a modality in multi_token (token, data key, width, preprocess, encode), and their mirror image
for outputs, which no framework has (signal tokens, condition, target text encoder, generator).
Shapes: T feature tokens, C feature width, N prompt tokens of a feature token, S signal tokens, D LLM width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from anygen.config import Config
from anygen.encoders.base import Encoder
from anygen.errors import ConfigError, ModalityError
from anygen.features import ConditionSpec, Features
from anygen.generators.base import Generator
from anygen.media_base import MEDIA, Media, register_media
from anygen.model_config import PartConfig
from anygen.projectors.base import InputProjector, OutputProjector
from anygen.registry import Kind, load_plugins, lookup, register

_TRIED_WIDTH = 24
"""D while shapes are tried; no projector may hang on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputModality:
    """A modality that models can learn to read."""

    media: type[Media]
    """The class of its values, with its loader."""
    encoder: type[Encoder]
    """Built by `encoder(config)` and by `encoder.from_pretrained(directory)`."""
    name: str
    """Of the encoder, in the registry."""
    features: tuple[int, int]
    """(T, C) of one medium, by the encoder of `config`."""
    example: Callable[[], Media]
    """Makes the medium that the shapes are tried on."""
    config: Config | None = None
    """Of the encoder whose shapes are tried; its class's defaults if none."""
    weights: Path | None = None
    """Directory of a trained encoder that comes with the package."""
    projector: PartConfig = PartConfig(name="mlp", options={"tokens": 4, "layer_norm": True})
    """The input projector that a recipe trains if it names none."""
    questions: tuple[str, ...] = ("What is this?", "Name this.", "What do you see?", "What is it?")
    """What is asked about it in training."""
    answer: str = "This is {caption}."
    """What is answered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputModality:
    """A modality that models can learn to make."""

    media: type[Media]
    """The class of its values, with its writer."""
    generator: type[Generator]
    """Loaded by `generator.from_pretrained(directory)`; its `encode_text` gives the targets."""
    name: str
    """Of the generator, in the registry."""
    condition: dict[str, tuple[int, ...]]
    """What it is conditioned on: name -> shape without the batch axis."""
    example: Callable[[], Generator]
    """Makes the generator that the shapes are tried on; a small one will do."""
    weights: Path | None = None
    """Directory of a trained generator that comes with the package."""
    signal_tokens: int = 4
    """S, the tokens that stand for one medium."""
    projector: PartConfig = PartConfig(name="text_fc", options={"width": 128, "heads": 4, "ffn": 256})
    """The output projector that a recipe trains if it names none."""
    requests: tuple[str, ...] = field(default=("Make {caption}.", "I want {caption}.", "Can you make {caption}?"))
    """What is asked for in training."""
    talk: tuple[str, ...] = ()
    """Questions about such media that words answer, as "What is a melody?"; plain talk is mixed in anyway."""
    answer: str = "Here is {caption}."
    """What is said before the medium."""


_inputs: dict[str, InputModality] = {}
_outputs: dict[str, OutputModality] = {}


def register_input(declared: InputModality) -> InputModality:
    """Makes a modality's media and encoder known, if they fit.

    Raises:
        ConfigError: the modality or the encoder's name is taken, or a shape is not the declared one; says both.
    """
    modality = declared.media.modality
    encoder = declared.encoder(declared.config or declared.encoder.config_class())
    if encoder.modality != modality:
        raise ConfigError(f"the encoder '{declared.name}' reads {encoder.modality}, its media are {modality}")
    with torch.no_grad():
        made = encoder.eval()(**encoder.preprocess([declared.example()]))
    _same(f"features of the encoder '{declared.name}'", declared.features, tuple(made.values.shape[1:]))
    _same(f"feature_dim of the encoder '{declared.name}'", declared.features[1], encoder.feature_dim)
    _same(f"mask of the encoder '{declared.name}'", declared.features[:1], tuple(made.mask.shape[1:]))
    prompt_tokens(declared.projector, *declared.features)
    _take("encoder", declared.name, declared.encoder, declared.media)
    _inputs[modality] = declared
    return declared


def register_output(declared: OutputModality) -> OutputModality:
    """Makes a modality's media and generator known, if they fit.

    Raises:
        ConfigError: the modality or the generator's name is taken, or a shape is not the declared one; says both.
    """
    modality = declared.media.modality
    if declared.generator.modality != modality:
        raise ConfigError(
            f"the generator '{declared.name}' makes {declared.generator.modality}, its media are {modality}"
        )
    generator, wanted = declared.example(), {name: tuple(shape) for name, shape in declared.condition.items()}
    spec = {name: tuple(shape) for name, shape in generator.condition_spec.shapes.items()}
    _same(f"condition_spec of the generator '{declared.name}'", wanted, spec)
    with torch.no_grad():
        told = generator.encode_text(["an example", "another"])
    _same(f"encode_text of the generator '{declared.name}' for 2 captions", _batch(wanted), told_shapes(told.tensors))
    made_condition(declared.projector, declared.signal_tokens, wanted)
    _take("generator", declared.name, declared.generator, declared.media)
    _outputs[modality] = declared
    return declared


def input_modality(modality: str) -> InputModality:
    """What an installed plugin declared.

    Raises:
        ModalityError: none did; lists those that are declared.
    """
    return _declared(_inputs, modality, "read")


def output_modality(modality: str) -> OutputModality:
    """What an installed plugin declared.

    Raises:
        ModalityError: none did; lists those that are declared.
    """
    return _declared(_outputs, modality, "make")


def prompt_tokens(projector: PartConfig, tokens: int, width: int) -> int:
    """How many prompt tokens a projector makes of one medium's T features of width C.

    Raises:
        ConfigError: what it makes does not fit an LLM; says both shapes.
    """
    cls: type[InputProjector] = lookup("input_projector", projector.name)
    part = cls(cls.config_class.from_dict(projector.options), feature_dim=width, llm_dim=_TRIED_WIDTH).eval()
    with torch.no_grad():
        made = part(Features(torch.zeros(1, tokens, width), torch.ones(1, tokens, dtype=torch.bool)))
    wanted = (made.values.shape[1], _TRIED_WIDTH)
    _same(f"tokens of the input projector '{projector.name}' for an LLM of that width", wanted, made.values.shape[1:])
    _same(f"mask of the input projector '{projector.name}'", wanted[:1], made.mask.shape[1:])
    return int(made.values.shape[1])


def made_condition(projector: PartConfig, signal_tokens: int, condition: dict[str, tuple[int, ...]]) -> None:
    """Tries an output projector.

    Raises:
        ConfigError: what it makes is not the condition; says both shapes.
    """
    cls: type[OutputProjector] = lookup("output_projector", projector.name)
    spec = ConditionSpec(shapes=condition)
    options = cls.config_class.from_dict(projector.options)
    part = cls(options, llm_dim=_TRIED_WIDTH, signal_tokens=signal_tokens, spec=spec).eval()
    states = torch.zeros(2, signal_tokens, _TRIED_WIDTH)
    with torch.no_grad():
        made = part(states, states)
    _same(f"output projector '{projector.name}' for 2 runs", _batch(condition), told_shapes(made.tensors))


def told_shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """name -> shape."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _batch(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: (2, *shape) for name, shape in shapes.items()}


def _same(what: str, declared: Any, made: Any) -> None:
    declared, made = (tuple(v) if isinstance(v, torch.Size) else v for v in (declared, made))
    if declared != made:
        raise ConfigError(f"shapes do not fit: {what}: declared {declared}, made {made}")


def _take(kind: Kind, name: str, part: type[Any], media: type[Media]) -> None:
    """Both names or none."""
    new = media.modality not in MEDIA
    register_media(media)
    try:
        register(kind, name)(part)
    except ConfigError:
        if new:
            del MEDIA[media.modality]
        raise


def _declared(table: dict[str, Any], modality: str, what: str) -> Any:
    if modality not in table:
        load_plugins()
    if modality not in table:
        known = ", ".join(table) or "none"
        raise ModalityError(f"no installed plugin declares how to {what} '{modality}'; declared: {known}")
    return table[modality]
