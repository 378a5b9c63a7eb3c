"""Conversations: what is asked, what is answered, and what stands behind every run."""

import random
import re

import pytest
import torch

from anygen.errors import ConfigError
from anygen.messages import MediaPart, Message, TextPart
from anygen.training.captions import Drawing, canonical
from anygen.training.evaluation_media_cases import media_requests
from anygen.training.icons import Concept
from anygen.training.motion import Shot
from anygen.training.phrases import CANNOT, JOIN
from anygen.training.phrases_media import INTO, INTO_FROM, TURNED_ROUND
from anygen.training.requests import Conversations, Seen, self_prompts
from anygen.training.sound_captions import Sound
from anygen.training.sounds import Effect, Instrument, Percussion, SoundBank
from anygen.training.wishes import ClipWishes, ImageWishes, SoundWishes

CONCEPTS = (
    Concept("1f34e", "red apple", ("apple",), 4),
    Concept("1f436", "dog face", (), 3),
    Concept("1f415", "dog", (), 3),
    Concept("1f680", "rocket", ("spaceship",), 5),
    Concept("1f3ba", "trumpet", (), 5),
)
BANK = SoundBank(
    instruments=(
        Instrument(name="trumpet", family="brass", chords=False, roots=(60,), stems=(0,)),
        Instrument(name="piano", family="keys", chords=True, roots=(60,), stems=(1,)),
    ),
    percussion=(Percussion(name="cowbell", stems=(2,)),),
    effects=(
        Effect(label="a dog barking", aliases=("a dog",), group="animals", stems=(3,)),
        Effect(label="rain falling", aliases=("rain",), group="weather", background=True, stems=(4,)),
    ),
    samples=torch.zeros(5, dtype=torch.int16),
    offsets=torch.arange(6),
    gains=torch.ones(5),
    checksum="",
)
PICTURES = [
    Seen("image", row, Drawing(label=CONCEPTS[row % 3].label, style="flat", count=1 + row % 4)) for row in range(9)
]
OTHERS = [
    Seen("video", 0, Shot(drawing=Drawing(label="rocket", style="flat", background="white"), motion="moving up")),
    Seen("audio", 0, Sound(kind="effect", label="a dog barking")),
    Seen("audio", 1, Sound(kind="music", label="piano", phrase="rising", tempo="fast")),
]
EVERYTHING = [ImageWishes(CONCEPTS), ClipWishes(CONCEPTS), SoundWishes(BANK, CONCEPTS)]


@pytest.fixture(scope="module")
def pictures() -> Conversations:
    """Of pictures alone."""
    return Conversations([ImageWishes(CONCEPTS)], PICTURES, seed=3)


@pytest.fixture(scope="module")
def everything() -> Conversations:
    return Conversations(EVERYTHING, PICTURES + OTHERS, seed=3)


def made(message: Message) -> list[tuple[str, str]]:
    return [(part.modality, str(part.media)) for part in message.parts if isinstance(part, MediaPart)]


def test_example_n_is_the_same_in_every_process_and_seeds_differ(everything: Conversations) -> None:
    again, other = (Conversations(EVERYTHING, PICTURES + OTHERS, seed=seed) for seed in (3, 4))
    assert [again[n] for n in range(50)] == [everything[n] for n in range(50)]
    assert [other[n] for n in range(50)] != [everything[n] for n in range(50)]


@pytest.mark.parametrize("name", ["pictures", "everything"])
def test_every_run_stands_behind_the_words_of_its_caption(name: str, request: pytest.FixtureRequest) -> None:
    conversations, runs = request.getfixturevalue(name), {"image": 0, "video": 0, "audio": 0}
    for number in range(600):
        for message in conversations[number].messages:
            if message.role == "assistant":
                before = ""
                for part in message.parts:
                    if isinstance(part, MediaPart):
                        assert before.endswith(f"{part.media}."), (before, part.media)
                        runs[part.modality] += 1
                    before = part.text if isinstance(part, TextPart) else ""
    assert runs["image"] > 150 and all((runs[kind] > 80) == (name == "everything") for kind in ("video", "audio"))


def test_plain_talk_has_no_answer_to_learn_and_the_rest_has_one(everything: Conversations) -> None:
    kinds = {True: 0, False: 0}
    for number in range(600):
        conversation = everything[number]
        kinds[conversation.words] += 1
        assert conversation.messages[-1].role == ("user" if conversation.words else "assistant")
    assert 0.1 < kinds[True] / 600 < 0.3


def test_questions_are_answered_by_what_the_medium_holds() -> None:
    pool = PICTURES + OTHERS
    asked, everything = {"image": 0, "video": 0, "audio": 0}, Conversations(EVERYTHING, pool, 3, {"ask": 1.0})
    for number in range(300):
        question, answer = everything[number].messages
        [(modality, index)] = made(question)
        content = next(s.content for s in pool if (s.modality, str(s.index)) == (modality, index))
        facts = {
            Drawing: lambda c: (c.label.split()[-1], "flat style", "white background"),
            Shot: lambda c: (c.drawing.label, c.motion),
            Sound: lambda c: (c.label,),
        }[type(content)](content)
        assert any(fact in answer.text for fact in facts), answer.text
        asked[modality] += 1
    assert min(asked.values()) > 40


def test_several_media_come_in_the_order_asked() -> None:
    several, lengths, mixed = Conversations(EVERYTHING, [], 0, {"make_several": 1.0}), set(), 0
    turned = [re.sub(r"\\{\d\\}", ".+", re.escape(form)) for form in TURNED_ROUND]
    reversed_ones = 0
    names = ("red apple", "apple", "dog", "rocket", "spaceship", "trumpet", "piano", "cowbell", "drum", "rain")
    for number in range(200):
        request, answer = several[number].messages
        runs, text = made(answer), request.text.lower()
        lengths.add(len(runs))
        mixed += len({modality for modality, _ in runs}) > 1
        # aliases and typing slips aside, the names stand in the request in the answer's order
        found = [
            next((text.find(name) for name in names if name in caption and name in text), -1) for _, caption in runs
        ]
        if -1 not in found and len(set(found)) == len(found) and found != sorted(found):
            assert any(re.match(form, request.text, re.IGNORECASE) for form in turned), (request.text, runs)
            reversed_ones += 1
    assert 2 < reversed_ones < 20
    assert lengths == {2, 3} and mixed > 80


def test_a_thing_goes_from_one_modality_into_another() -> None:
    into, seen = Conversations(EVERYTHING, PICTURES + OTHERS, 0, {"into": 1.0}), set()
    for number in range(400):
        messages = into[number].messages
        runs = made(messages[-1])
        if not runs:
            assert re.match(r"I do not know what .+ (sounds|looks) like\.$", messages[-1].text)
            continue
        [(target, caption)] = runs
        media = made(messages[0])
        source = (media or made(messages[1]))[0][0]
        assert target != source
        seen.add((source, target))
        if target == "audio":
            assert caption in ("a dog barking", "a trumpet")
    assert seen == {(a, b) for a in ("image", "video", "audio") for b in ("image", "video", "audio") if a != b}


def test_who_wants_to_hear_a_thing_mostly_has_one_that_is_heard() -> None:
    into = Conversations(EVERYTHING, PICTURES + OTHERS, 0, {"into": 1.0})
    answered = [bool(made(into[number].messages[-1])) for number in range(600)]
    assert 0.85 < sum(answered) / 600 < 1
    drawn = [number for number in range(600) if made(into[number].messages[0])[:1] == [("image", "0")]]
    assert drawn  # a red apple: seen, never heard


def test_one_thing_comes_in_several_modalities_in_the_order_asked() -> None:
    forms, orders = Conversations(EVERYTHING, [], 0, {"one_thing": 1.0}), set()
    kinds = {"image": "picture|image|drawing", "video": "clip|video|animation", "audio": "sound|recording|audio"}
    for number in range(300):
        request, answer = forms[number].messages
        runs, text = made(answer), request.text.lower()
        modalities = tuple(modality for modality, _ in runs)
        orders.add(modalities)
        assert len(set(modalities)) == len(modalities) in (2, 3)
        if "audio" in modalities:  # of what is seen, only these are heard
            assert all("dog" in caption or "trumpet" in caption for _, caption in runs)
        places = [match.start() if (match := re.search(kinds[m], text)) else -1 for m in modalities]
        if -1 not in places and re.search(r"a \w+(, an? \w+)?,? and", text) and len(set(places)) == len(places):
            assert places == sorted(places), (request.text, modalities)
    assert len(orders) == 12
    nothing_linked = Conversations([ImageWishes(CONCEPTS[:1]), EVERYTHING[2]], [], 0, {"one_thing": 1.0})
    assert len(made(nothing_linked[0].messages[-1])) in (2, 3)


def test_wordings_of_a_given_medium_are_there_for_every_pair_and_not_those_of_the_evaluation() -> None:
    assert set(INTO_FROM) == {(a, b) for a in INTO for b in INTO if a != b}
    held_out = {re.sub(r"\W", "", request.text).lower() for request in media_requests("given")}
    trained = [words for listed in [*INTO.values(), *INTO_FROM.values()] for words in listed]
    assert not [words for words in trained if re.sub(r"\W", "", words).lower() in held_out]


def test_concepts_and_sounds_are_linked_by_their_names() -> None:
    sounds = SoundWishes(BANK, CONCEPTS)
    assert {name: sound.label for name, sound in sounds.sound_of.items()} == {
        "trumpet": "trumpet",
        "dog": "a dog barking",
        "dog face": "a dog barking",
    }
    assert sounds.named(Sound(kind="effect", label="a dog barking")) == "dog"
    assert sounds.of("red apple", random.Random(0)) is None


def test_what_cannot_be_made_is_told_with_what_can() -> None:
    told = {Conversations(EVERYTHING, [], 0, {"cannot": 1.0})[n].messages[1].text for n in range(60)}
    able = "I can make pictures, videos and sounds, or answer in words."
    assert told == {f"I cannot make {noun}. {able}" for noun in ("smells", "tastes", "things")}
    told = {Conversations([ImageWishes(CONCEPTS)], [], 0, {"cannot": 1.0})[n].messages[1].text for n in range(90)}
    assert "I cannot make videos. I can make pictures, or answer in words." in told and len(told) == len(CANNOT) - 1


def test_a_mixture_decides_what_is_talked_about() -> None:
    only = Conversations([ImageWishes(CONCEPTS)], PICTURES, 0, {"talk": 1.0})
    assert all(only[n].words for n in range(20))
    with pytest.raises(ConfigError, match="unknown kinds of conversation: tlk; known: make, make_several, one_thing,"):
        Conversations([ImageWishes(CONCEPTS)], PICTURES, 0, {"tlk": 1.0})
    assert "into" not in Conversations([ImageWishes(CONCEPTS)], PICTURES, 0).mixture
    assert not {"ask", "again"} & set(Conversations(EVERYTHING, [], 0).mixture)


def test_a_request_in_given_words_is_answered_by_the_given_drawing(pictures: Conversations) -> None:
    drawing = Drawing(label="rocket", style="flat")
    for seed in range(30):
        conversation = pictures.ask_for("image", drawing, canonical(drawing), random.Random(seed))
        request, reply = conversation.messages
        assert "rocket" in request.text.lower() or re.search("r.{0,3}o.{0,3}c?k", request.text.lower())
        assert made(reply) == [("image", canonical(drawing))]
        assert reply.text.strip() == "Here is a rocket, in the flat style."


def test_free_requests_hold_no_media_of_the_pool(everything: Conversations) -> None:
    rng = random.Random(0)
    for _ in range(100):
        messages = everything.free_request(rng).messages
        assert not any(made(message) for message in messages if message.role == "user")
        assert made(messages[-1])


def test_self_prompts_are_many_short_lines_that_ask_for_no_media() -> None:
    lines = self_prompts()
    assert len(lines) > 1000 and len(set(lines)) == len(lines)
    assert not [line for line in lines if re.search(r"\b(draw|picture of|show me|image of)\b", line, re.IGNORECASE)]


def test_answers_are_sentences_of_their_modality() -> None:
    images, clips, sounds = EVERYTHING
    assert images.told(Drawing(label="dog", count=2, style="flat")) == "Here are two dogs, in the flat style."
    assert clips.told(OTHERS[0].content) == (
        "Here is a clip of a rocket moving up, in the flat style, on a white background."
    )
    assert sounds.told(OTHERS[2].content) == "Here is the sound of a piano playing a fast rising melody."
    assert all(len(form.format("a", "b", "c")) > 3 for forms in JOIN for form in forms)
    assert set(INTO) == {"image", "video", "audio"}
