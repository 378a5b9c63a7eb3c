"""What is read from clips, on true clips of known motion."""

import random

import pytest
import torch

from anygen.training.captions import Drawing
from anygen.training.icons import IconSet
from anygen.training.measures import on_white
from anygen.training.motion import MotionSource, Shot
from anygen.training.motion_measures import TRACKED, NearestThing, cut_out, middle_of, motion_of, track, turn

TRIANGLE, BAR = 2, 3


def clip_of(icons: IconSet, icon: int, motion: str, background: str | None = None, seed: int = 0) -> torch.Tensor:
    """float[F, 3, S, S]."""
    drawing = Drawing(label="", style=icons.style[icon], background=background)
    return MotionSource(icons, seed=seed, side=64).make([icon], [Shot(drawing=drawing, motion=motion)]).pixels[0]


@pytest.mark.parametrize("background", [None, "orange"])
@pytest.mark.parametrize("motion", TRACKED)
def test_every_motion_is_read_from_a_true_clip(motion: str, background: str | None, large_icons: IconSet) -> None:
    assert motion_of(clip_of(large_icons, TRIANGLE, motion, background)) == motion


def test_a_clip_played_backwards_moves_the_other_way(large_icons: IconSet) -> None:
    pairs = {"moving left": "moving right", "moving up": "moving down", "growing": "shrinking", "spinning": "spinning"}
    for motion, other in pairs.items():
        assert motion_of(clip_of(large_icons, BAR, motion).flip(0)) == other


def test_a_turn_is_measured_clockwise(large_icons: IconSet) -> None:
    clip = clip_of(large_icons, TRIANGLE, "spinning")
    tracked = track(clip)
    assert tracked is not None and turn(clip, tracked) == pytest.approx(0.3927, abs=0.07)  # a sixteenth of a turn
    assert turn(clip.flip(0), tracked) == pytest.approx(-0.3927, abs=0.07)


def test_nothing_has_no_motion() -> None:
    assert motion_of(torch.ones(4, 3, 32, 32)) is None and track(torch.ones(4, 3, 32, 32)) is None


def test_noise_does_not_change_what_is_read(large_icons: IconSet) -> None:
    noise = 0.03 * torch.randn(16, 3, 64, 64, generator=torch.manual_seed(0))
    for motion in ("moving up", "shrinking", "spinning"):
        assert motion_of((clip_of(large_icons, BAR, motion) + noise).clamp(0, 1)) == motion


def test_a_thing_is_known_at_any_size_place_and_plain_background(icons: IconSet) -> None:
    nearest, rng = NearestThing(icons), random.Random(0)
    for icon in range(6):
        motion = rng.choice(["moving left", "growing", "spinning"])
        clip = clip_of(icons, icon, motion, rng.choice([None, "turquoise"]))
        (found,) = nearest.find(middle_of(clip, motion)[None])
        assert nearest.shows(found, int(icons.concept[icon]))


def test_a_speck_does_not_change_what_is_cut_out(large_icons: IconSet) -> None:
    middle = middle_of(clip_of(large_icons, BAR, "moving left"), "moving left")
    speckled = middle.clone()
    speckled[:, 4:6, 58:60] = 0.5  # beyond the border that gives the background's colour
    torch.testing.assert_close(cut_out(speckled[None]), cut_out(middle[None]), rtol=0, atol=1e-6)


def test_what_is_cut_out_touches_the_frame(large_icons: IconSet) -> None:
    small = torch.ones(3, 64, 64)
    small[:, 20:30, 40:44] = 0
    cut = cut_out(torch.stack([small, torch.ones(3, 64, 64)]))
    dark = cut[0, 0] < 0.5
    assert dark.any(1).sum() == 64 and 22 <= dark.any(0).sum() <= 28 and torch.equal(cut[1], torch.ones(3, 64, 64))
    plain = cut_out(on_white(large_icons, [1]))
    assert (plain[0].min(0).values < 0.8).float().mean() > 0.9  # a square fills it
