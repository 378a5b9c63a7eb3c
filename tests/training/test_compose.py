"""Icons on backgrounds, where the drawing says."""

import random

import pytest
import torch
from torch.nn import functional as F

from anygen.training.captions import COLOURS, PLACES, Drawing
from anygen.training.compose import BIG, NORMAL, SMALL, Panoramas, compose, make_backgrounds, placements
from anygen.training.icons import IconSet
from anygen.training.measures import border, count_things, foreground, place_of

CPU = torch.device("cpu")


def paint(icons: IconSet, drawings: list[Drawing], rows: list[int] | None = None) -> torch.Tensor:
    grounds = make_backgrounds(drawings, icons.panoramas, icons.pixels.shape[-1], random.Random(0), CPU)
    return compose(icons.pixels[rows or [0] * len(drawings)], drawings, grounds)


@pytest.mark.parametrize("place", PLACES)
def test_a_placed_icon_has_its_centre_of_mass_there(place: str, large_icons: IconSet) -> None:
    (picture,) = paint(large_icons, [Drawing(label="", place=place)])
    rows, columns = foreground(picture).nonzero(as_tuple=True)
    x, y = ((line.float().mean() + 0.5) / 128 - 0.5 for line in (columns, rows))
    assert (x.item(), y.item()) == pytest.approx(PLACES[place], abs=0.01)
    assert place_of(picture) == place


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_counts_give_that_many_blobs_of_one_size(count: int, large_icons: IconSet) -> None:
    for row in range(6):
        (picture,) = paint(large_icons, [Drawing(label="", count=count, background="turquoise")], [row])
        assert count_things(picture) == count
    alone, several = (
        foreground(paint(large_icons, [drawing])[0]).sum().item()
        for drawing in (Drawing(label="", size="small"), Drawing(label="", count=count))
    )
    assert count == 1 or several / alone == pytest.approx(count, rel=0.1)


@pytest.mark.parametrize("word", COLOURS)
def test_a_plain_background_has_the_stated_colour(word: str, icons: IconSet) -> None:
    (picture,) = paint(icons, [Drawing(label="", background=word)])
    torch.testing.assert_close(border(picture), torch.tensor(COLOURS[word]) / 255)


def test_unsaid_the_background_is_white(icons: IconSet) -> None:
    assert torch.equal(paint(icons, [Drawing(label="")]), paint(icons, [Drawing(label="", background="white")]))


def test_sizes_scale_the_area(large_icons: IconSet) -> None:
    drawings = [Drawing(label="", size="small"), Drawing(label=""), Drawing(label="", size="big")]
    pictures = paint(large_icons, drawings)
    areas = torch.stack([foreground(picture).sum() for picture in pictures]).float()
    wanted = torch.tensor([SMALL, NORMAL, BIG]) ** 2
    torch.testing.assert_close(areas / areas[1], wanted / wanted[1], rtol=0.06, atol=0)


def test_a_placed_icon_is_small_unless_it_is_said_to_be_big() -> None:
    assert placements(Drawing(label="", place="on the left")) == [(-0.25, 0.0, SMALL)]
    assert placements(Drawing(label="", place="on the left", size="big")) == [(-0.25, 0.0, BIG)]


def test_a_transparent_icon_leaves_the_background(icons: IconSet) -> None:
    drawings = [Drawing(label="", count=3, background="forest"), Drawing(label="", background="red")]
    grounds = make_backgrounds(drawings, icons.panoramas, 32, random.Random(0), CPU)
    assert torch.equal(compose(torch.zeros(2, 4, 32, 32, dtype=torch.uint8), drawings, grounds), grounds)


def test_an_opaque_icon_keeps_its_colour(icons: IconSet) -> None:
    icon = torch.tensor([12, 200, 90, 255], dtype=torch.uint8).view(1, 4, 1, 1).expand(1, 4, 32, 32)
    picture = compose(icon, [Drawing(label="", background="red")], torch.zeros(1, 3, 32, 32))[0]
    torch.testing.assert_close(picture[:, 8:24, 8:24], (icon[0, :3, 8:24, 8:24] / 255), rtol=0, atol=1e-6)


def test_a_picture_does_not_depend_on_its_batch(icons: IconSet) -> None:
    drawings = [
        Drawing(label="", count=4),
        Drawing(label="", size="big", background="blue"),
        Drawing(label="", place="at the top"),
        Drawing(label=""),
    ]
    together = paint(icons, drawings, [0, 1, 2, 3])
    for row, drawing in enumerate(drawings):
        torch.testing.assert_close(paint(icons, [drawing], [row])[0], together[row])


def test_a_shrunk_icon_does_not_alias() -> None:
    icon = torch.zeros(1, 4, 128, 128, dtype=torch.uint8)
    icon[:, 3], icon[:, :3, :, ::2] = 255, 255  # stripes of one pixel
    small = compose(icon, [Drawing(label="", size="small")], torch.full((1, 3, 128, 128), 0.5))[0]
    torch.testing.assert_close(small[:, 50:78, 50:78], torch.full((3, 28, 28), 0.5), rtol=0, atol=0.01)


def test_a_scene_is_a_view_of_its_panorama(icons: IconSet) -> None:
    scene = {"sky": torch.full((3, 256, 512), 100, dtype=torch.uint8), "city": icons.panoramas["city"]}
    drawings = [Drawing(label="", background="sky"), Drawing(label="", background="city")]
    sky, city = make_backgrounds(drawings, scene, 32, random.Random(1), CPU)
    torch.testing.assert_close(sky, torch.full((3, 32, 32), 100 / 255))
    assert city.std() > 0
    again = make_backgrounds(drawings, scene, 32, random.Random(1), CPU)[1]
    other = make_backgrounds(drawings, scene, 32, random.Random(2), CPU)[1]
    assert torch.equal(city, again) and not torch.equal(city, other)


def test_copies_lie_where_an_affine_grid_puts_them(icons: IconSet) -> None:
    drawings = [Drawing(label="", count=3), Drawing(label="", place="at the top"), Drawing(label="", count=2)]
    grounds = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    composed = compose(icons.pixels[[3, 4, 5]], drawings, grounds)
    for row, drawing in enumerate(drawings):
        rgba = icons.pixels[[3 + row]].float() / 255
        rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
        rgba = F.avg_pool2d(F.pad(rgba, (1, 0, 1, 0), mode="replicate"), 2, stride=1)
        canvas = grounds[[row]]
        for x, y, scale in placements(drawing):
            theta = torch.tensor([[[1 / scale, 0, -2 * x / scale], [0, 1 / scale, -2 * y / scale]]])
            placed = F.grid_sample(rgba, F.affine_grid(theta, [1, 4, 32, 32], align_corners=False), align_corners=False)
            canvas = placed[:, :3] + (1 - placed[:, 3:]) * canvas
        torch.testing.assert_close(composed[row], canvas[0], rtol=0, atol=2e-5)


def test_composing_leaves_its_inputs_alone(icons: IconSet) -> None:
    pixels, grounds = icons.pixels[:2].clone(), torch.full((2, 3, 32, 32), 0.5)
    compose(pixels, [Drawing(label="", count=4), Drawing(label="")], grounds)
    assert torch.equal(pixels, icons.pixels[:2]) and bool((grounds == 0.5).all())


def test_stacked_panoramas_give_the_same_views(icons: IconSet) -> None:
    drawings = [Drawing(label="", background=name) for name in ("night", "red", "forest", "night")]
    stacked = Panoramas.stack(icons.panoramas, CPU)
    one, same = (make_backgrounds(drawings, p, 32, random.Random(4), CPU) for p in (icons.panoramas, stacked))
    assert torch.equal(one, same)
