"""The endless source of composed pictures, and what it keeps for measuring."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from anygen.errors import ConfigError
from anygen.training.captions import COLOURS, HELD_OUT_EVERY, PLACES, Drawing
from anygen.training.icons import TRAINED_STYLES, IconSet
from anygen.training.pictures import PicturePool, PictureSource, is_held_out, load_icons, turned


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


def test_the_key_decides_what_is_held_out() -> None:
    for concept, drawing in (
        (7, Drawing(label="", style="flat", count=3, background="forest")),
        (1234, Drawing(label="", style="3D", size="big", background="white")),
        (52, Drawing(label="", place="in the bottom right corner")),
    ):
        parts = (concept, drawing.style, drawing.count, drawing.size, drawing.place, drawing.background)
        key = "|".join(str(part) for part in parts)
        total = sum(position * ord(letter) for position, letter in enumerate(key, start=1))
        assert is_held_out(drawing, concept) == (total % HELD_OUT_EVERY == 0)


def test_a_number_of_pictures_is_the_start_of_the_endless_batches(icons: IconSet) -> None:
    batches = list(PictureSource(icons, seed=5).pictures(40, most=16))
    assert [len(batch.icons) for batch in batches] == [16, 16, 8]
    for batch, endless in zip(batches[:2], PictureSource(icons, seed=5).batches(16), strict=False):
        assert torch.equal(batch.pixels, endless.pixels) and batch.drawings == endless.drawings


def test_a_pool_keeps_the_source_s_pictures(icons: IconSet) -> None:
    pool, (batch,) = PicturePool(PictureSource(icons, seed=5), 20), PictureSource(icons, seed=5).pictures(20)
    assert len(pool) == 20 and pool.icons == batch.icons and pool.drawings == batch.drawings
    assert pool.pixels.dtype == torch.uint8 and pool.pixels.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(pool.pixels / 255, batch.pixels, rtol=0, atol=0.501 / 255)


def test_a_pool_draws_its_own_pictures_at_random(icons: IconSet) -> None:
    pool = PicturePool(PictureSource(icons, seed=5), 20)
    torch.manual_seed(0)
    drawn = pool.draw(200)
    assert drawn.is_contiguous(memory_format=torch.channels_last)
    own = pool.pixels.float() / 127.5 - 1
    which = torch.cdist(drawn.flatten(1), own.flatten(1)).argmin(1)
    assert torch.equal(drawn, own[which]) and which.bincount(minlength=20).min() > 0


def test_turned_rows_are_the_other_symmetries_of_the_square() -> None:
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)[:1].repeat(14, 1, 1, 1)
    out = turned(pixels, 0.5)
    assert torch.equal(out[:7], pixels[:7]) and out.is_contiguous(memory_format=torch.channels_last)
    square = [tuple(row.flatten().tolist()) for row in out]
    assert len(set(square)) == 8
    for row in out[7:]:
        back = [turn for k in range(4) for turn in (row.rot90(k, (1, 2)), row.flip(2).rot90(k, (1, 2)))]
        assert any(torch.equal(turn, pixels[0]) for turn in back)


@pytest.mark.parametrize(("share", "moved"), [(0.0, 0), (0.3, 3), (1.0, 10)])
def test_that_share_of_a_batch_is_turned(share: float, moved: int) -> None:
    torch.manual_seed(0)
    pixels = torch.rand(10, 3, 8, 8)
    same = (turned(pixels, share) == pixels).flatten(1).all(1)
    assert same.tolist() == [True] * (10 - moved) + [False] * moved


def test_a_recipe_refuses_another_icon_set(icons_dir: Path, icons: IconSet) -> None:
    assert load_icons(icons_dir, icons.checksum).checksum == load_icons(icons_dir, None).checksum
    with pytest.raises(ConfigError, match=f"the recipe pins the icon set aaaa…, .* holds {icons.checksum[:12]}…"):
        load_icons(icons_dir, "aaaa")
