"""What comes back: text and media in the order in which the LLM spoke; and, before the media are made, the plan of it.

reply = pipe("Draw a red apple.", seed=7)
print(reply.text)
reply.images[0].save("apple.png")
reply.save("out")                              # out/01-a-red-apple.png, with prompt, seed and model in it

plan = pipe.plan("Draw a red apple.", seed=7)  # conditions in place of media
plan.save_plan("apple.safetensors")
reply = pipe.render(Reply.load_plan("apple.safetensors"))
"""

import html
import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from anygen import __version__
from anygen.errors import CheckpointError, ConfigError, MessageError, OutputError
from anygen.features import Condition
from anygen.files import writing
from anygen.media import Audio, Image, Media, Video
from anygen.messages import MediaPart, Message, TextPart

_PLAN = "anygen-plan"
"""Under this key a plan's file has its words, as JSON."""
_SHOWS = re.compile(r"((and|then)\s+)?(here|this|that|there)(\s+(is|are)|['’]s)\s+", flags=re.IGNORECASE)
"""How a sentence begins that presents a medium."""


@dataclass(frozen=True, slots=True)
class MadePart(MediaPart):
    """A medium that was generated."""

    caption: str
    """The words that it was made after."""
    seed: int
    """Of its noise: the reply's seed plus its place among the reply's media."""


@dataclass(frozen=True, slots=True, eq=False)
class PlannedPart:
    """A medium that is to be generated."""

    modality: str
    condition: Condition
    """Of one sample, float32 on the CPU."""
    caption: str
    """The words that it was thought of after."""


ReplyPart = TextPart | MadePart | PlannedPart


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """An answer of the model, or the plan of one.

    >>> reply = pipe("Draw a red apple.", seed=7)
    >>> [type(part).__name__ for part in reply.content]
    ['TextPart', 'MadePart']
    >>> reply.images, reply.seed
    ([Image(128×128)], 7)
    >>> [path.suffix for path in reply.save("out")]
    ['.png']
    """

    content: tuple[ReplyPart, ...]
    """Text and media as they came; no two texts stand together."""
    prompt: str = ""
    """The words of the message that is answered."""
    model: str = ""
    """The model's name."""
    seed: int = 0
    """Medium number k, counted from 0, is made with seed + k."""
    finish: Literal["stop", "length"] = "stop"
    """Whether the LLM came to its end or to the limit of tokens."""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The steps and the guidance scale that were asked for, if they were."""
    timings: Mapping[str, float] = field(default_factory=dict, compare=False)
    """Seconds by stage: `encoders`, `llm`, `generators`. Replies of one batch share them."""

    @property
    def text(self) -> str:
        """The words alone."""
        return Message("assistant", tuple(part for part in self.content if isinstance(part, TextPart))).text

    @property
    def is_plan(self) -> bool:
        """Whether media are yet to be made."""
        return any(isinstance(part, PlannedPart) for part in self.content)

    @property
    def media(self) -> list[Media]:
        """All media in their order.

        Raises:
            ConfigError: this is a plan.
        """
        return [part.media for part in self._made()]

    @property
    def images(self) -> list[Image]:
        """The pictures. Raises as `media`."""
        return [media for media in self.media if isinstance(media, Image)]

    @property
    def videos(self) -> list[Video]:
        """The clips. Raises as `media`."""
        return [media for media in self.media if isinstance(media, Video)]

    @property
    def audios(self) -> list[Audio]:
        """The sounds. Raises as `media`."""
        return [media for media in self.media if isinstance(media, Audio)]

    def to_message(self) -> Message:
        """This answer as a turn of a conversation; a `Reply` may also stand in one as it is.

        Raises:
            MessageError: this is a plan.
        """
        if self.is_plan:
            raise MessageError("a plan cannot stand in a conversation, its media are not made yet: render it first")
        return Message(
            "assistant",
            tuple(
                MediaPart(part.modality, part.media) if isinstance(part, MadePart) else part
                for part in self.content
                if not isinstance(part, PlannedPart)
            ),
        )

    def save(self, directory: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Writes every medium as `NN-words-of-its-caption.suffix`, numbered on from what the directory holds.

        `read_metadata` (and `anygen info FILE`) gives back prompt, caption, seed and model.

        Args:
            directory: made if it is not there; only if there are media.
            overwrite: counts from 01 and replaces files of the same name.

        Returns:
            The paths, one a medium.

        Raises:
            OutputError: the directory is a file, or the disk refuses.
            ConfigError: this is a plan.
        """
        return [self.save_medium(place, directory, overwrite=overwrite) for place in range(len(self._made()))]

    def save_medium(self, place: int, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Writes one medium as `save` does, such as each of a stream when it is done.

        Args:
            place: the medium's, among the reply's media.
            directory: made if it is not there.
            overwrite: numbers the file `place` + 1 and replaces one of the same name.

        Raises:
            OutputError, ConfigError: as `save`.
        """
        directory, part = Path(directory), self._made()[place]
        make_directory(directory)
        number = place + 1 if overwrite else next_number(directory)
        name = slug(part.caption) or part.modality
        while True:
            path = directory / f"{number:02}-{name}{part.media.suffixes[0]}"
            try:
                return part.media.save(path, metadata=self._metadata(part, place), overwrite=overwrite)
            except OutputError:
                if overwrite or not path.exists():
                    raise
                number += 1  # another process was faster

    def save_plan(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Writes a plan as one safetensors file, its words as JSON in the header.

            >>> plan = pipe.plan("Draw a red apple.", seed=7)
            >>> path = plan.save_plan("apple.safetensors", overwrite=True)
            >>> pipe.render(Reply.load_plan(path)) == pipe.render(plan)
            True

        Raises:
            ConfigError: the media are made already.
            OutputError: the file exists, or the disk refuses.
        """
        from safetensors.torch import save_file

        path, tensors, content = Path(path), {}, []
        for place, part in enumerate(self.content):
            if isinstance(part, MadePart):
                raise ConfigError("this is a reply, its media are made; save_plan writes what pipe.plan gives")
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
                continue
            content.append({"type": part.modality, "caption": part.caption, "tensors": list(part.condition.tensors)})
            tensors |= {
                f"{place}.{name}": value.detach().cpu().contiguous() for name, value in part.condition.tensors.items()
            }
        words = {
            "content": content,
            "prompt": self.prompt,
            "model": self.model,
            "seed": self.seed,
            "finish": self.finish,
            "timings": dict(self.timings),
        }
        with writing(path, overwrite=overwrite) as temporary:
            save_file(tensors, temporary, metadata={_PLAN: json.dumps(words)})
        return path

    @classmethod
    def load_plan(cls, path: str | Path) -> Self:
        """Reads what `save_plan` wrote.

        Raises:
            CheckpointError: there is no such file, or it is no plan.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"there is no plan {path}")
        try:
            with safe_open(path, "pt") as file:
                words = json.loads((file.metadata() or {})[_PLAN])
                content: list[ReplyPart] = []
                for place, part in enumerate(words.pop("content")):
                    if part["type"] == "text":
                        content.append(TextPart(part["text"]))
                        continue
                    tensors = {name: file.get_tensor(f"{place}.{name}") for name in part["tensors"]}
                    content.append(PlannedPart(part["type"], Condition(tensors), part["caption"]))
            return cls(content=tuple(content), **words)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a plan that Reply.save_plan wrote ({error})") from None

    def _made(self) -> list[MadePart]:
        if self.is_plan:
            raise ConfigError("this is a plan, its media are not made yet; pipe.render(plan) makes them")
        return [part for part in self.content if isinstance(part, MadePart)]

    def _metadata(self, part: MadePart, place: int) -> dict[str, Any]:
        told = {"prompt": self.prompt, "caption": part.caption, "seed": self.seed, "model": self.model}
        if place:
            told["media"] = place  # made with seed + place
        return told | dict(self.options) | {"anygen": __version__}

    def __str__(self) -> str:
        """Text, and a line for each medium."""
        lines = []
        for part in self.content:
            match part:
                case TextPart():
                    lines.append(part.text.strip())
                case MadePart():
                    lines.append(f"[{part.media!r}]")
                case PlannedPart():
                    lines.append(f"[{part.modality} to be made]")
        return "\n".join(line for line in lines if line)

    def _repr_html_(self) -> str:
        """A cell of a notebook: text, and media that show and play."""
        cells = []
        for part in self.content:
            match part:
                case TextPart():
                    cells.append(f'<p style="white-space: pre-wrap">{html.escape(part.text.strip())}</p>')
                case MadePart():
                    cells.append(f'<div title="{html.escape(part.caption)}">{_html_of(part.media)}</div>')
                case PlannedPart():
                    cells.append(f"<p><i>{html.escape(part.modality)} to be made</i></p>")
        return "".join(cells)


def caption_of(parts: Sequence[object], prompt: str) -> str:
    """The words that a medium behind `parts` belongs to: the text right before it, else the prompt."""
    for part in reversed(parts):
        text = part.text if isinstance(part, TextPart) else part
        if isinstance(text, str) and text.strip():
            return " ".join(text.split())
    return " ".join(prompt.split())


def slug(caption: str, length: int = 40) -> str:
    """Words for a file's name: 'Here is a red apple, in the flat style.' gives 'a-red-apple'."""
    sentences = re.split(r"(?<=[.!?])\s+", caption.strip())
    sentence = next((s for s in sentences if _SHOWS.match(s)), sentences[-1])
    sentence = _SHOWS.sub("", sentence, count=1) if _SHOWS.match(sentence) else sentence
    words = re.findall(r"\w+", sentence.split(",")[0].lower())
    kept: list[str] = []
    for word in words:
        if sum(map(len, kept)) + len(kept) + len(word) > length:
            break
        kept.append(word)
    return "-".join(kept)


def next_number(directory: Path) -> int:
    """One more than the highest number that a file's name in `directory` begins with."""
    numbers = [int(found[1]) for path in directory.iterdir() if (found := re.match(r"(\d{1,9})-", path.name))]
    return max(numbers, default=0) + 1


def make_directory(directory: Path) -> None:
    """Makes a directory and its parents.

    Raises:
        OutputError: a file is in the way, or the disk refuses.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OutputError(f"{directory} cannot be a directory, a file is in the way") from None
    except OSError as error:
        raise OutputError(f"the directory {directory} cannot be made: {error.strerror or error}") from None


def _html_of(media: Media) -> str:
    shown: Any = media
    if isinstance(media, Image):
        return f'<img src="data:image/png;base64,{b64encode(media._repr_png_()).decode()}">'
    return shown._repr_html_() if hasattr(shown, "_repr_html_") else html.escape(repr(media))
