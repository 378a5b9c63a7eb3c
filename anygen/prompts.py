"""Messages -> token ids, through the tokenizer's own chat template.

Media and signal tokens are not in the tokenizer's vocabulary: the template renders marks in their places, the text
is split at the marks, and only the text between is tokenised. A conversation without marks thus has the very ids
that `tokenizer.apply_chat_template` gives.

There are two views of a conversation. The *adapter view* has everything: the routes and signal runs of earlier
answers, and slots where media go in. The *base view*, for an answer of words by the untouched LLM, has the text
alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from anygen.errors import ConfigError, MessageError, ModalityError
from anygen.losses import IGNORED
from anygen.messages import MediaPart, Message, TextPart
from anygen.signal_tokens import MEDIA, WORDS, SignalTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "\ue000", "\ue001"
"""Around a mark; private-use characters, which no tokenizer strips and no template looks for."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for its answer."""

    ids: list[int]
    """The adapter view; a slot has the negative id of its modality."""
    base_ids: list[int]
    """The base view."""
    media: list[MediaPart]
    """The media parts whose slots stand in `ids`, in reading order."""
    holds_media: bool
    """Whether the message to be answered holds media, so that words alone cannot answer it."""


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation whose last answer is to be learned."""

    ids: list[int]
    """The adapter view, the answer and its end included."""
    labels: list[int]
    """The ids of the answer (route, text, first token of each run, end); -100 before it and where a run is forced."""
    media: list[MediaPart]
    """The media parts whose slots stand in `ids`, in reading order."""
    drawn: list[MediaPart]
    """The media parts of the answer, one a signal run, in reading order."""


class PromptBuilder:
    """Renders messages for one tokenizer and one set of modalities.

    Args:
        tokenizer: with a chat template.
        signal_tokens: the output modalities and their ids.
        slots: input modality -> N, the prompt tokens of one media value.
        around: input modality -> text before and behind its slots; none by default.
        routes: whether an answer begins with a route.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        signal_tokens: SignalTokens,
        slots: Mapping[str, int],
        *,
        around: Mapping[str, tuple[str, str]] | None = None,
        routes: bool = True,
    ) -> None:
        if not tokenizer.chat_template:
            raise ConfigError("the LLM's tokenizer has no chat template; anygen needs an instruction-tuned model")
        self.tokenizer, self.signal_tokens, self.slots = tokenizer, signal_tokens, dict(slots)
        self.around, self.routes = dict(around or {}), routes
        self._forced = {token for run in signal_tokens.runs.values() for token in run[1:]}

    def slot_id(self, modality: str) -> int:
        """The negative id of an input modality's slots: -1 for the first, -2 for the second."""
        return slot_ids(self.slots)[modality]

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """Both views of a conversation that ends with a message to be answered.

        Args:
            messages: the last is the one to be answered.

        Raises:
            MessageError: there is no message.
            ModalityError: a modality that the model cannot read; lists those that it can.
        """
        if not messages:
            raise MessageError("there is no message to answer")
        marks = _Marks(messages)
        text = self._render([self._with_media(messages, i, marks) for i in range(len(messages))])
        ids = self._tokenize(text, marks)
        base = self._render([{"role": m.role, "content": m.text} for m in messages])
        return Prompt(ids, self._tokenize(base, None), marks.slots, _asks_with_media(messages, len(messages)))

    def example(self, messages: Sequence[Message]) -> Example:
        """A conversation that ends with the answer to be learned, in the adapter view.

        The prompt is tokenised apart from the answer, as it will be when the answer is generated.

        Raises:
            MessageError: the last message is not the assistant's.
            ModalityError: as `prompt`.
        """
        if not messages or messages[-1].role != "assistant":
            raise MessageError("a conversation to learn from ends with the assistant's answer")
        prompt = self.prompt(messages[:-1])
        marks = _Marks(messages)
        turns = [self._with_media(messages, i, marks) for i in range(len(messages))]
        rendered = self._render(turns, ask=False)
        answer = rendered[rendered.rindex(marks.last_route) :]
        ids = self._tokenize(answer, marks)
        ends = {int(i) for i in [self.tokenizer.eos_token_id, *self._added_ends(answer)] if i is not None}
        stop = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
        ids = ids[:stop] if stop else [*ids, cast(int, self.tokenizer.eos_token_id)]
        return Example(
            prompt.ids + ids,
            [IGNORED] * len(prompt.ids) + [IGNORED if token in self._forced else token for token in ids],
            marks.slots,
            [part for part in messages[-1].parts if isinstance(part, MediaPart)],
        )

    def base_example(self, messages: Sequence[Message]) -> Example:
        """A conversation that ends with an answer of words, in the base view, in which the LLM says them.

        There is no route and no medium in it. The words have the ids that they have in the adapter view.

        Raises:
            MessageError: as `example`.
            ModalityError: as `prompt`.
        """
        whole, prompt = self.example(messages), self.prompt(messages[:-1])
        answer = whole.ids[len(prompt.ids) + int(self.routes) :]
        return Example(prompt.base_ids + answer, [IGNORED] * len(prompt.base_ids) + answer, [], [])

    def _with_media(self, messages: Sequence[Message], index: int, marks: "_Marks") -> dict[str, str]:
        message, signals = messages[index], self.signal_tokens
        content = ""
        if message.role == "assistant":
            by_media = self._routed_by_media(messages, index) if self.routes else None
            content += marks.route(signals, by_media=by_media)
        for part in message.parts:
            if isinstance(part, TextPart):
                content += part.text
            elif message.role == "assistant" and part.modality in signals.runs:
                content += marks.run(signals, part.modality)
            elif part.modality in self.slots:
                before, after = self.around.get(part.modality, ("", ""))
                content += before + marks.slot(part, self.slot_id(part.modality), self.slots[part.modality]) + after
            else:
                raise ModalityError(
                    f"the model cannot read {part.modality}; it reads {', '.join(['text', *self.slots])}"
                )
        return {"role": message.role, "content": content}

    def _routed_by_media(self, messages: Sequence[Message], index: int) -> bool:
        return any(isinstance(part, MediaPart) for part in messages[index].parts) or _asks_with_media(messages, index)

    def _render(self, turns: list[dict[str, str]], ask: bool = True) -> str:
        return cast(str, self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))

    def _tokenize(self, text: str, marks: "_Marks | None") -> list[int]:
        ids: list[int] = []
        for piece in marks.split(text) if marks else [text]:
            if isinstance(piece, list):
                ids += piece
            elif piece:
                ids += cast(list[int], self.tokenizer(piece, add_special_tokens=False)["input_ids"])
        return ids

    def _added_ends(self, answer: str) -> list[int]:
        """Special tokens that the template puts behind an answer, such as Gemma's `<end_of_turn>`."""
        tail = answer[answer.rfind(CLOSE) + 1 :]
        ids = cast(list[int], self.tokenizer(tail, add_special_tokens=False)["input_ids"])
        special = set(self.tokenizer.all_special_ids)
        return [token for token in ids if token in special][:1]


class _Marks:
    """What stands behind each mark of a rendered conversation."""

    def __init__(self, messages: Sequence[Message]) -> None:
        text = "".join(part.text for message in messages for part in message.parts if isinstance(part, TextPart))
        # a text that holds our marks must stay text
        self.name = next(str(n) for n in count() if f"{OPEN}{n}:" not in text)
        self.ids: list[list[int]] = []
        self.slots: list[MediaPart] = []
        self.last_route = ""

    def add(self, ids: list[int]) -> str:
        self.ids.append(ids)
        return f"{OPEN}{self.name}:{len(self.ids) - 1}{CLOSE}"

    def route(self, signals: SignalTokens, by_media: bool | None) -> str:
        """Marks where an answer begins; None puts no token there."""
        self.last_route = self.add([] if by_media is None else [signals.id(MEDIA if by_media else WORDS)])
        return self.last_route

    def run(self, signals: SignalTokens, modality: str) -> str:
        return self.add(list(signals.runs[modality]))

    def slot(self, part: MediaPart, slot_id: int, length: int) -> str:
        self.slots.append(part)
        return self.add([slot_id] * length)

    def split(self, text: str) -> list[str | list[int]]:
        """Text and the ids of marks in turn."""
        pieces: list[str | list[int]] = []
        for number, piece in enumerate(text.split(f"{OPEN}{self.name}:")):
            if number:
                mark, piece = piece.split(CLOSE, 1)
                pieces.append(self.ids[int(mark)])
            pieces.append(piece)
        return pieces


def slot_ids(slots: Mapping[str, int]) -> dict[str, int]:
    """Input modality -> the negative id of its slots, by its place in the configuration."""
    return {modality: -1 - index for index, modality in enumerate(slots)}


def _asks_with_media(messages: Sequence[Message], end: int) -> bool:
    """Whether the messages between the last answer before `end` and `end` hold media."""
    for message in reversed(messages[:end]):
        if message.role == "assistant":
            return False
        if any(isinstance(part, MediaPart) for part in message.parts):
            return True
    return False


def pad(
    sequences: Sequence[Sequence[int]], value: int, *, left: bool = False, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Lists of ids -> long[B, T] padded with `value`, and long[B, T], 1 where a token stands.

    `multiple` rounds T up, so that a compiled model meets fewer lengths.
    """
    length = max(len(sequence) for sequence in sequences)
    length = -(-length // multiple) * multiple
    ids = torch.full((len(sequences), length), value, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), None) if left else slice(len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask[row, place] = 1
    return ids, mask
