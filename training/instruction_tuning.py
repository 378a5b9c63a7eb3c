"""Instruction tuning on a user's conversations: many turns, media on both sides, text-only data mixed in by share.

    kind: instruction_tuning
    out: runs/instruction
    model: anygen-mini
    data: chat.jsonl
    text_data: text.jsonl
    text_share: 0.2

With `unfreeze: ["llm.*"]` and all projectors this is one-stage training of everything but encoders and generators
(SPHINX-X, arXiv:2402.05935); on a model with fresh projectors it skips pre-training (Cobra, arXiv:2403.14520).

Where answers have routes, words that answer words are the LLM's own, without its adapter: of such answers the route
alone is learned. Where the LLM's own weights train, the words are too, as they are said (`PromptBuilder.base_example`).

Source: MM-LLMs survey (arXiv:2401.13601) section 2.5; a share of text-only data, VILA (arXiv:2312.07533).
"""

import random
from dataclasses import dataclass
from pathlib import Path

from anygen.errors import ConfigError
from anygen.messages import MediaPart, Message
from anygen.model_config import AnyGenConfig
from anygen.training.chat_rows import check_fit, conversation
from anygen.training.data_rows import RowFault, Rows, Source, read
from anygen.training.stage import Prepared, StageRecipe
from anygen.training.stage_data import Item, Talk, item
from anygen.training.stage_run import run
from anygen.training.trainable import PARTS


@dataclass(frozen=True, kw_only=True, slots=True)
class InstructionTuningRecipe(StageRecipe):
    """Conversations in the chat format."""

    data: Source | tuple[Source, ...]
    """Rows `{"messages": […]}`, see `chat_rows`."""
    text_data: Source | tuple[Source, ...] | None = None
    """Conversations without media, mixed in."""
    text_share: float = 0.0
    """Of the conversations, how many are from `text_data`; VILA's finding is that some keep the LLM's skills."""
    all_turns: bool = True
    """Learns every answer of a conversation; without, the last."""

    def __post_init__(self) -> None:
        StageRecipe.__post_init__(self)
        if not 0 <= self.text_share < 1:
            raise ConfigError("text_share is a share, from 0 to less than 1")
        if bool(self.text_share) != bool(self.text_data):
            raise ConfigError("text_data and text_share go together: which conversations, and how many of all")


def prepare(recipe: InstructionTuningRecipe, config: AnyGenConfig) -> Prepared:
    """Reads and checks the conversations.

    Raises:
        ConfigError: too many rows do not fit.
    """

    def made(rows: Rows, number: int) -> Item:
        messages = conversation(rows, number)
        check_fit(messages, config)
        return item(rows, number, _always(messages), messages)

    def plain(rows: Rows, number: int) -> Item:
        messages = conversation(rows, number)
        if any(isinstance(part, MediaPart) for message in messages for part in message.parts):
            raise RowFault("it holds media, which text_data must not")
        return item(rows, number, _always(messages), messages)

    return Prepared(
        items=[one for source in sources(recipe.data) for one in read(source, made, recipe.bad_rows)],
        text=[one for source in sources(recipe.text_data) for one in read(source, plain, recipe.bad_rows)],
        share=recipe.text_share,
        all_turns=recipe.all_turns,
    )


def _always(messages: list[Message]) -> Talk:
    def talk(_: random.Random) -> list[Message]:
        return messages

    return talk


def sources(told: Source | tuple[Source, ...] | None) -> tuple[Source, ...]:
    """One source, several or none, as several."""
    if told is None:
        return ()
    return told if isinstance(told, tuple) else (told,)


def trains(recipe: InstructionTuningRecipe) -> list[str]:
    """What trains unless the recipe says otherwise."""
    return [part for part in PARTS if part != "llm" or recipe.peft.kind != "rows"]


def train(recipe: InstructionTuningRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/model`; result and errors as of `stage_run.run`, and as of `prepare`."""
    return run(recipe, out, lambda config: prepare(recipe, config), trains(recipe))
