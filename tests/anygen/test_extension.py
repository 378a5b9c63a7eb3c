"""A declaration that does not fit is refused where it is made, and leaves nothing behind."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from anygen import extension, registry
from anygen.config import Config
from anygen.encoders.base import Encoder
from anygen.errors import ConfigError, ModalityError
from anygen.extension import InputModality, OutputModality, input_modality, register_input, register_output
from anygen.features import Condition, ConditionSpec, Features
from anygen.generators.base import Generator
from anygen.image import Image
from anygen.media_base import MEDIA, Media
from anygen.model_config import PartConfig
from anygen.registry import lookup


class Smell(Media):
    modality, suffixes = "smell", (".txt",)

    @classmethod
    def _decode(cls, data: bytes, name: str, limits: Any) -> "Smell":
        return cls()

    @classmethod
    def _convert(cls, value: object) -> "Smell":
        return cls()

    def _write(self, path: Any, suffix: str, metadata: Any) -> None:
        path.write_text("roses")


class Nose(Encoder):
    config_class = Config
    modality = "smell"
    width, tokens = 6, 2

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.feature_dim = self.width

    def preprocess(self, media: Any) -> dict[str, torch.Tensor]:
        return {"air": torch.zeros(len(media), self.tokens)}

    def forward(self, **tensors: torch.Tensor) -> Features:
        air = tensors["air"]
        return Features(air[..., None].expand(-1, -1, self.width), torch.ones_like(air, dtype=torch.bool))


class Perfume(Generator):
    modality = "smell"
    condition_spec = ConditionSpec(shapes={"notes": (2, 5)})
    told = (2, 5)

    @classmethod
    def from_pretrained(cls, directory: Any, *, device: Any = "cpu", dtype: Any = torch.float32) -> "Perfume":
        return cls()

    def save_pretrained(self, directory: Any) -> None: ...

    def to(self, device: Any) -> "Perfume":
        return self

    def encode_text(self, captions: Any) -> Condition:
        return Condition({"notes": torch.zeros(len(captions), *self.told)})

    def generate(self, condition: Condition, *, seeds: Any, **options: Any) -> list[Any]:
        return [Smell() for _ in seeds]

    def denoising_loss(self, condition: Condition, media: Any, *, generator: Any = None) -> Any: ...


INPUT = InputModality(media=Smell, encoder=Nose, name="nose", features=(2, 6), example=Smell)
OUTPUT = OutputModality(
    media=Smell,
    generator=Perfume,
    name="perfume",
    condition={"notes": (2, 5)},
    example=Perfume,
    projector=PartConfig(name="mlp", options={"width": 8}),
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(extension, "_inputs", {})
    monkeypatch.setattr(extension, "_outputs", {})
    media = dict(MEDIA)
    monkeypatch.setattr(registry, "_plugins_loaded", True)
    yield
    MEDIA.clear()
    MEDIA.update(media)


def test_what_fits_is_registered_whole() -> None:
    register_input(INPUT)
    register_output(OUTPUT)
    assert lookup("encoder", "nose") is Nose and lookup("generator", "perfume") is Perfume
    assert MEDIA["smell"] is Smell and input_modality("smell") is INPUT
    register_input(INPUT)  # a module run twice is no conflict


def variant(cls: type[Any], **attributes: Any) -> Any:
    return type(cls.__name__, (cls,), attributes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"features": (2, 7)},
            r"shapes do not fit: features of the encoder 'nose': declared \(2, 7\), made \(2, 6\)",
        ),
        ({"encoder": variant(Nose, tokens=3)}, r"features of the encoder 'nose': declared \(2, 6\), made \(3, 6\)"),
        (
            {"encoder": variant(Nose, modality="taste")},
            "the encoder 'nose' reads taste, its media are smell",
        ),
        (
            {
                "encoder": variant(
                    Nose, __init__=lambda self, config: (Nose.__init__(self), setattr(self, "feature_dim", 9))[0]
                )
            },
            r"feature_dim of the encoder 'nose': declared 6, made 9",
        ),
        (
            {
                "encoder": variant(
                    Nose, forward=lambda self, **air: replace(Nose.forward(self, **air), mask=torch.ones(1, 1).bool())
                )
            },
            r"mask of the encoder 'nose': declared \(2,\), made \(1,\)",
        ),
        ({"name": "imagebind"}, "the encoder name 'imagebind' is taken by anygen.encoders.imagebind:ImageBindEncoder"),
        ({"projector": PartConfig(name="nothing")}, "there is no input_projector called 'nothing'"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_and_leaves_nothing(change: dict[str, Any], told: str) -> None:
    with pytest.raises((ConfigError, KeyError), match=told):
        register_input(replace(INPUT, **change))
    assert "smell" not in MEDIA and ("encoder", "nose") not in registry._registered
    with pytest.raises(ModalityError, match="no installed plugin declares how to read 'smell'; declared: none"):
        input_modality("smell")


def test_an_input_projector_of_a_fixed_width_is_refused_with_both_shapes() -> None:
    from anygen.projectors.input import LinearProjector

    class Fixed(LinearProjector):
        def __init__(self, config: Any, *, feature_dim: int, llm_dim: int) -> None:
            super().__init__(config, feature_dim=feature_dim, llm_dim=4096)

    registry.register("input_projector", "fixed")(Fixed)
    with pytest.raises(
        ConfigError, match=r"tokens of the input projector 'fixed' .*: declared \(2, 24\), made \(2, 4096\)"
    ):
        register_input(replace(INPUT, projector=PartConfig(name="fixed")))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"condition": {"notes": (2, 4)}},
            r"condition_spec of the generator 'perfume': declared {'notes': \(2, 4\)}, made {'notes': \(2, 5\)}",
        ),
        (
            {"example": variant(Perfume, told=(3, 5))},
            r"encode_text .* for 2 captions: declared {'notes': \(2, 2, 5\)}, made {'notes': \(2, 3, 5\)}",
        ),
        ({"generator": variant(Perfume, modality="taste")}, "the generator 'perfume' makes taste, its media are smell"),
        ({"name": "zeroscope"}, "the generator name 'zeroscope' is taken by anygen.generators.zeroscope"),
    ],
)
def test_an_output_that_does_not_fit_is_refused_and_leaves_nothing(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        register_output(replace(OUTPUT, **change))
    assert "smell" not in MEDIA and ("generator", "perfume") not in registry._registered


def test_an_output_projector_that_makes_something_else_is_refused_with_both_shapes() -> None:
    from anygen.projectors.output import MLPOutputProjector

    class Short(MLPOutputProjector):
        def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> Condition:
            made = super().forward(states, embeddings)
            return Condition({name: value[:, :1] for name, value in made.tensors.items()})

    registry.register("output_projector", "short")(Short)
    with pytest.raises(ConfigError, match=r"output projector 'short' for 2 runs: declared .*2, 2, 5.*, made .*2, 1, 5"):
        register_output(replace(OUTPUT, projector=PartConfig(name="short", options={"width": 8})))


def test_a_modality_of_another_package_is_taken() -> None:
    picture = Image.from_any(np.zeros((2, 2, 3), np.uint8))
    other = variant(Smell, modality="image")
    with pytest.raises(ConfigError, match="the modality 'image' is taken by anygen.image.Image"):
        register_input(replace(INPUT, media=other, encoder=variant(Nose, modality="image")))
    assert MEDIA["image"] is type(picture)
