"""The endless source of composed pictures, and what it keeps for measuring."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from anygen.errors import ConfigError
from anygen.training.captions import COLOURS, PLACES, Drawing
from anygen.training.icons import TRAINED_STYLES, IconSet
from anygen.training.pictures import HELD_OUT_EVERY, PictureSource, is_held_out, load_icons


def drawn(icons: IconSet, *, held_out: bool, batches: int = 12) -> set[tuple[Drawing, int]]:
    source = PictureSource(icons, seed=3, held_out=held_out)
    pairs = [zip(b.drawings, b.icons, strict=True) for b in islice(source.batches(30), batches)]
    return {(drawing, int(icons.concept[icon])) for batch in pairs for drawing, icon in batch}


def test_what_is_held_out_is_never_in_training(icons: IconSet) -> None:
    trained, held = drawn(icons, held_out=False), drawn(icons, held_out=True)
    assert not any(is_held_out(drawing, concept) for drawing, concept in trained)
    assert all(is_held_out(drawing, concept) for drawing, concept in held)
    assert len(trained) > 100 and len(held) > 10 and trained.isdisjoint(held)


def test_about_one_combination_in_so_many_is_held_out() -> None:
    combinations = [
        (Drawing(label="", style=style, place=place, background=colour), concept)
        for style in TRAINED_STYLES
        for place in PLACES
        for colour in COLOURS
        for concept in range(20)
    ]
    share = sum(is_held_out(*combination) for combination in combinations) / len(combinations)
    assert share == pytest.approx(1 / HELD_OUT_EVERY, rel=0.15)


def test_plain_pictures_are_never_held_out() -> None:
    plain = [Drawing(label="", style=s, background=b) for s in TRAINED_STYLES for b in (None, "white")]
    assert not any(is_held_out(drawing, concept) for drawing in plain for concept in range(300))


def test_the_wording_does_not_decide() -> None:
    for concept in range(100):
        one, other = (Drawing(label=label, style="flat", count=2, background="red") for label in ("a", "b"))
        assert is_held_out(one, concept) == is_held_out(other, concept)


def test_each_pass_shows_every_icon_once(icons: IconSet) -> None:
    batches = list(islice(PictureSource(icons, seed=0).batches(10), 6))  # two passes over 30 icons
    passes = [[icon for b in half for icon in b.icons] for half in (batches[:3], batches[3:])]
    assert [sorted(order) for order in passes] == [list(range(30))] * 2 and passes[0] != passes[1]
    assert set(Counter(passes[0]).values()) == {1}


def test_drawings_say_what_the_icons_are(icons: IconSet) -> None:
    batch = next(PictureSource(icons, seed=0).batches(30))
    for icon, drawing in zip(batch.icons, batch.drawings, strict=True):
        assert drawing.label == icons.concepts[int(icons.concept[icon])].label
        assert drawing.style == icons.style[icon]
    assert batch.pixels.shape == (30, 3, 32, 32) and 0 <= batch.pixels.min() and batch.pixels.max() <= 1


def test_a_seed_repeats_the_pictures(icons: IconSet) -> None:
    one, same, other = (next(PictureSource(icons, seed=seed).batches(8)) for seed in (5, 5, 6))
    assert torch.equal(one.pixels, same.pixels) and one.drawings == same.drawings
    assert one.icons != other.icons


def test_a_recipe_refuses_another_icon_set(icons_dir: Path, icons: IconSet) -> None:
    assert load_icons(icons_dir, icons.checksum).checksum == load_icons(icons_dir, None).checksum
    with pytest.raises(ConfigError, match=f"the recipe pins the icon set aaaa…, .* holds {icons.checksum[:12]}…"):
        load_icons(icons_dir, "aaaa")
