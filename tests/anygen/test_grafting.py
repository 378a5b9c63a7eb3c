"""A model that is given a modality does all that it did before, bit by bit, and comes back whole from disk."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from anygen import registry
from anygen.config import Config
from anygen.encoders.base import Encoder
from anygen.errors import ConfigError, UnknownComponentError
from anygen.features import Condition, ConditionSpec, Features
from anygen.generators.base import Generator
from anygen.grafting import add_input, add_output
from anygen.messages import MediaPart, Message, TextPart
from anygen.model import AnyGenModel
from anygen.model_config import PartConfig
from anygen.pipeline import AnyGenPipeline
from anygen.saving import save_model

MLP = PartConfig(name="mlp", options={"tokens": 3})
OUT = PartConfig(name="mlp", options={"width": 8})


@dataclass(frozen=True, kw_only=True, slots=True)
class ThermometerConfig(Config):
    width: int = 5


class Thermometer(Encoder):
    config_class = ThermometerConfig
    modality = "warmth"

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config, self.feature_dim = config or ThermometerConfig(), 5
        self.spread = torch.nn.Linear(1, 5)

    def preprocess(self, media: Any) -> dict[str, torch.Tensor]:
        return {"degrees": torch.tensor([[float(m)] for m in media])}

    def forward(self, **tensors: torch.Tensor) -> Features:
        degrees = tensors["degrees"]
        return Features(self.spread(degrees)[:, None], torch.ones(len(degrees), 1, dtype=torch.bool))


class Oven(Generator):
    modality = "warmth"
    condition_spec = ConditionSpec(shapes={"degrees": (2, 3)})

    @classmethod
    def from_pretrained(cls, directory: Any, *, device: Any = "cpu", dtype: Any = torch.float32) -> "Oven":
        assert (Path(directory) / "oven.txt").exists()
        return cls()

    def save_pretrained(self, directory: Any) -> None:
        Path(directory).mkdir(parents=True)
        (Path(directory) / "oven.txt").write_text("hot")

    def to(self, device: Any) -> "Oven":
        return self

    def encode_text(self, captions: Any) -> Condition:
        return Condition({"degrees": torch.ones(len(captions), 2, 3)})

    def generate(self, condition: Condition, *, seeds: Any, **options: Any) -> list[Any]:
        return [float(seed) for seed in seeds]

    def denoising_loss(self, condition: Condition, media: Any, *, generator: Any = None) -> Any: ...


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registered for one test."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry.register("encoder", "thermometer")(Thermometer)
    registry.register("generator", "oven")(Oven)
    yield


def picture_prompt(model: AnyGenModel) -> dict[str, Any]:
    said: Any = MediaPart("image", None)  # type: ignore[arg-type]
    messages = [Message("user", (TextPart("What is this?"), said)), Message("assistant", (TextPart("Here."), said))]
    example = model.prompts.example(messages)
    return {
        "input_ids": torch.tensor([example.ids]),
        "labels": torch.tensor([example.labels]),
        "media": {"image": torch.linspace(-1, 1, 6).view(1, 1, 6)},
        "conditions": {"image": {"prompt_embeds": torch.zeros(1, 5, 8)}},
    }


@pytest.mark.parametrize("tied", [True, False])
def test_what_was_there_stays_and_what_is_new_is_read_and_made(
    tiny_model: Callable[..., AnyGenModel], tied: bool
) -> None:
    model = tiny_model(adapter=True, tie_word_embeddings=tied)
    with torch.no_grad():
        before = model(**picture_prompt(model))
        rows = model.signal_tokens.rows.clone()
        add_input(model, Thermometer(), tokens=1, projector=MLP)
        add_output(model, Oven(), signal_tokens=2, projector=OUT)
        after = model(**picture_prompt(model))
    torch.testing.assert_close(after.hidden_states, before.hidden_states, rtol=0, atol=0)
    torch.testing.assert_close(after.alignment_loss, before.alignment_loss, rtol=0, atol=0)
    torch.testing.assert_close(model.signal_tokens.rows[: len(rows)], rows, rtol=0, atol=0)
    assert model.signal_tokens.strings[-2:] == ["<|warmth_0|>", "<|warmth_1|>"]
    assert model.settings.slots == {"image": 2, "warmth": 3}
    warm: Any = MediaPart("warmth", 20.0)  # type: ignore[arg-type]
    example = model.prompts.example([Message("user", (warm,)), Message("assistant", (TextPart("Here."), warm))])
    with torch.no_grad():
        output = model(torch.tensor([example.ids]), media=model.encode_parts(example.media))
        made = model.run_conditions("warmth", torch.tensor([example.ids]), output.hidden_states)
    assert made.tensors["degrees"].shape == (1, 2, 3)


def test_new_rows_are_lent_by_those_that_the_model_knows(tiny_model: Callable[..., AnyGenModel]) -> None:
    model = tiny_model()
    add_output(model, Oven(), signal_tokens=2, projector=OUT)
    signals = model.signal_tokens
    for place in range(2):
        lenders = [signals.rows[signals.runs[m][place] - signals.vocab_size] for m in ("image", "audio")]
        own = signals.rows[signals.runs["warmth"][place] - signals.vocab_size]
        mean = torch.stack(lenders).mean(0)
        assert (own - mean).norm() < 0.5 * (lenders[0] - mean).norm()


def test_a_modality_is_not_added_twice_and_parts_are_registered(tiny_model: Callable[..., AnyGenModel]) -> None:
    model = add_output(
        add_input(tiny_model(), Thermometer(), tokens=1, projector=MLP), Oven(), signal_tokens=2, projector=OUT
    )
    with pytest.raises(ConfigError, match="the model reads warmth already; it reads image, warmth"):
        add_input(model, Thermometer(), tokens=1, projector=MLP)
    with pytest.raises(ConfigError, match="the model makes warmth already; it makes image, audio, warmth"):
        add_output(model, Oven(), signal_tokens=2, projector=OUT)
    stranger = type("Stranger", (Thermometer,), {"modality": "cold"})
    with pytest.raises(
        UnknownComponentError, match=r"Stranger is not registered; decorate it with @register\('encoder'"
    ):
        add_input(model, stranger(), tokens=1, projector=MLP)


def test_the_same_seed_gives_the_same_parts_and_leaves_the_callers_random_numbers_alone(
    tiny_model: Callable[..., AnyGenModel],
) -> None:
    made = []
    for _ in range(2):
        model = tiny_model()
        torch.manual_seed(5)
        add_input(model, Thermometer(), tokens=1, projector=MLP, seed=1)
        made.append((model.input_projectors["warmth"].state_dict(), torch.rand(3)))
    # the encoder drew from the caller's numbers, both times alike
    for key, value in made[0][0].items():
        torch.testing.assert_close(value, made[1][0][key], rtol=0, atol=0)
    torch.testing.assert_close(made[0][1], made[1][1], rtol=0, atol=0)


def test_a_grafted_model_comes_back_from_disk_with_all_its_parts(tiny_directory: Path, tmp_path: Path) -> None:
    model = AnyGenModel.from_pretrained(tiny_directory)
    add_input(model, Thermometer(), tokens=1, projector=MLP)
    add_output(model, Oven(), signal_tokens=2, projector=OUT)
    save_model(tmp_path / "grafted", model, {"warmth": Oven()})
    again = AnyGenPipeline.from_pretrained(tmp_path / "grafted", device="cpu")
    warm: Any = MediaPart("warmth", 21.0)  # type: ignore[arg-type]
    ids = torch.tensor([model.prompts.prompt([Message("user", (TextPart("What?"), warm))]).ids])
    with torch.no_grad():
        hidden = [m(ids, media=m.encode_parts([warm])).hidden_states for m in (model.eval(), again.model)]
    torch.testing.assert_close(hidden[0], hidden[1], rtol=0, atol=0)
    assert isinstance(again.generator("warmth"), Oven) and "audio" in again.generators
    torch.testing.assert_close(again.model.signal_tokens.rows, model.signal_tokens.rows, rtol=0, atol=0)
    save_model(tmp_path / "again", again.model, again.generators)
    for path in sorted((tmp_path / "grafted").rglob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "grafted")).read_bytes()
