"""Clips of icons: what moves, where to, and the words for it."""

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from anygen.errors import ConfigError
from anygen.training.captions import HELD_OUT_EVERY, Drawing
from anygen.training.compose import Panoramas, compose, make_backgrounds
from anygen.training.icons import TRAINED_STYLES, IconSet
from anygen.training.measures import Names, foreground
from anygen.training.motion import (
    ANIMATED,
    MOTIONS,
    PANNING,
    STILL,
    ClipBatch,
    MotionSource,
    Shot,
    canonical_clip,
    film_strip,
    is_held_out,
    moving_backgrounds,
    over,
    paint,
    path,
    premultiplied,
    random_shot,
    said_of_clip,
    varied_clip,
)

CPU = torch.device("cpu")
ROCKET = Drawing(label="rocket", style="flat", background="sky")


def make(icons: IconSet, motion: str, *, row: int = 0, **changes: str) -> torch.Tensor:
    """float[F, 3, S, S], on white."""
    shot = Shot(drawing=replace(Drawing(label=""), **changes), motion=motion)  # type: ignore[arg-type]
    return MotionSource(icons, seed=1).make([row], [shot]).pixels[0]


def track(clip: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y of the foreground's centre in canvas widths from the middle, and its area in canvases, a frame each."""
    rows = []
    for picture in clip:
        seen = foreground(picture)
        y, x = seen.nonzero(as_tuple=True)
        side = seen.shape[-1]
        rows.append([*(((line.float().mean() + 0.5) / side - 0.5).item() for line in (x, y)), seen.float().mean()])
    x, y, area = np.array(rows).T
    return x, y, area


@pytest.mark.parametrize(
    ("motion", "x_sign", "y_sign"),
    [("moving left", -1, 0), ("moving right", 1, 0), ("moving up", 0, -1), ("moving down", 0, 1)],
)
def test_moving_goes_steadily_where_the_word_says(motion: str, x_sign: int, y_sign: int, large_icons: IconSet) -> None:
    x, y, _ = track(make(large_icons, motion))
    for places, sign in ((x, x_sign), (y, y_sign)):
        if sign:
            assert (np.diff(places) * sign > 0.01).all() and 0.4 < sign * (places[-1] - places[0]) < 0.7
            assert abs(places[7:9].mean()) < 0.01  # in the middle of the clip it is in the middle
        else:
            assert np.ptp(places) < 0.01


def test_growing_and_shrinking_change_the_size_alone(large_icons: IconSet) -> None:
    for motion, sign in (("growing", 1), ("shrinking", -1)):
        x, y, area = track(make(large_icons, motion))
        assert (np.diff(area) * sign > 0).all() and np.ptp(x) < 0.01 and np.ptp(y) < 0.01
        assert 4 < max(area) / min(area) < 12
        np.testing.assert_allclose(np.diff(np.log(area)), np.diff(np.log(area)).mean(), atol=0.08)  # evenly to the eye


def test_spinning_turns_once_clockwise(large_icons: IconSet) -> None:
    triangle = 2
    clip = make(large_icons, "spinning", row=triangle)
    turned = [torch.rot90(clip[0], -quarter, (1, 2)) for quarter in range(4)]
    for quarter, picture in enumerate(turned):
        assert (clip[4 * quarter] - picture).abs().mean() < 0.01
    assert (turned[1] - turned[3]).abs().mean() > 0.05  # a triangle tells the directions apart
    step = path(Shot(drawing=ROCKET, motion="spinning"), 16)[:, 4]
    np.testing.assert_allclose(np.diff(step), math.pi / 8)


def test_bouncing_comes_down_twice_and_stands_on_its_ground(large_icons: IconSet) -> None:
    clip = make(large_icons, "bouncing", row=1)
    _, y, _ = track(clip)
    low = [frame for frame in range(16) if y[frame] > y.max() - 0.02]
    assert low == [0, 8] and np.ptp(y) > 0.25
    course = path(Shot(drawing=ROCKET, motion="bouncing"), 16)
    ground = course[:, 1] + course[:, 3] / 2
    assert ground.argmax() in (0, 8) and ground[0] == pytest.approx(0.17 + 0.56 / 2)
    assert course[0, 2] > course[0, 3] and course[4, 2] == course[4, 3]  # squashed at the ground only


def test_what_stays_still_is_the_picture_of_it(large_icons: IconSet) -> None:
    clip = make(large_icons, STILL, background="blue")
    assert bool((clip == clip[:1]).all())
    drawing = Drawing(label="", background="blue")
    picture = compose(large_icons.pixels[:1], [drawing], make_backgrounds([drawing], {}, 128, random.Random(0), CPU))
    assert (clip[0] - picture[0]).abs().mean() < 0.004


def test_a_camera_pans_over_the_scene_behind_a_subject_that_stays(icons: IconSet) -> None:
    panoramas = Panoramas.stack(icons.panoramas, CPU)
    shots = [Shot(drawing=Drawing(label="", background="city"), motion=motion) for motion in (PANNING, STILL)]
    panned, still = moving_backgrounds(shots, panoramas, 128, 16, random.Random(0), CPU)
    for frame in range(1, 16):
        torch.testing.assert_close(panned[frame, :, :, :-8], panned[frame - 1, :, :, 4:-4], rtol=0, atol=1e-5)
    assert bool((still == still[:1]).all()) and (panned[15] - panned[0]).abs().mean() > 0.01
    course = path(shots[0], 16)
    assert (course == course[:1]).all()


def test_a_size_word_scales_and_the_canvas_may_have_any_side(large_icons: IconSet) -> None:
    shots = [Shot(drawing=Drawing(label="", size=size), motion="moving up") for size in ("small", None, "big")]
    widths = [path(shot, 16)[0, 2] for shot in shots]
    assert widths[0] < 0.7 * widths[1] < widths[1] < 0.8 * widths[2]
    small = MotionSource(large_icons, seed=1, side=32, frames=4).make([0], shots[1:2]).pixels
    large = MotionSource(large_icons, seed=1, frames=4).make([0], shots[1:2]).pixels
    assert small.shape == (1, 4, 3, 32, 32)
    assert (small[0] - F.avg_pool2d(large[0], 4)).abs().mean() < 0.01


def test_painting_puts_an_icon_where_an_affine_grid_puts_it() -> None:
    source = torch.rand(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    course = torch.tensor([[[0.1, -0.2, 0.5, 0.7, 0.6]], [[0.0, 0.0, 1.0, 1.0, 0.0]]])
    painted = paint(source, course, 16)[:, 0]
    for row, (x, y, width, height, angle) in enumerate(course[:, 0].tolist()):
        cos, sin = math.cos(angle), math.sin(angle)
        shift_x, shift_y = -2 * (cos * x + sin * y), -2 * (cos * y - sin * x)
        theta = torch.tensor(
            [[[cos / width, sin / width, shift_x / width], [-sin / height, cos / height, shift_y / height]]]
        )
        grid = F.affine_grid(theta, [1, 4, 32, 32], align_corners=False)
        wanted = F.avg_pool2d(F.grid_sample(source[row : row + 1], grid, align_corners=False), 2)[0]
        torch.testing.assert_close(painted[row], wanted, rtol=0, atol=1e-5)


def test_small_stripes_do_not_alias() -> None:
    icon = torch.zeros(1, 4, 128, 128, dtype=torch.uint8)
    icon[:, 3], icon[:, :3, :, ::2] = 255, 255  # stripes of one pixel
    course = torch.tensor([[[0.0, 0.0, 0.5, 0.5, 0.0]]])
    clip = over(paint(premultiplied(icon, 128), course, 128), torch.full((1, 1, 3, 128, 128), 0.5))
    assert (clip[0, 0, :, 44:84, 44:84] - 0.5).abs().max() < 0.26  # single samples are 0 or 1
    shrunk = premultiplied(icon, 32)
    torch.testing.assert_close(shrunk[0, :3], torch.full((3, 32, 32), 0.5), rtol=0, atol=0.01)


# --- words ---------------------------------------------------------------------------------------------------


def test_canonical_captions_put_the_motion_after_the_subject() -> None:
    said_so = [canonical_clip(Shot(drawing=ROCKET, motion=motion)) for motion in ("moving up", PANNING, ANIMATED, None)]
    assert said_so == [
        "a rocket moving up, in the flat style, in the sky",
        "a rocket in a panning view, in the flat style, in the sky",
        "a rocket in motion, in the flat style, in the sky",
        "a rocket, in the flat style, in the sky",
    ]


@pytest.mark.parametrize("motion", [*MOTIONS, ANIMATED])
def test_varied_captions_say_all_of_it_and_never_picture(motion: str) -> None:
    rng, shot = random.Random(0), Shot(drawing=ROCKET, motion=motion)
    captions = {varied_clip(shot, rng) for _ in range(300)}
    assert len(captions) > 30
    for caption in captions:
        assert "rocket" in caption and "flat" in caption and "in the sky" in caption, caption
        assert not any(noun in caption for noun in ("picture", "drawing", "icon", "image", "illustration")), caption
    assert any(" clip of a rocket" in caption for caption in captions)


def test_the_words_of_two_motions_never_agree() -> None:
    words = Counter(word for motion, others in MOTIONS.items() for word in (motion, *others))
    assert max(words.values()) == 1
    ups = {varied_clip(Shot(drawing=ROCKET, motion="moving up"), random.Random(n)) for n in range(300)}
    downs = {varied_clip(Shot(drawing=ROCKET, motion="moving down"), random.Random(n)) for n in range(300)}
    assert ups.isdisjoint(downs)


def test_a_label_that_holds_a_picture_keeps_it() -> None:
    shot = Shot(drawing=Drawing(label="framed picture", style="flat"), motion="moving up")
    captions = {varied_clip(shot, random.Random(n)) for n in range(200)}
    assert all("framed picture" in caption for caption in captions)
    assert not any("picture of" in caption for caption in captions)


def test_the_words_of_motions_name_no_concept(icons: IconSet) -> None:
    names = Names(icons.concepts)
    assert not any(names.named(word) for motion, others in MOTIONS.items() for word in (motion, *others))


def test_a_speaker_may_leave_the_motion_open(icons: IconSet) -> None:
    shot, rng = Shot(drawing=ROCKET, motion="moving up"), random.Random(0)
    unsaid = [said_of_clip(shot, icons.concepts[0], rng, open_motion=0.3).motion is None for _ in range(1000)]
    assert 0.25 < np.mean(unsaid) < 0.35
    assert said_of_clip(shot, icons.concepts[0], rng).motion == "moving up"


# --- the source ----------------------------------------------------------------------------------------------


def drawn(icons: IconSet, *, held_out: bool) -> set[tuple[int, str | None, str | None]]:
    batches = MotionSource(icons, seed=3, side=8, frames=2, held_out=held_out).clips(600, most=120)
    return {(c, s.drawing.style, s.motion) for b in batches for c, s in zip(b.concepts, b.shots, strict=True)}


def test_what_is_held_out_is_never_in_training(icons: IconSet) -> None:
    trained, held = drawn(icons, held_out=False), drawn(icons, held_out=True)
    assert held and trained and trained.isdisjoint(held)


def test_icons_without_a_held_out_motion_have_no_turn_there(icons: IconSet) -> None:
    bare = [
        row
        for row, style in enumerate(icons.style)
        if not any(
            is_held_out(Shot(drawing=Drawing(label="", style=style), motion=motion), int(icons.concept[row]))
            for motion in MOTIONS
        )
    ]
    kept = MotionSource(icons, seed=0, side=8, frames=1, held_out=True)
    assert bare and not {icon for batch in kept.clips(100) for icon in batch.icons} & set(bare)
    few = replace(
        icons, pixels=icons.pixels[bare], concept=icons.concept[bare], style=tuple(icons.style[b] for b in bare)
    )
    with pytest.raises(ConfigError, match="none of these icons has a motion that is held out"):
        next(MotionSource(few, seed=0, held_out=True).clips(1))


def test_about_one_combination_in_so_many_is_held_out_and_nothing_that_stays_still() -> None:
    def share(motions: list[str | None]) -> float:
        combinations = [
            (Shot(drawing=Drawing(label="", style=style), motion=motion), concept)
            for style in TRAINED_STYLES
            for motion in motions
            for concept in range(300)
        ]
        return float(np.mean([is_held_out(*combination) for combination in combinations]))

    assert share([motion for motion in MOTIONS if motion != STILL]) == pytest.approx(1 / HELD_OUT_EVERY, rel=0.15)
    assert share([STILL, ANIMATED, None]) == 0


def test_background_and_wording_do_not_decide_what_is_held_out() -> None:
    for concept in range(200):
        shots = [
            Shot(drawing=Drawing(label=label, style="flat", background=ground), motion="spinning")
            for label, ground in (("a", "red"), ("b", "forest"), ("c", None))
        ]
        assert len({is_held_out(shot, concept) for shot in shots}) == 1


def test_the_seed_decides_the_clips(icons: IconSet) -> None:
    def first(seed: int) -> ClipBatch:
        return next(MotionSource(icons, seed=seed, frames=3).clips(12))

    one, same, other = first(5), first(5), first(6)
    assert torch.equal(one.pixels, same.pixels) and one.shots == same.shots
    assert one.icons != other.icons


def test_clips_are_complete_and_in_range(icons: IconSet) -> None:
    batches = list(MotionSource(icons, seed=0, frames=3).clips(60, most=25))
    assert [b.pixels.shape[0] for b in batches] == [25, 25, 10]
    assert sorted(icon for b in batches for icon in b.icons)[::2] == list(range(30))  # each icon once a pass
    for b in batches:
        assert b.pixels.shape[1:] == (3, 3, 32, 32) and 0 <= b.pixels.min() and b.pixels.max() <= 1
        assert b.concepts == icons.concept[b.icons].tolist()
        assert all(s.drawing.count == 1 and s.drawing.place is None for s in b.shots)


def test_every_motion_is_shown_about_equally_often(icons: IconSet) -> None:
    rng = random.Random(0)
    counts = Counter(random_shot(icons.concepts[0], "flat", rng).motion for _ in range(5000))
    assert set(counts) == set(MOTIONS) and min(counts.values()) > 400
    panned = [shot for shot in (random_shot(icons.concepts[0], "flat", rng) for _ in range(500))
              if shot.motion == PANNING]  # fmt: skip
    assert all(shot.drawing.background in icons.panoramas for shot in panned)


def test_one_frame_shows_the_middle_of_a_motion() -> None:
    for motion in MOTIONS:
        (only,), course = path(Shot(drawing=ROCKET, motion=motion), 1), path(Shot(drawing=ROCKET, motion=motion), 3)
        if motion not in ("spinning", "bouncing"):
            np.testing.assert_allclose(only, course[1], atol=1e-9)


def test_a_film_strip_shows_frames_side_by_side() -> None:
    clip = torch.rand(5, 3, 4, 4)
    strip = film_strip(clip, every=2)
    assert strip.shape == (3, 4, 12) and torch.equal(strip[:, :, 8:], clip[4])
