"""Conversations -> batches of a stage: which answers are learned, their media's features, their media's conditions.

Shapes: B rows of a batch, T tokens, M media or runs of one modality in a batch.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from anygen.encoders.base import Encoder
from anygen.features import Features
from anygen.losses import IGNORED
from anygen.messages import MediaPart, Message
from anygen.prompts import PromptBuilder, pad
from anygen.signal_tokens import WORDS
from anygen.training.caches import TensorCache
from anygen.training.chat_rows import Shown, shown
from anygen.training.data_rows import Rows

Talk = Callable[[random.Random], list[Message]]
"""Makes one conversation; of the same random numbers always the same."""


@dataclass(frozen=True, slots=True)
class Item:
    """One conversation of the training data."""

    talk: Talk
    source: str
    """The file that it is from."""
    place: int
    """Where in it, in `unit`s."""
    unit: str = "row"
    media: tuple[tuple[str, Shown], ...] = ()
    """What is read, by modality."""
    captions: tuple[tuple[str, str], ...] = ()
    """What is made, by modality."""
    length: int = 0
    """About how long it is, where it is not always the same."""
    with_media: bool = False
    """Whether an answer's medium itself is there, beside its caption."""

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.source}, {self.unit} {self.place}"


def item(rows: Rows, number: int, talk: Talk, messages: Sequence[Message], *, length: int = 0) -> Item:
    """An item of row `number`; `messages` is one conversation of it, for its media."""
    parts = [(m.role, part) for m in messages for part in m.parts if isinstance(part, MediaPart)]
    return Item(
        talk=talk,
        source=rows.name,
        place=rows.place(number),
        unit=rows.unit,
        media=tuple((part.modality, shown(part)) for role, part in parts if role != "assistant"),
        captions=tuple((part.modality, str(shown(part).caption)) for role, part in parts if role == "assistant"),
        length=length,
        with_media=any(role == "assistant" and bool(shown(part).key) for role, part in parts),
    )


@dataclass(frozen=True, slots=True)
class Learned:
    """A conversation as tokens, with every answer that is to be learned."""

    ids: list[int]
    labels: list[int]
    """-100 where nothing is learned."""
    read: list[MediaPart]
    """The media of slots, in reading order."""
    made: list[MediaPart]
    """The media of runs, in reading order, earlier answers' included."""
    base_ids: list[int] = field(default_factory=list)
    """The conversation in the base view, up to the last answer whose words the LLM learns without its adapter."""
    base_labels: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of both views."""
        return len(self.ids) + len(self.base_ids)


def learn(prompts: PromptBuilder, messages: Sequence[Message], *, own_words: bool, all_turns: bool = True) -> Learned:
    """A conversation and what is learned of it.

    Args:
        prompts: of the model.
        messages: the last is the assistant's.
        own_words: whether the words of an answer by `<|words|>` are learned, in the base view, in which the LLM says
            them. Without, its route alone is: what follows is the untouched LLM's own.
        all_turns: whether earlier answers are learned as well, where they are tokenised as they would be generated.
    """
    ends = [end for end in range(2, len(messages)) if messages[end - 1].role == "assistant"] if all_turns else []
    ends.append(len(messages))
    examples = {end: prompts.example(list(messages[:end])) for end in ends}
    last = examples[len(messages)]
    ids, labels = _in_one([(one.ids, _answer(prompts, one.labels)) for one in examples.values()])
    plain = [end for end, one in examples.items() if own_words and prompts.routes and _by_words(prompts, one.labels)]
    base = [prompts.base_example(list(messages[:end])) for end in plain]
    base_ids, base_labels = _in_one([(one.ids, one.labels) for one in base]) if base else ([], [])
    made = [
        part
        for message in messages
        if message.role == "assistant"
        for part in message.parts
        if isinstance(part, MediaPart) and part.modality in prompts.signal_tokens.runs
    ]
    return Learned(ids, labels, last.media, made, base_ids, base_labels)


def _in_one(answers: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]]:
    """Ids and labels of longer and longer beginnings -> the last, with the labels of those that it begins with."""
    ids, labels = answers[-1][0], list(answers[-1][1])
    for earlier, learned in answers[:-1]:
        if ids[: len(earlier)] == earlier:
            labels[: len(earlier)] = [own if own != IGNORED else old for own, old in zip(learned, labels, strict=False)]
    return ids, labels


def _by_words(prompts: PromptBuilder, labels: Sequence[int]) -> bool:
    return prompts.signal_tokens.id(WORDS) in labels


def _answer(prompts: PromptBuilder, labels: Sequence[int]) -> list[int]:
    """Of an answer by `<|words|>` the route alone."""
    if not prompts.routes or not _by_words(prompts, labels):
        return list(labels)
    return [label if label == prompts.signal_tokens.id(WORDS) else IGNORED for label in labels]


class Mixed(Dataset[dict[str, Any]]):
    """Items in the order of training, a share of them from text-only data; number `n` is always the same.

    Items are drawn without replacement, pass after pass. Of every `window` batches the items are sorted by length, so
    that a batch holds rows of about one length and little is padded.

    Args:
        items: the main data.
        text: text-only data, mixed in.
        share: of text-only items.
        count: how many items there are in all.
        batch_size: B.
        window: batches that are sorted together; 1 sorts nothing.
        lengths: item -> about how long it is; None sorts nothing.
        seed: of order and wording.
    """

    def __init__(
        self,
        items: Sequence[Item],
        make: Callable[[list[Message]], Learned],
        *,
        count: int,
        batch_size: int,
        seed: int,
        text: Sequence[Item] = (),
        share: float = 0.0,
        window: int = 16,
        lengths: Callable[[Item], int] | None = None,
    ) -> None:
        self.items, self.text, self.make, self.seed = items, text, make, seed
        rng = random.Random(f"{seed}/order")
        streams = [_endless(len(source), rng) for source in (items, text)]
        order: list[tuple[Item, int]] = []
        for number in range(count):
            of_text = bool(text) and (not items or rng.random() < share)
            order.append(((text if of_text else items)[next(streams[of_text])], number))
        if lengths is not None and window > 1:
            order = _bucketed(order, lambda entry: lengths(entry[0]), batch_size, window, rng)
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> dict[str, Any]:
        item, draw = self.order[number]
        return {"learned": self.make(item.talk(random.Random(f"{self.seed}/{draw}")))}

    def told(self, number: int) -> str:
        """Item `number` in words."""
        return self.order[number][0].where


def _endless(count: int, rng: random.Random) -> Any:
    while True:
        order = list(range(count))
        rng.shuffle(order)
        yield from order


def _bucketed(
    order: list[Any], length: Callable[[Any], int], batch_size: int, window: int, rng: random.Random
) -> list[Any]:
    sorted_order: list[Any] = []
    for first in range(0, len(order), batch_size * window):
        part = sorted(order[first : first + batch_size * window], key=length)
        batches = [part[row : row + batch_size] for row in range(0, len(part), batch_size)]
        rng.shuffle(batches)
        sorted_order += [item for batch in sorted(batches, key=lambda b: len(b) < batch_size) for item in batch]
    return sorted_order


class Collator:
    """Learned conversations -> the arguments of `AnyGenModel.forward`, and beside them what the trainer wants.

    Args:
        features: input modality -> cache of features by medium.
        encoders: input modality -> encoder that runs in the model, whose media are read from their files each time.
        conditions: output modality -> cache of conditions by caption.
        pictures: output modalities whose media are read as well, for the diffusion loss.
        words: whether there is an LM loss.
        own_words: whether words are learned in the base view as well. Then every batch has a row of it, if need be
            one of which nothing is learned: all processes run the LLM as often.
    """

    def __init__(
        self,
        features: Mapping[str, TensorCache],
        conditions: Mapping[str, TensorCache],
        *,
        encoders: Mapping[str, Encoder] | None = None,
        pictures: Sequence[str] = (),
        words: bool = True,
        own_words: bool = False,
    ) -> None:
        self.features, self.conditions, self.encoders = features, conditions, dict(encoders or {})
        self.pictures, self.words, self.own_words = pictures, words, own_words

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """B items -> `input_ids`, `attention_mask`, `labels` long[B, T]; `words`; `media`, `conditions` by modality;
        and for the diffusion loss `pictures`: modality -> (run numbers, media)."""
        learned: list[Learned] = [item["learned"] for item in items]
        ids, mask = pad([one.ids for one in learned], 0)
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.words:
            batch["labels"], _ = pad([one.labels for one in learned], IGNORED)
        if self.words and self.own_words:
            batch["words"] = base_rows(learned)
        read = _by_modality(part for one in learned for part in one.read)
        if read:
            batch["media"] = {modality: self._media(modality, media) for modality, media in read.items()}
        made = _by_modality(part for one in learned for part in one.made)
        wanted = {modality: media for modality, media in made.items() if modality in self.conditions}
        if wanted:
            batch["conditions"] = {
                modality: self.conditions[modality].rows([str(medium.caption) for medium in media])
                for modality, media in wanted.items()
            }
        pictures = {}
        for modality in self.pictures:
            there = [(number, medium) for number, medium in enumerate(made.get(modality, [])) if medium.key]
            if there:
                pictures[modality] = ([n for n, _ in there], [medium.load(modality) for _, medium in there])
        return batch | ({"pictures": pictures} if pictures else {})

    def _media(self, modality: str, media: Sequence[Shown]) -> Any:
        if modality in self.encoders:
            return self.encoders[modality].preprocess([medium.load(modality) for medium in media])
        return as_features(self.features[modality].rows([medium.key for medium in media]))


def base_rows(learned: Sequence[Learned]) -> dict[str, Tensor]:
    """What `AnyGenModel.forward` takes as `words`; of none one row of which nothing is learned."""
    rows = [one for one in learned if one.base_ids] or [Learned([], [], [], [], [0], [IGNORED])]
    ids, mask = pad([one.base_ids for one in rows], 0)
    labels, _ = pad([one.base_labels for one in rows], IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def as_features(kept: Mapping[str, Tensor]) -> Features:
    """A cache's rows, `values` float[M, T, C] and `mask` bool[M, T], as `forward` takes them."""
    return Features(kept["values"], kept["mask"])


def _by_modality(parts: Any) -> dict[str, list[Shown]]:
    found: dict[str, list[Shown]] = {}
    for part in parts:
        found.setdefault(part.modality, []).append(shown(part))
    return found


def arguments(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Of a batch what `AnyGenModel.forward` takes."""
    names = ("input_ids", "attention_mask", "labels", "media", "conditions", "words")
    return {name: batch[name] for name in names if name in batch}


def to(value: Any, device: torch.device) -> Any:
    """Tensors and features, however deep, moved."""
    if isinstance(value, Features):
        return Features(value.values.to(device), value.mask.to(device))
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to(inner, device) for key, inner in value.items()}
    return value
