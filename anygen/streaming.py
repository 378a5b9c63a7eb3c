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

from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event as Flag
from threading import Thread
from typing import TypeVar

from anygen.generators.base import StepCallback
from anygen.reply import MadePart, Reply

T = TypeVar("T")


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


class _Stopped(Exception):
    """Nobody waits for the result any more."""


def steps_of(index: int, work: Callable[[StepCallback], T]) -> Generator[MediaStep, None, T]:
    """Runs `work(on_step)` in a thread, yields its steps as they happen, and returns what it returns.

    If the consumer stops early (Ctrl-C, `break`), the work ends with its current step.

    Raises:
        BaseException: whatever `work` raises.
    """
    steps: SimpleQueue[MediaStep | None] = SimpleQueue()
    outcome: Future[T] = Future()
    stop = Flag()

    def on_step(done: int, total: int) -> None:
        if stop.is_set():
            raise _Stopped
        steps.put(MediaStep(index, done, total))

    def run() -> None:
        try:
            outcome.set_result(work(on_step))
        except BaseException as error:  # Ctrl-C, too, is the consumer's to handle
            outcome.set_exception(error)
        finally:
            steps.put(None)

    thread = Thread(target=run, name="anygen-generator", daemon=True)
    thread.start()
    try:
        while (step := steps.get()) is not None:
            yield step
    finally:
        stop.set()
        thread.join()
    return outcome.result()
