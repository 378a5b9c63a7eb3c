"""What happens while an answer is made, event by event.

for event in pipe.stream("Draw a red apple."):
    match event:
        case TextDelta(text=text):
            print(text, end="", flush=True)
        case MediaStep(done=done, total=total):
            ...
        case MediaDone(part=part):
            part.media.save("apple.png")
        case Finished(reply=reply):
            ...
"""

from dataclasses import dataclass

from anygen.reply import MadePart, Reply


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More words; whole characters only."""

    text: str


@dataclass(frozen=True, slots=True)
class MediaStarted:
    """The LLM has asked for a medium, and its generator begins."""

    modality: str
    index: int
    """Its place among the answer's media."""
    caption: str
    """The words that it is made after."""


@dataclass(frozen=True, slots=True)
class MediaStep:
    """One step of the generator is done."""

    index: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class MediaDone:
    """A medium is there."""

    index: int
    part: MadePart


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event."""

    reply: Reply


Event = TextDelta | MediaStarted | MediaStep | MediaDone | Finished
