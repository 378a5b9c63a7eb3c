"""Drawings and the words for them."""

import random
from dataclasses import replace

import pytest

from anygen.training.captions import (
    BACKGROUNDS,
    COLOURS,
    NUMBERS,
    PLACES,
    Drawing,
    canonical,
    caption_corpus,
    plural,
    random_drawing,
    said,
    subject,
    varied,
    with_article,
)
from anygen.training.icons import SCENES, Concept

APPLE = Concept("1f34e", "red apple", ("apple", "apfel"), 4)


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("red apple", "red apples"),
        ("slice of pizza", "slices of pizza"),
        ("fox", "foxes"),
        ("butterfly", "butterflies"),
        ("toy", "toys"),
        ("glass of milk", "glasses of milk"),
        ("mouse", "mice"),
        ("police woman", "police women"),
        ("maple leaf", "maple leaves"),
        ("fish", "fish"),
        ("scissors", "scissors"),
        ("cat with tears of joy", "cats with tears of joy"),
    ],
)
def test_plurals(one: str, many: str) -> None:
    assert plural(one) == many


@pytest.mark.parametrize(
    ("label", "named"),
    [
        ("apple", "an apple"),
        ("dog", "a dog"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("hourglass", "an hourglass"),
        ("scissors", "scissors"),
        ("octopus", "an octopus"),
        ("Aries", "Aries"),
        ("two o'clock", "two o'clock"),
        ("bread", "bread"),
    ],
)
def test_articles(label: str, named: str) -> None:
    assert with_article(label) == named


def test_the_canonical_caption_says_everything_in_one_order() -> None:
    drawing = Drawing(label="red apple", style="flat", size="small", place="on the left", background="blue")
    assert canonical(drawing) == "a small red apple on the left, in the flat style, on a blue background"
    assert canonical(Drawing(label="dog", style="3D", count=3, background="park")) == (
        "three dogs, in the 3D style, in a meadow"
    )
    assert canonical(Drawing(label="owl", background="orange")) == "an owl, on an orange background"


def test_the_canonical_caption_says_no_more_than_the_drawing() -> None:
    assert canonical(Drawing(label="red apple")) == "a red apple"
    words = {*PLACES, *BACKGROUNDS, "style", "small", "big", *NUMBERS.values()}
    assert not any(word in canonical(Drawing(label="dog")) for word in words)


def test_different_drawings_have_different_canonical_captions() -> None:
    rng = random.Random(0)
    drawings = {random_drawing(APPLE, rng.choice(("flat", "3D")), rng) for _ in range(2000)}
    assert len({canonical(drawing) for drawing in drawings}) == len(drawings) > 300


def test_every_form_states_all_of_the_drawing() -> None:
    rng = random.Random(0)
    words_of = {background: words for words, background in BACKGROUNDS.items()}
    for _ in range(1500):
        drawing = random_drawing(APPLE, "flat", rng)
        text = varied(drawing, rng)
        assert "red apple" in text and "flat" in text
        assert drawing.background is not None and words_of[drawing.background] in text
        assert drawing.place is None or drawing.place in text
        assert drawing.size is None or drawing.size in text
        assert drawing.count == 1 or f"{NUMBERS[drawing.count]} " in text
        assert ("red apples" in text) == (drawing.count > 1)


def test_one_drawing_is_said_in_many_forms() -> None:
    rng = random.Random(0)
    drawing = Drawing(label="red apple", style="flat", place="on the left", background="blue")
    assert len({varied(drawing, rng) for _ in range(200)}) >= 8


def test_random_drawings_are_what_can_be_composed() -> None:
    rng = random.Random(0)
    drawings = [random_drawing(APPLE, "flat", rng) for _ in range(3000)]
    assert {d.background for d in drawings} == set(COLOURS) | set(SCENES)
    assert {d.place for d in drawings} == {None, *PLACES}
    assert {d.count for d in drawings} == {1, 2, 3, 4}
    assert all((d.count > 1) + (d.size is not None) + (d.place is not None) <= 1 for d in drawings)


def test_what_is_said_leaves_out_but_never_invents() -> None:
    rng = random.Random(0)
    drawing = Drawing(label="red apple", style="flat", count=2, background="white")
    heard = [said(drawing, APPLE, rng) for _ in range(500)]
    assert {h.label for h in heard} == {"red apple", "apple", "apfel"}
    assert {h.style for h in heard} == {"flat", None}
    assert {h.background for h in heard} == {"white", None}
    assert all(replace(h, label="", style=None, background=None).count == 2 for h in heard)
    blue = replace(drawing, background="blue")
    assert {said(blue, APPLE, rng).background for _ in range(200)} == {"blue"}
    assert {said(blue, APPLE, rng, open_style=0).style for _ in range(200)} == {"flat"}


def test_the_corpus_holds_every_name() -> None:
    corpus = caption_corpus([APPLE], seed=0, per_concept=4)
    assert {"red apple", "apple", "apfel"} <= set(corpus) and len(corpus) == 7
    assert corpus == caption_corpus([APPLE], seed=0, per_concept=4)


def test_subjects() -> None:
    assert subject(Drawing(label="owl", size="big")) == "a big owl"
    assert subject(Drawing(label="owl", count=4)) == "four owls"
    assert subject(Drawing(label="owl")) == "an owl"
