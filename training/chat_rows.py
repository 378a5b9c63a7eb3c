"""The chat format of data: conversations whose media are named, not read, and whose answers say what is to be made.

    {"messages": [
        {"role": "user", "content": [{"type": "image", "image": "guitar.png"}, {"type": "text", "text": "Play this."}]},
        {"role": "assistant", "content": ["Here it is.", {"type": "audio", "caption": "an acoustic guitar, one chord"}]}
    ]}

It is that of prompts (`anygen.messages`). A medium in an answer needs a caption, which is what the LLM learns to ask a
generator for; its file is needed only where the diffusion loss is trained. A medium without value is the next one of
the row's column `images`, `videos` or `audios`, and `messages` may be a string of JSON, as in tables.

Two shorter forms: `{"image": "guitar.png", "caption": "a guitar"}` for encoders, `{"caption": "a guitar"}` for
decoders; one more for preferences: `{"prompt": [messages], "chosen": [message], "rejected": [message]}`, as in TRL.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from anygen.errors import AnyGenError
from anygen.media import Media, media_type
from anygen.messages import MediaPart, Message, Part, Role, TextPart
from anygen.model_config import AnyGenConfig
from anygen.training.data_rows import RowFault, Rows

_CHAT = '{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}'
_PREFERENCE = (
    '{"prompt": [{"role": "user", "content": …}], "chosen": [{"role": "assistant", "content": …}], '
    '"rejected": [{"role": "assistant", "content": …}]}'
)


@dataclass(frozen=True, slots=True)
class Shown:
    """A medium of a row; a part's `media` until it is read."""

    caption: str | None = None
    """What it shows, in words."""
    key: str = ""
    """Tells it from others: a path with size and time, or a digest. Empty: there is a caption alone."""
    path: Path | None = None
    """Its file."""
    rows: Rows | None = None
    """The rows that hold its bytes, if no file does."""
    row: int = 0
    place: str = ""
    """Which of the row's media it is, by its digest."""

    def load(self, modality: str) -> Media:
        """Reads it.

        Raises:
            MediaError: it cannot be decoded.
            RowFault: the row has changed since.
        """
        if self.path is not None:
            return media_type(modality).from_path(self.path)
        if self.rows is None:
            raise RowFault("there is a caption, but no medium")
        for _, data in _data_of(self.rows[self.row]):
            if hashlib.sha256(data).hexdigest() == self.place:
                return media_type(modality).from_bytes(data)
        raise RowFault(f"{self.rows.name}: row {self.rows.place(self.row)} has changed while it was in use")


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one conversation, the first of which is preferred."""

    prompt: list[Message]
    chosen: Message
    rejected: Message


def shown(part: MediaPart) -> Shown:
    """What stands for a part's medium in conversations of this module."""
    return cast(Shown, part.media)


def media_part(modality: str, medium: Shown) -> MediaPart:
    """A part that holds `medium` in a medium's stead."""
    return MediaPart(modality, cast(Any, medium))


def conversation(rows: Rows, number: int) -> list[Message]:
    """A row's messages, the last one the assistant's, one before it the user's.

    Raises:
        RowFault: it is not of the chat format, or a file is missing.
    """
    row = rows[number]
    if "messages" not in row:
        raise RowFault(f"it has no 'messages'; wanted: {_CHAT}")
    messages = _messages(row["messages"], _Row(rows, number, row), "messages", _CHAT)
    if messages[-1].role != "assistant":
        raise RowFault(f"its last message is the {messages[-1].role}'s; it has to be an answer, the assistant's")
    if all(message.role != "user" for message in messages):
        raise RowFault("it has no message of the user that its answer could be to")
    return messages


def preference(rows: Rows, number: int) -> Preference:
    """A row's prompt and its two answers. Raises as `conversation`."""
    row = rows[number]
    if lacking := [key for key in ("prompt", "chosen", "rejected") if key not in row]:
        raise RowFault(f"it has no '{lacking[0]}'; wanted: {_PREFERENCE}")
    at = _Row(rows, number, row)
    prompt = _messages(row["prompt"], at, "prompt", _PREFERENCE)
    if prompt[-1].role != "user":
        raise RowFault(f"its prompt ends with the {prompt[-1].role}'s message, not with the user's")
    answers = []
    for key in ("chosen", "rejected"):
        (*more, answer) = _messages(row[key], at, key, _PREFERENCE)
        if more or answer.role != "assistant":
            raise RowFault(f"its '{key}' must be one message of the assistant")
        answers.append(answer)
    if answers[0] == answers[1]:
        raise RowFault("its two answers are the same")
    return Preference(prompt, *answers)


def captioned(modality: str, *, medium: bool = True) -> Any:
    """A parser of rows with a caption and, if `medium`, the medium that it belongs to; gives `Shown`."""

    def parse(rows: Rows, number: int) -> Shown:
        row = rows[number]
        words = row.get("caption")
        if not isinstance(words, str) or not words.strip():
            raise RowFault("it has no caption")
        words = " ".join(words.split())
        if not medium and modality not in row and not row.get("members"):
            return Shown(caption=words)
        value = row.get(modality)
        if value is None and (members := row.get("members")):
            suffixes = [suffix.lstrip(".") for suffix in media_type(modality).suffixes]
            value = next((data for name, data in members.items() if name.split(".")[-1] in suffixes), None)
            value = value if value is not None or len(members) != 1 else next(iter(members.values()))
        if value is None:
            if not medium:
                return Shown(caption=words)
            raise RowFault(f"it has no '{modality}'")
        return _shown(value, words, _Row(rows, number, row))

    return parse


def check_fit(messages: list[Message], settings: AnyGenConfig) -> None:
    """Whether a model can learn from a conversation.

    Raises:
        RowFault: a medium is of a modality that the model does not read or make, or lacks what is needed.
    """
    for message in messages:
        for part in message.parts:
            if not isinstance(part, MediaPart):
                continue
            if message.role == "assistant" and part.modality in settings.outputs:
                if shown(part).caption is None:
                    raise RowFault(f"the {part.modality} in its answer has no caption")
            elif message.role == "assistant":
                raise RowFault(f"the model does not make {part.modality}, only {', '.join(settings.outputs) or 'text'}")
            elif part.modality not in settings.inputs:
                raise RowFault(f"the model does not read {part.modality}, only {', '.join(settings.inputs) or 'text'}")
            elif not shown(part).key:
                raise RowFault(f"the {part.modality} in its question is a caption alone")


@dataclass(frozen=True, slots=True)
class _Row:
    rows: Rows
    number: int
    raw: Mapping[str, Any]
    taken: dict[str, int] = field(default_factory=dict)
    """How many media of each column have found their places."""

    def next(self, kind: str) -> Any:
        """The next medium of the column `images`, `videos` or `audios`; None if there is none."""
        column = self.raw.get(f"{kind}s")
        place = self.taken.get(kind, 0)
        self.taken[kind] = place + 1
        return column[place] if isinstance(column, list) and place < len(column) else None


def _messages(value: Any, at: _Row, key: str, wanted: str) -> list[Message]:
    """The messages that a row's `key` holds; `wanted` is what such a row looks like."""
    if isinstance(value, str):  # as tables have it whose columns cannot mix kinds
        try:
            value = json.loads(value)
        except ValueError:
            raise RowFault(f"its '{key}' is a string that is no JSON; wanted: {wanted}") from None
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowFault(f"its '{key}' is {type(value).__name__ if value else 'empty'}; wanted: {wanted}")
    of = "" if key == "messages" else f" of '{key}'"
    return [_message(one, f"message {place}{of}", at) for place, one in enumerate(value, start=1)]


def _message(value: Any, where: str, at: _Row) -> Message:
    if not isinstance(value, Mapping) or "role" not in value or "content" not in value:
        raise RowFault(f"{where} lacks 'role' or 'content'")
    role, content = value["role"], value["content"]
    if role not in get_args(Role):
        raise RowFault(f"{where} has the unknown role '{str(role)[:40]}'; known: {', '.join(get_args(Role))}")
    items = content if isinstance(content, list) else [content]
    parts = [part for item in items if (part := _part(item, where, at)) != TextPart("")]
    if not any(isinstance(part, MediaPart) or part.text.strip() for part in parts):
        raise RowFault(f"{where} is empty")
    return Message(role, tuple(parts))


def _part(item: Any, where: str, at: _Row) -> Part:
    if isinstance(item, str):
        return TextPart(item)
    if not isinstance(item, Mapping) or not isinstance(kind := item.get("type"), str):
        raise RowFault(f"{where} has a part that is neither text nor has a 'type'")
    if kind == "text":
        if not isinstance(text := item.get("text"), str):
            raise RowFault(f"{where} has a text part without 'text'")
        return TextPart(text)
    try:
        media_type(kind)
    except AnyGenError as error:
        raise RowFault(f"{where}: {error}") from None
    words = item.get("caption")
    words = " ".join(words.split()) if isinstance(words, str) and words.strip() else None
    value = next((item[key] for key in (kind, "path", "base64") if key in item), None)
    value = at.next(kind) if value is None and words is None else value
    if value is None:
        if words is None:
            raise RowFault(f"{where} has {kind} with neither a file nor a caption")
        return media_part(kind, Shown(caption=words))
    if "base64" in item and value is item["base64"]:
        value = f"data:;base64,{value}"
    return media_part(kind, _shown(value, words, at))


def _shown(value: Any, words: str | None, at: _Row) -> Shown:
    """From a path, the extension of a WebDataset's member, a data URI, bytes, or the record of a dataset's column."""
    if isinstance(value, Mapping):  # {"bytes": …, "path": …} of the package datasets
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and (members := at.raw.get("members")) and value in members:
        value = members[value]
    if isinstance(value, str) and value.startswith("data:"):
        value = _decoded(value)
    if isinstance(value, bytes):
        digest = hashlib.sha256(value).hexdigest()
        return Shown(words, key=digest, rows=at.rows, row=at.number, place=digest)
    if not isinstance(value, str) or not value:
        raise RowFault(f"a medium is given as {type(value).__name__}; wanted: a path, base64 or bytes")
    if "://" in value:
        raise RowFault("a medium is an address; download it first, and name the file")
    path = at.rows.base / value
    try:
        stat = path.stat()
    except (OSError, ValueError):
        raise RowFault(f"the file {value[:120]} is missing") from None
    return Shown(words, key=f"{path}:{stat.st_size}:{stat.st_mtime_ns}", path=path)


def _decoded(uri: str) -> bytes:
    try:
        return base64.b64decode(uri.partition(",")[2], validate=True)
    except ValueError:
        raise RowFault("a medium's base64 is broken") from None


def _data_of(value: Any) -> list[tuple[str, bytes]]:
    """All bytes inside a row, however deep."""
    found: list[tuple[str, bytes]] = []
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(inner, bytes):
            found.append((str(key), inner))
        elif isinstance(inner, str) and (inner.startswith("data:") or key == "base64"):
            found.append((str(key), _decoded(inner if inner.startswith("data:") else f"data:,{inner}")))
        else:
            found += _data_of(inner)
    return found
