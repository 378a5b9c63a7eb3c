"""What is measured on pictures and answers."""

import pytest
import torch

from anygen.training.captions import Drawing
from anygen.training.icons import Concept, IconSet
from anygen.training.measures import (
    Names,
    NearestIcon,
    background_colour,
    border,
    count_things,
    foreground,
    on_white,
    place_of,
)

CONCEPTS = [
    Concept("0", "red apple", ("apple",), 4),
    Concept("1", "green apple", (), 4),
    Concept("2", "bridge at night", (), 5),
    Concept("3", "money-mouth face", ("money mouth",), 0),
    Concept("4", "fox", (), 3),
    Concept("5", "flat shoe", ("shoe",), 7),
    Concept("6", "fox on a hill", (), 3),
]


def test_every_icon_is_nearest_to_itself(large_icons: IconSet) -> None:
    nearest = NearestIcon(large_icons)
    rows = list(range(len(large_icons.style)))
    assert nearest.find(on_white(large_icons, rows)) == rows


def test_noise_does_not_change_the_concept(large_icons: IconSet) -> None:
    nearest, rows = NearestIcon(large_icons), list(range(0, 30, 4))
    noisy = on_white(large_icons, rows) + 0.2 * torch.randn(len(rows), 3, 128, 128, generator=torch.manual_seed(0))
    found = nearest.find(noisy)
    for icon, row in zip(found, rows, strict=True):
        shown, other = int(large_icons.concept[row]), int(large_icons.concept[(row + 1) % 30])
        assert nearest.shows(icon, shown) and not nearest.shows(icon, other)


def test_one_drawing_under_two_names_shows_both(icons: IconSet) -> None:
    twins = IconSet(
        concepts=icons.concepts,
        pixels=icons.pixels[[0, 0, 1]],
        concept=torch.tensor([0, 1, 2]),
        style=("flat",) * 3,
        panoramas={},
        checksum="",
    )
    nearest = NearestIcon(twins)
    assert [nearest.shows(0, concept) for concept in range(3)] == [True, True, False]


def test_the_border_is_a_median() -> None:
    picture = torch.full((3, 64, 64), 0.25)
    picture[:, :, 20:40] = 1.0  # an icon that reaches the edges
    torch.testing.assert_close(border(picture), torch.full((3,), 0.25))


def test_colours_are_told_apart_by_their_words() -> None:
    for word, colour in (("blue", (70, 120, 210)), ("gray", (140, 150, 150)), ("white", (250, 250, 252))):
        assert background_colour((torch.tensor(colour) / 255).view(3, 1, 1).expand(3, 32, 32)) == word


def test_an_empty_picture_has_nothing_in_no_place() -> None:
    empty = torch.ones(3, 64, 64)
    assert not foreground(empty).any() and count_things(empty) == 0 and place_of(empty) is None


def test_things_are_counted_over_gaps_and_without_specks() -> None:
    picture = torch.ones(3, 128, 128)
    for left in (10, 70):
        picture[:, 40:80, left : left + 40] = 0
        picture[:, 60:64, left : left + 40] = 1  # a thin line through the thing
    picture[:, 5:8, 5:8] = 0
    assert count_things(picture) == 2


def test_the_middle_is_no_place() -> None:
    picture = torch.ones(3, 64, 64)
    picture[:, 28:36, 30:38] = 0
    assert place_of(picture) is None
    assert place_of(picture.roll((16, -16), (1, 2))) == "in the bottom left corner"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("This is a red apple.", {0}),
        ("An APPLE!", {0}),
        ("three apples, in the flat style", {0}),
        ("a green apple", {1}),  # not the red one, whose alias the text ends with
        ("a pineapple", set()),
        ("a fox on a hill", {6}),
        ("a fox, in the flat style, at night", {4}),
        ("a bridge at night", {2}),
        ("two foxes and a money-mouth face", {3, 4}),
        ("a money mouth", {3}),
        ("a flat shoe in flat style", {5}),
        ("a 3D shoe on a blue background", {5}),
        ("something else", set()),
        ("", set()),
    ],
)
def test_names_are_found_as_whole_words_the_longest_first(text: str, numbers: set[int]) -> None:
    assert Names(CONCEPTS).named(text) == numbers


def test_a_plain_picture_is_composed_as_in_training(icons: IconSet) -> None:
    from anygen.training.compose import compose

    white = torch.ones(1, 3, 32, 32)
    wanted = compose(icons.pixels[[7]], [Drawing(label="", background="white")], white)
    assert torch.equal(on_white(icons, [7]), wanted)
