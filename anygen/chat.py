"""A conversation that remembers.

chat = pipe.chat()
chat.send("Draw a red apple.")
chat.send(["And what is this?", Image.from_path("guitar.png")])
chat.history
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from anygen.decoding import Kept
from anygen.messages import Message, TextPart, parse, parse_one
from anygen.reply import Reply
from anygen.streaming import Event, Finished

if TYPE_CHECKING:
    from anygen.pipeline import AnyGenPipeline


class Chat:
    """Made by `pipe.chat()`. Of each turn the LLM reads what is new alone; it answers as if it had read all.

        >>> chat = pipe.chat(seed=3)
        >>> chat.send("Hello!").images
        []
        >>> len(chat.history)
        2

    Args:
        pipeline: which answers.
        system: instructions that come first; by default those of the LLM's own template.
        **options: of a call of the pipeline, for every answer.

    Attributes:
        history: all turns so far, as `Message`s; what the next answer is based on.
        options: as given; may be changed between answers.
    """

    def __init__(self, pipeline: "AnyGenPipeline", *, system: str | None = None, **options: Any) -> None:
        self.pipeline, self.options = pipeline, options
        self._start = [Message("system", (TextPart(system),))] if system else []
        if self._start:
            parse(self._start)  # an empty system message is refused here, not at the first answer
        self.history: list[Message] = list(self._start)
        self._kept = Kept()

    def send(self, prompt: object, **options: Any) -> Reply:
        """Says something and returns the answer; what went wrong leaves no trace in the history.

        Args:
            prompt: one message, in any form that a call takes; a list is one message, never a batch.
            **options: of a call, for this answer alone.

        Raises:
            AnyGenError: as a call.
        """
        said = self._parsed(prompt)
        reply = self.pipeline([*self.history, *said], kept=self._kept, **self.options | options)
        self._remember(said, reply)
        return reply

    def stream(self, prompt: object, **options: Any) -> Iterator[Event]:
        """As `send`, event by event; remembered once it is finished."""
        said = self._parsed(prompt)
        events = self.pipeline.stream([*self.history, *said], kept=self._kept, **self.options | options)
        return self._listening(events, said)

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.history = list(self._start)
        self._kept.clear()

    def _parsed(self, prompt: object) -> list[Message]:
        return parse_one(prompt, limits=self.pipeline.limits, allow_urls=self.pipeline.allow_urls)

    def _listening(self, events: Iterator[Event], said: list[Message]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, Finished):
                self._remember(said, event.reply)
            yield event

    def _remember(self, said: list[Message], reply: Reply) -> None:
        answer = reply.to_message()
        self.history += [*said, answer] if answer.media or answer.text.strip() else said
