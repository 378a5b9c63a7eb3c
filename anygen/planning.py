"""The first half of an answer: conversations in, plans out, by encoders, LLM and output projectors.

Shapes: M runs, S signal tokens of a run, D LLM width.
"""

import math
import secrets
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from anygen.decoding import Answer, DecodingConfig, Kept, Run, check_fits, collect, decode
from anygen.errors import ConfigError
from anygen.features import Condition, Features
from anygen.media import Media
from anygen.messages import Message, TextPart
from anygen.model import AnyGenModel
from anygen.prompts import Prompt
from anygen.reply import PlannedPart, Reply, ReplyPart, caption_of

_SEEDS = 2**63
_DRAWN_SEEDS = 2**31  # short enough to be typed again


def plan_batch(
    model: AnyGenModel,
    conversations: Sequence[list[Message]],
    seeds: Sequence[int],
    config: DecodingConfig,
    *,
    drawable: Collection[str],
    name: str,
    batch_size: int = 16,
    kept: Kept | None = None,
) -> list[Reply]:
    """B conversations -> B plans, all in one batch.

    Args:
        model: in evaluation mode.
        conversations: each ends with the message to be answered.
        seeds: one a conversation.
        config: how the LLM chooses its words.
        drawable: the modalities that a plan may hold.
        name: what the plans call the model.
        batch_size: media that go through an encoder together.
        kept: of the conversation's last turn, where there is one conversation.

    Raises:
        MessageError: a conversation is longer than the LLM reads.
        ModalityError: the model cannot read a modality.
    """
    clock = Clock()
    prompts = [model.prompts.prompt(messages) for messages in conversations]
    check_fits(model, prompts)
    media = read_media(model, prompts, batch_size=batch_size)
    if media:
        clock.lap("encoders")
    events = decode(model, prompts, media=media, config=config, seeds=seeds, drawable=drawable, kept=kept)
    answers = collect(events, len(prompts))
    asked = [messages[-1].text for messages in conversations]
    contents = _contents(model, answers, asked)
    clock.lap("llm")
    return [
        Reply(content=content, prompt=prompt, model=name, seed=seed, finish=answer.reason, timings=dict(clock.laps))
        for answer, content, prompt, seed in zip(answers, contents, asked, seeds, strict=True)
    ]


def read_media(model: AnyGenModel, prompts: Sequence[Prompt], *, batch_size: int = 16) -> dict[str, Features]:
    """modality -> the features of all media in the prompts, in reading order.

    Args:
        model: with an encoder for each modality.
        prompts: any number, with any number of media.
        batch_size: media that go through an encoder together, so that forty pictures need no more memory than these.
    """
    media: dict[str, list[Media]] = {}
    for part in (part for prompt in prompts for part in prompt.media):
        media.setdefault(part.modality, []).append(part.media)
    features = {}
    for modality, values in media.items():
        encoded: list[Features] = []
        for batch in chunks(len(values), batch_size):
            tensors = cast(Any, model.encoders[modality]).preprocess(values[batch])
            encoded.append(model.encode(modality, {name: t.to(model.device) for name, t in tensors.items()}))
        features[modality] = Features.cat(encoded)
    return features


@torch.no_grad()
def conditions_of(model: AnyGenModel, modality: str, states: Tensor) -> list[Condition]:
    """float[M, S, D] -> M conditions of one sample each, float32 on the CPU."""
    condition = model.project(modality, states).to("cpu", torch.float32)
    return [condition[row] for row in range(len(condition))]


def _contents(model: AnyGenModel, answers: Sequence[Answer], prompts: Sequence[str]) -> list[tuple[ReplyPart, ...]]:
    """What the LLM said -> contents of plans; the runs of all answers are projected together."""
    conditions: dict[str, Iterator[Condition]] = {}
    for modality in {run.modality for answer in answers for run in answer.runs}:
        states = [run.states for answer in answers for run in answer.runs if run.modality == modality]
        conditions[modality] = iter(conditions_of(model, modality, torch.stack(states)))
    contents: list[tuple[ReplyPart, ...]] = []
    for answer, prompt in zip(answers, prompts, strict=True):
        parts: list[ReplyPart] = []
        for part in answer.parts:
            if isinstance(part, Run):
                condition = next(conditions[part.modality])
                parts.append(PlannedPart(part.modality, condition, caption_of(parts, prompt)))
            else:
                parts.append(TextPart(part))
        contents.append(tuple(parts))
    return contents


class Clock:
    """Seconds by stage; a stage may be entered again."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Counts the time since the last lap to `stage`."""
        now = time.perf_counter()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - self._last
        self._last = now


def chunks(count: int, size: int) -> list[slice]:
    """The slices that cut `count` things into batches of `size`.

    Raises:
        ConfigError: `size` is not positive.
    """
    if size < 1:
        raise ConfigError(f"batch_size is at least 1, got {size}")
    return [slice(start, start + size) for start in range(0, count, size)]


def seeds_of(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed a prompt: drawn, the same for all, or as given.

    Raises:
        ConfigError: a seed is no whole number in range, or there are too few or too many.
    """
    if seed is None:
        return [secrets.randbelow(_DRAWN_SEEDS) for _ in range(count)]
    given = list(seed) if isinstance(seed, list | tuple | range) else [seed] * count
    if len(given) != count:
        raise ConfigError(f"{count} prompts need one seed or {count}, got {len(given)}")
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _SEEDS:
            raise ConfigError(f"a seed is a whole number from 0 to 2^63 - 1, got {value!r}")
    return cast(list[int], given)


def decoding_config(max_new_tokens: int, max_media: int, temperature: float, top_p: float) -> DecodingConfig:
    """The options of a call that decide how the LLM answers.

    Raises:
        ConfigError: one is out of range.
    """
    if max_media < 0:
        raise ConfigError(f"max_media is not negative, got {max_media}")
    return DecodingConfig(max_new_tokens=max_new_tokens, max_runs=max_media, temperature=temperature, top_p=top_p)


def places_of(plans: Sequence[Reply]) -> dict[str, list[tuple[int, int, int]]]:
    """modality -> (plan, part, seed) of all that is to be made."""
    places: dict[str, list[tuple[int, int, int]]] = {}
    for row, plan in enumerate(plans):
        index = 0
        for column, part in enumerate(plan.content):
            if isinstance(part, PlannedPart):
                places.setdefault(part.modality, []).append((row, column, plan.seed + index))
            index += not isinstance(part, TextPart)
    return places


def check_making(steps: int | None, seconds: float | None) -> None:
    """Refuses options of a call that no generator can follow.

    Raises:
        ConfigError: one is out of range.
    """
    if steps is not None and steps < 1:
        raise ConfigError(f"steps is at least 1, got {steps}")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ConfigError(f"seconds is a positive number, got {seconds:g}")


def asked_for(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}
