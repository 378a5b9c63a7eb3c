from typing import Any

import numpy as np
import pytest

from anygen import AnyGenPipeline
from anygen.errors import MessageError
from anygen.media import Image
from anygen.messages import Message, TextPart
from anygen.reply import MadePart, Reply
from anygen.streaming import Finished

PICTURE = Image.from_any(np.zeros((16, 16, 3), np.uint8))


def test_an_answer_knows_all_that_was_said_and_shown(pipe: AnyGenPipeline) -> None:
    chat = pipe.chat(seed=3, max_new_tokens=5)
    first = chat.send("Draw")
    second = chat.send(["What is this?", PICTURE])
    assert [message.role for message in chat.history] == ["user", "assistant"] * 2
    assert chat.history[1] == first.to_message() and chat.history[2].media == (PICTURE,)
    conversation = [
        {"role": "user", "content": "Draw"},
        first,
        {"role": "user", "content": ["What is this?", PICTURE]},
    ]
    wanted: Any = pipe(conversation, seed=3, max_new_tokens=5)
    assert (second.text, second.seed, second.prompt) == (wanted.text, wanted.seed, wanted.prompt)
    for ours, theirs in zip(second.content, wanted.content, strict=True):  # read in two parts, sums round otherwise
        assert type(ours) is type(theirs)
        if isinstance(ours, MadePart) and isinstance(theirs, MadePart):
            assert (ours.modality, ours.caption, ours.seed) == (theirs.modality, theirs.caption, theirs.seed)
            np.testing.assert_allclose(values(ours), values(theirs), atol=1.01 if ours.modality == "image" else 1e-3)


def values(part: MadePart) -> np.ndarray:
    medium: Any = part.media
    return medium.array.astype(float) if part.modality == "image" else medium.samples


def test_a_turn_reads_only_what_is_new_and_a_conversation_started_again_reads_all(
    pipe: AnyGenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    states = type(pipe.model.llm).hidden_states

    def counted(self: Any, embeds: Any, **options: Any) -> Any:
        read.append(embeds.shape[1])
        return states(self, embeds, **options)

    monkeypatch.setattr(type(pipe.model.llm), "hidden_states", counted)
    chat = pipe.chat(seed=3, max_new_tokens=3)
    reads = []
    for again in (False, False, True):
        if again:
            chat.reset()
        read.clear()
        chat.send("What is this? A long apple, a red apple, the apple?")
        reads.append(read[0])
    assert reads[1] < reads[0] + 20 and reads[2] == reads[0]
    read.clear()
    list(chat.stream("Hello"))
    assert read[0] < reads[0]


def test_a_streamed_answer_is_remembered_once_it_is_finished(pipe: AnyGenPipeline) -> None:
    chat, sent = (pipe.chat(seed=3, max_new_tokens=5) for _ in range(2))
    events = chat.stream("Hello")
    next(iter(events))
    assert chat.history == []
    assert isinstance(list(events)[-1], Finished)
    sent.send("Hello")
    assert chat.history == sent.history and len(chat.history) == 2


def test_what_goes_wrong_leaves_no_trace(pipe: AnyGenPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = pipe.chat(seed=3, max_new_tokens=5)
    chat.send("Hello")
    before = list(chat.history)
    with pytest.raises(MessageError, match="the prompt is empty"):
        chat.send(" ")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(pipe.generator("image")), "sampling", interrupt)
    for use in (chat.send, lambda prompt: list(chat.stream(prompt))):
        with pytest.raises(KeyboardInterrupt):
            use("Draw")
    assert chat.history == before


def test_a_list_is_one_message_and_not_a_batch(pipe: AnyGenPipeline) -> None:
    reply = pipe.chat(max_new_tokens=3).send(["Hello", "What is this?"])
    assert isinstance(reply, Reply) and reply.prompt == "Hello What is this?"


def test_a_reset_keeps_the_system_message(pipe: AnyGenPipeline) -> None:
    chat = pipe.chat(system="Be brief.", max_new_tokens=3)
    start = [Message("system", (TextPart("Be brief."),))]
    assert chat.history == start
    chat.send("Hello")
    assert len(chat.history) == 3
    chat.reset()
    assert chat.history == start
    with pytest.raises(MessageError, match="message 1 is empty"):
        pipe.chat(system="  ")


def test_options_of_an_answer_go_over_those_of_the_chat(pipe: AnyGenPipeline) -> None:
    chat = pipe.chat(seed=3, max_new_tokens=5)
    assert chat.send("Hello", seed=4).seed == 4
    assert chat.send("Hello").seed == 3


def test_an_empty_answer_does_not_end_the_conversation(pipe: AnyGenPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = pipe.chat(max_new_tokens=3)
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe), "__call__", lambda *_, **__: Reply(content=()))
        chat.send("Hello")
    assert [message.role for message in chat.history] == ["user"]
    assert chat.send("What is this?").prompt == "What is this?"
