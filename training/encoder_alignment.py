"""Encoder alignment on a user's media with captions: the input projector learns to say what the encoder saw.

    kind: encoder_alignment
    out: runs/encoder
    model: anygen-mini
    data: {image: pictures.jsonl}

Source: MM-LLMs survey (arXiv:2401.13601) eq. 2; LLaVA's first stage (arXiv:2304.08485): LLM frozen, many questions.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anygen.errors import ConfigError, ModalityError
from anygen.extension import input_modality
from anygen.messages import Message, TextPart
from anygen.model_config import AnyGenConfig
from anygen.training.chat_rows import Shown, captioned, media_part
from anygen.training.data_rows import Rows, Source, read
from anygen.training.stage import Prepared, StageRecipe
from anygen.training.stage_data import Item, item
from anygen.training.stage_run import run

QUESTIONS: dict[str, tuple[str, ...]] = {
    "image": ("What is in this picture?", "Describe the picture.", "What is this?", "What do you see?"),
    "video": ("What happens in this clip?", "Describe the clip.", "What is this?", "What do you see?"),
    "audio": ("What is this sound?", "Describe the sound.", "What is this?", "What do you hear?"),
}
"""What is asked where neither the recipe nor a plugin says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderAlignmentRecipe(StageRecipe):
    """Media with captions, one source for each input modality."""

    data: dict[str, Source]
    """Input modality -> rows `{MODALITY: file, "caption": words}`."""
    questions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Input modality -> what is asked; one of them, before or behind the medium, for each row."""
    answer: str = "{caption}"
    """With {caption} in it."""

    def __post_init__(self) -> None:
        StageRecipe.__post_init__(self)
        if not self.data:
            raise ConfigError("data names no modality, as in data: {image: pictures.jsonl}")
        if "{caption}" not in self.answer:
            raise ConfigError(f"answer must say the caption, as in 'This is {{caption}}.', got '{self.answer}'")


def prepare(recipe: EncoderAlignmentRecipe, config: AnyGenConfig) -> Prepared:
    """Reads and checks the rows.

    Raises:
        ConfigError: the model does not read a modality, or too many rows do not fit.
    """
    items: list[Item] = []
    for modality, source in recipe.data.items():
        if modality not in config.inputs:
            raise ConfigError(f"data: the model does not read {modality}, only {', '.join(config.inputs) or 'text'}")
        asked = recipe.questions.get(modality) or questions(modality)
        parse = captioned(modality)

        def made(
            rows: Rows, number: int, modality: str = modality, asked: tuple[str, ...] = asked, parse: Any = parse
        ) -> Item:
            medium: Shown = parse(rows, number)

            def talk(rng: random.Random) -> list[Message]:
                parts: list[Any] = [TextPart(rng.choice(asked)), media_part(modality, medium)]
                parts = parts if rng.random() < 0.5 else parts[::-1]
                said = recipe.answer.replace("{caption}", str(medium.caption))
                return [Message("user", tuple(parts)), Message("assistant", (TextPart(said),))]

            return item(rows, number, talk, talk(random.Random(0)), length=len(str(medium.caption)) // 4)

        items += read(source, made, recipe.bad_rows)
    return Prepared(items, exact=False)


def questions(modality: str) -> tuple[str, ...]:
    """What is asked about media of a modality: the plugin's own questions, if one declares it."""
    try:
        declared = input_modality(modality).questions
    except ModalityError:
        declared = ()
    return declared or QUESTIONS.get(modality, ("What is this?", "Describe this."))


def trains(recipe: EncoderAlignmentRecipe) -> list[str]:
    """What trains unless the recipe says otherwise."""
    return [f"input_projectors.{modality}" for modality in recipe.data]


def train(recipe: EncoderAlignmentRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/model`; result and errors as of `stage_run.run`, and as of `prepare`."""
    return run(recipe, out, lambda config: prepare(recipe, config), trains(recipe))
