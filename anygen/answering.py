"""One answer, event by event: the LLM speaks, and generators work where it asks for a medium."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from anygen import decoding
from anygen.decoding import DecodingConfig, Kept, Run, decode
from anygen.loading import memory
from anygen.messages import Message, TextPart
from anygen.planning import Clock, asked_for, conditions_of, read_media
from anygen.prompts import Prompt
from anygen.reply import PlannedPart, Reply, ReplyPart, caption_of
from anygen.streaming import Event, Finished, MediaStarted, TextDelta

if TYPE_CHECKING:
    from anygen.pipeline import AnyGenPipeline


def answer_stepwise(
    pipe: "AnyGenPipeline",
    conversation: Sequence[Message],
    given: Prompt,
    seed: int,
    config: DecodingConfig,
    kept: Kept | None = None,
    **options: Any,
) -> Iterator[Event]:
    """The events of one answer; a medium is begun as soon as the LLM has asked for it.

    Args:
        pipe: whose parts answer.
        conversation: ends with the message to be answered.
        given: the conversation as a prompt.
        seed: of the first medium; each further one has the next.
        config: how the LLM chooses its words.
        kept: of the conversation's last turn.
        **options: `steps`, `guidance_scale`, `seconds`; None is the generator's own.
    """
    clock, prompt = Clock(), conversation[-1].text
    parts: list[ReplyPart] = []
    finish: Literal["stop", "length"] = "stop"
    made = 0
    with memory():
        media = read_media(pipe.model, [given])
        if media:
            clock.lap("encoders")
        events = decode(
            pipe.model, [given], media=media, config=config, seeds=[seed], drawable=pipe.drawable, kept=kept
        )
        for event in events:
            match event:
                case decoding.TextDelta(text=text):
                    if parts and isinstance(last := parts[-1], TextPart):
                        parts[-1] = TextPart(last.text + text)
                    else:
                        parts.append(TextPart(text))
                    yield TextDelta(text)
                case Run(modality=modality, states=states):
                    part = PlannedPart(
                        modality, conditions_of(pipe.model, modality, states[None])[0], caption_of(parts, prompt)
                    )
                    clock.lap("llm")
                    yield MediaStarted(modality, made, part.caption)
                    parts.append((yield from pipe.make_stepwise(part, made, seed + made, **options)))
                    clock.lap("generators")
                    made += 1
                case decoding.End(reason=reason):
                    finish = reason
    clock.lap("llm")
    yield Finished(
        Reply(
            content=tuple(parts),
            prompt=prompt,
            model=pipe.name,
            seed=seed,
            finish=finish,
            options=asked_for(**options) if made else {},
            timings=clock.laps,
        )
    )
