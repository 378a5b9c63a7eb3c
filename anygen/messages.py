"""What a user says, in a typed form: `Message`s of text and media parts.

    parse_one("Draw a red apple.")
    parse_one(["What is this?", Image.from_path("guitar.png")])
    parse_one([{"role": "user", "content": [{"type": "image", "image": "guitar.png"}]}])

The dictionaries are the chat format of transformers and OpenAI: a part is `{"type": MODALITY, MODALITY: value}`,
with "path", "url" or "base64" in place of the value's key, or OpenAI's `image_url`, `video_url`, `audio_url` and
`input_audio`. In a list that mixes text and media a string is text, so a file is given as a `pathlib.Path`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

from anygen.errors import MessageError
from anygen.media import Audio, Image, Media, MediaLimits, Video, media_type, modalities
from anygen.media_base import MEDIA, is_tensor
from anygen.sources import decode_base64, shorten

Role = Literal["system", "user", "assistant"]
_ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class TextPart:
    """Some words of a message."""

    text: str

    def to_dict(self) -> dict[str, Any]:
        """The chat format."""
        return {"type": "text", "text": self.text}


@dataclass(frozen=True, slots=True)
class MediaPart:
    """A picture, clip, sound or plugin's value in a message."""

    modality: str
    media: Media

    def to_dict(self) -> dict[str, Any]:
        """The chat format, with the media value itself in it."""
        return {"type": self.modality, self.modality: self.media}


Part = TextPart | MediaPart


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; an assistant's may hold the media that were generated."""

    role: Role
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if self.role not in _ROLES:
            raise MessageError(f"a message has the unknown role {self.role!r}; known: {', '.join(_ROLES)}")

    @property
    def text(self) -> str:
        """The words alone; a space stands where media stood between two words."""
        joined = ""
        for part in self.parts:
            if isinstance(part, TextPart) and part.text:
                apart = joined and not joined[-1].isspace() and not part.text[0].isspace()
                joined += (" " if apart else "") + part.text
        return joined

    @property
    def media(self) -> tuple[Media, ...]:
        """The media alone, in their order."""
        return tuple(part.media for part in self.parts if isinstance(part, MediaPart))

    def to_dict(self) -> dict[str, Any]:
        """The chat format; `parse` reads it back."""
        return {"role": self.role, "content": [part.to_dict() for part in self.parts]}


@runtime_checkable
class SupportsMessage(Protocol):
    """Anything that can stand in a conversation, such as a `Reply`."""

    def to_message(self) -> Message:
        """Itself as a message."""
        ...


def parse(prompt: object, *, limits: MediaLimits | None = None, allow_urls: bool = False) -> list[Message]:
    """One conversation, in any of the forms that users pass, as messages; all media are read and decoded.

    Args:
        prompt: a string, a media value, a list mixing strings and media (one user message), a message
            dictionary, or a list of message dictionaries, `Message`s and objects with `to_message()`.
        limits: which media to refuse.
        allow_urls: whether media may be fetched from http and https addresses.

    Raises:
        MessageError: the prompt is empty or of none of these forms; says what would be right.
        MediaError: media cannot be read.
    """
    reader = _Reader(limits or MediaLimits(), allow_urls)
    if _is_message(prompt):
        return [reader.message(prompt, "the message")]
    if not isinstance(prompt, list | tuple):
        return [reader.user_message([prompt])]
    if not prompt:
        raise MessageError("the prompt is an empty list; say something, or pass media")
    if not any(_is_message(item) for item in prompt):
        return [reader.user_message(prompt)]
    return [reader.message(item, f"message {place}") for place, item in enumerate(prompt, start=1)]


def parse_one(prompt: object, *, limits: MediaLimits | None = None, allow_urls: bool = False) -> list[Message]:
    """A conversation that waits for an answer: `parse`, and the last message has to be the user's.

    Raises:
        MessageError, MediaError: as `parse`.
    """
    messages = parse(prompt, limits=limits, allow_urls=allow_urls)
    if (role := messages[-1].role) != "user":
        raise MessageError(f"the last message is the {role}'s; a conversation to be answered ends with the user's")
    return messages


def parse_batch(prompts: object, *, limits: MediaLimits | None = None, allow_urls: bool = False) -> list[list[Message]]:
    """Several conversations if `is_batch(prompts)`, otherwise the one that `prompts` is.

    Raises:
        MessageError, MediaError: as `parse_one`.
    """
    batch = cast(Sequence[object], prompts) if is_batch(prompts) else [prompts]
    return [parse_one(prompt, limits=limits, allow_urls=allow_urls) for prompt in batch]


def is_batch(prompts: object) -> bool:
    """Whether this is a list of prompts: not empty, and each item is a string or itself a list.

    `["Draw a cat", "Draw a dog"]` is a batch of two; `["What is this?", Image(…)]` and a list of message
    dictionaries are one prompt.
    """
    return isinstance(prompts, list | tuple) and bool(prompts) and all(isinstance(p, str | list) for p in prompts)


@dataclass(frozen=True, slots=True)
class _Reader:
    limits: MediaLimits
    allow_urls: bool

    def message(self, item: object, where: str) -> Message:
        if isinstance(item, Message):
            return self._checked(item, where)
        if isinstance(item, SupportsMessage):
            return self._checked(item.to_message(), where)
        if not isinstance(item, Mapping):
            raise MessageError(
                f"{where} is {_kind(item)} among messages; a list holds either messages or the parts of one "
                'message; wanted: {"role": "user", "content": …}'
            )
        if "role" not in item or "content" not in item:
            missing = "role" if "role" not in item else "content"
            raise MessageError(f'{where} has no "{missing}"; wanted: {{"role": "user", "content": …}}')
        role, content = item["role"], item["content"]
        if role not in _ROLES:
            raise MessageError(f"{where} has the unknown role {role!r}; known: {', '.join(_ROLES)}")
        parts = content if isinstance(content, list | tuple) else [content]
        return self._checked(Message(role, self._parts(parts, where)), where)

    def user_message(self, items: Sequence[object]) -> Message:
        return self._checked(Message("user", self._parts(items, "the prompt")), "the prompt")

    def _checked(self, message: Message, where: str) -> Message:
        if not message.media and not message.text.strip():
            raise MessageError(f"{where} is empty; say something, or pass media")
        return message

    def _parts(self, items: Sequence[object], where: str) -> tuple[Part, ...]:
        places = [where] if len(items) == 1 else [f"{where}, part {n}," for n in range(1, len(items) + 1)]
        parts = [self._part(item, place) for item, place in zip(items, places, strict=True)]
        return tuple(part for part in parts if part != TextPart(""))

    def _part(self, item: object, where: str) -> Part:
        if isinstance(item, str):
            return TextPart(item)
        if isinstance(item, TextPart | MediaPart):
            return item
        if isinstance(item, Media):
            return MediaPart(item.modality, item)
        if isinstance(item, os.PathLike):
            modality = _modality_of_suffix(Path(item), where)
            return self._media(modality, item)
        if type(item).__module__.split(".")[0] == "PIL":
            return self._media("image", item)
        if isinstance(item, Mapping):
            return self._typed_part(item, where)
        if isinstance(item, bytes | bytearray | memoryview) or is_tensor(item) or hasattr(item, "__array__"):
            raise MessageError(
                f"{where} is {_kind(item)}, which may be any modality; wrap it: Image.from_any(…), "
                'Video(frames, fps), Audio(samples, sampling_rate), or {"type": "image", "image": …}'
            )
        raise MessageError(
            f"{where} is {_kind(item)}; wanted: a string, a media value, a PIL image, a pathlib.Path, "
            'or a part such as {"type": "image", "image": …}'
        )

    def _typed_part(self, part: Mapping[str, Any], where: str) -> Part:
        kind = part.get("type")
        if not isinstance(kind, str):
            raise MessageError(f'{where} has no "type"; wanted: {{"type": "text", "text": …}} or {_forms()}')
        if kind == "text":
            if not isinstance(text := part.get("text"), str):
                raise MessageError(f'{where} has no "text"; wanted: {{"type": "text", "text": "…"}}')
            return TextPart(text)
        if kind == "input_audio":
            data = _inner(part, kind, "data", where)
            if isinstance(data, str) and not data.startswith("data:"):
                data = decode_base64(data, "the input_audio data", self.limits)
            return self._media("audio", data)
        if kind.endswith("_url") and kind.removesuffix("_url") in MEDIA:
            return self._media(kind.removesuffix("_url"), _inner(part, kind, "url", where))
        if kind not in MEDIA and kind not in modalities():  # plugins are imported only if anygen has no such modality
            raise MessageError(
                f"{where} is of the unknown type {kind!r}; known: text, {', '.join(modalities())}, "
                "image_url, video_url, audio_url, input_audio"
            )
        for key in (kind, "path", "url"):
            if key in part:
                return self._media(kind, part[key])
        if "base64" in part:
            return self._media(kind, decode_base64(part["base64"], "the base64", self.limits))
        raise MessageError(f"{where} has no {kind}; wanted: {_forms(kind)}")

    def _media(self, modality: str, value: object) -> MediaPart:
        media = media_type(modality).from_any(value, limits=self.limits, allow_urls=self.allow_urls)
        return MediaPart(modality, media)


def _is_message(item: object) -> bool:
    return isinstance(item, Message | SupportsMessage) or (isinstance(item, Mapping) and "role" in item)


def _inner(part: Mapping[str, Any], kind: str, key: str, where: str) -> object:
    """`part[kind][key]`, or `part[kind]` if that is no dictionary."""
    value = part.get(kind)
    if isinstance(value, Mapping):
        value = value.get(key)
    if value is None:
        raise MessageError(f'{where} has no "{key}"; wanted: {{"type": "{kind}", "{kind}": {{"{key}": …}}}}')
    return value


def _modality_of_suffix(path: Path, where: str) -> str:
    suffix = path.suffix.lower()
    for modality, suffixes in _SUFFIXES.items():
        if suffix in suffixes:
            return modality
    for modality in modalities():
        if suffix in MEDIA[modality].suffixes:
            return modality
    raise MessageError(
        f"{where} is the path {path}, whose suffix '{suffix}' tells no modality; "
        'say which it is: {"type": "image", "path": …}'
    )


def _forms(kind: str = "image") -> str:
    return f'{{"type": "{kind}", "{kind}": …}}, or with "path", "url" or "base64"'


def _kind(item: object) -> str:
    return shorten(repr(item), 40) if isinstance(item, str | int | float | None) else type(item).__name__


_SUFFIXES = {
    Image.modality: (*Image.suffixes, ".avif"),
    Video.modality: (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v"),
    Audio.modality: (*Audio.suffixes, ".mp3", ".m4a", ".aac", ".opus"),
}
"""What a bare path in a list is taken for; a GIF or WebP counts as a picture."""
