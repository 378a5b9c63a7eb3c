import random
import re

import pytest

from anygen.errors import ConfigError
from anygen.messages import MediaPart, Message, TextPart
from anygen.training.captions import Drawing, canonical
from anygen.training.icons import Concept
from anygen.training.requests import Conversations, PoolPicture, here, self_prompts

CONCEPTS = (
    Concept("1f34e", "red apple", ("apple",), 4),
    Concept("1f415", "dog", (), 3),
    Concept("1f680", "rocket", ("spaceship",), 5),
)
POOL = [
    PoolPicture(row, row % 3, Drawing(label=CONCEPTS[row % 3].label, style="flat", count=1 + row % 4))
    for row in range(9)
]


@pytest.fixture(scope="module")
def conversations() -> Conversations:
    return Conversations(CONCEPTS, POOL, seed=3)


def drawn(message: Message) -> list[str]:
    return [str(part.media) for part in message.parts if isinstance(part, MediaPart)]


def test_example_n_is_the_same_in_every_process_and_seeds_differ(conversations: Conversations) -> None:
    again, other = Conversations(CONCEPTS, POOL, seed=3), Conversations(CONCEPTS, POOL, seed=4)
    assert [again[n] for n in range(50)] == [conversations[n] for n in range(50)]
    assert [other[n] for n in range(50)] != [conversations[n] for n in range(50)]


def test_every_run_stands_behind_the_words_of_its_caption(conversations: Conversations) -> None:
    runs = 0
    for number in range(600):
        for message in conversations[number].messages:
            if message.role == "assistant":
                before = ""
                for part in message.parts:
                    if isinstance(part, MediaPart):
                        assert before.endswith(f"{part.media}."), (before, part.media)
                        runs += 1
                    before = part.text if isinstance(part, TextPart) else ""
    assert runs > 200


def test_plain_talk_has_no_answer_to_learn_and_the_rest_has_one(conversations: Conversations) -> None:
    kinds = {True: 0, False: 0}
    for number in range(600):
        conversation = conversations[number]
        kinds[conversation.words] += 1
        assert conversation.messages[-1].role == ("user" if conversation.words else "assistant")
    assert 0.1 < kinds[True] / 600 < 0.3


def test_questions_are_answered_by_what_the_picture_holds(conversations: Conversations) -> None:
    asked = 0
    for number in range(600):
        messages = conversations[number].messages
        pictures = [part.media for part in messages[0].parts if isinstance(part, MediaPart)]
        if len(messages) == 2 and pictures and not drawn(messages[1]):
            drawing = POOL[int(str(pictures[0]))].drawing
            told = messages[1].text
            facts = (drawing.label.split()[-1], "flat style", "white background")
            assert any(fact in told for fact in facts), told
            asked += 1
    assert asked > 60


def test_a_mixture_decides_what_is_talked_about() -> None:
    only = Conversations(CONCEPTS, POOL, 0, {"talk": 1.0})
    assert all(only[n].words for n in range(20))
    with pytest.raises(ConfigError, match="unknown kinds of conversation: tlk; known: draw, draw_two, ask"):
        Conversations(CONCEPTS, POOL, 0, {"tlk": 1.0})


def test_the_plain_sweep_asks_for_the_drawing_and_for_nothing_else(conversations: Conversations) -> None:
    drawing = Drawing(label="rocket", style="flat")
    for seed in range(30):
        request, reply = conversations.ask_for(drawing, random.Random(seed)).messages
        assert "rocket" in request.text.lower() or re.search("r.{0,3}o.{0,3}c?k", request.text.lower())
        assert drawn(reply) == [canonical(drawing)] and reply.text.strip() == here(drawing)


def test_free_requests_hold_no_pictures_of_the_pool(conversations: Conversations) -> None:
    rng = random.Random(0)
    for _ in range(100):
        messages = conversations.free_request(rng).messages
        assert not any(drawn(message) for message in messages if message.role == "user")
        assert drawn(messages[-1])


def test_self_prompts_are_many_short_lines_that_ask_for_no_media() -> None:
    lines = self_prompts()
    assert len(lines) > 1000 and len(set(lines)) == len(lines)
    assert not [line for line in lines if re.search(r"\b(draw|picture of|show me|image of)\b", line, re.IGNORECASE)]


def test_here_agrees_with_the_number() -> None:
    assert here(Drawing(label="dog")) == "Here is a dog."
    assert here(Drawing(label="dog", count=2, style="flat")) == "Here are two dogs, in the flat style."
