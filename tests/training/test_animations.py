"""The animated icons: what is built of a package, what is read back, and clips of them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anygen.errors import CheckpointError, ConfigError, HubError
from anygen.training import animations as module
from anygen.training.animations import (
    ALPHA_QUALITY,
    PACKAGES,
    SIDE,
    AnimationSet,
    AnimationSource,
    build,
    film_strip_of,
    load_animations,
)
from anygen.training.icons import Concept, IconSet
from anygen.training.measures import foreground
from anygen.training.motion import ANIMATED
from anygen.training.packages import NpmPackage

COLOURS = ((220, 30, 30), (30, 160, 60), (30, 60, 220), (240, 200, 30))


def animated(frames: int, *, colour: int = 0, side: int = 64) -> bytes:
    """A ball that goes from left to right, on nothing."""
    pictures = []
    for frame in range(frames):
        picture = np.zeros((side, side, 4), np.uint8)
        left = round(frame / max(1, frames - 1) * side / 2)
        picture[side // 4 : 3 * side // 4, left : left + side // 2] = (*COLOURS[colour], 255)
        pictures.append(Image.fromarray(picture))
    buffer = io.BytesIO()
    pictures[0].save(buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=40, lossless=True)
    return buffer.getvalue()


def decoded(strip: bytes) -> np.ndarray:
    """uint8[F, S, S, 4]."""
    picture = np.asarray(Image.open(io.BytesIO(strip)).convert("RGBA"))
    return np.stack(np.split(picture, picture.shape[1] // SIDE, axis=1))


@pytest.mark.parametrize("length", [13, 16, 72])
def test_sixteen_frames_are_taken_evenly_from_any_loop(length: int) -> None:
    frames = decoded(film_strip_of(animated(length)))
    assert frames.shape == (16, SIDE, SIDE, 4)
    places = [np.nonzero(frame[..., 3] > 128)[1].mean() / SIDE for frame in frames]
    wanted = [0.25 + 0.5 * (n * length // 16) / (length - 1) for n in range(16)]
    np.testing.assert_allclose(places, wanted, atol=0.02)
    middle = frames[8, SIDE // 2, round(places[8] * SIDE)]
    assert middle[3] > 250 and np.abs(middle[:3].astype(int) - COLOURS[0]).max() < 12


def test_edges_keep_their_colour_and_the_ground_stays_clear() -> None:
    frame = decoded(film_strip_of(animated(16, side=256)))[0]
    half = (frame[..., 3] > 60) & (frame[..., 3] < 200)
    assert not half.any() or np.abs(frame[half][:, :3].astype(int) - COLOURS[0]).max() < 60
    assert frame[:, -SIDE // 4 :, 3].max() < 30 and 0 < ALPHA_QUALITY < 100


def test_a_picture_that_does_not_move_gives_nothing() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (64, 64), "red").save(buffer, "WEBP")
    assert film_strip_of(buffer.getvalue()) == b""
    clear = [Image.new("RGBA", (8, 8), (shade, 0, 0, 20)) for shade in (0, 200)]
    buffer = io.BytesIO()
    clear[0].save(buffer, "WEBP", save_all=True, append_images=clear[1:], lossless=True, duration=40)
    assert film_strip_of(buffer.getvalue()) == b""


# --- the build -----------------------------------------------------------------------------------------------


def write_tarball(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


EMOJI = {"1F34E": "red apple", "1F680": "rocket", "1F415": "dog", "2764": "red heart"}
FOREIGN = "1f468-1f3fb-200d-1f4bb"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two small packages in place of the pinned ones."""
    cache = tmp_path / "cache"
    entries = [{"hexcode": code, "label": label, "group": 3} for code, label in EMOJI.items()]
    entries.append({"hexcode": FOREIGN.upper(), "label": "not Microsoft's", "group": 1})
    shortcodes = {f"en/shortcodes/{source}.json": b"{}" for source in ("iamcal", "github", "joypixels", "emojibase")}
    files = {"en/data.json": json.dumps(entries).encode(), **shortcodes}
    write_tarball(cache / "emojibase-data-17.0.0.tgz", files)
    still = io.BytesIO()
    Image.new("RGBA", (64, 64), "red").save(still, "WEBP")
    one, two = (NpmPackage(f"@lobehub/fluent-emoji-anim-{n}", "1.0.0", "", "MIT") for n in (1, 2))
    foreign, dog = animated(16), still.getvalue()
    write_tarball(cache / one.tarball, {"assets/1f680.webp": animated(20), f"assets/{FOREIGN}.webp": foreign})
    shown = {"assets/2764-fe0f.webp": animated(16, colour=1), "assets/1f34e.webp": animated(30, colour=2)}
    write_tarball(cache / two.tarball, {**shown, "assets/1f415.webp": dog, "assets/1f9ff.webp": foreign})
    monkeypatch.setattr(module, "PACKAGES", (one, two))

    def fetch(package: NpmPackage, cache: Path) -> Path:
        if not (cache / package.tarball).exists():
            source = tmp_path / "registry" / package.tarball
            (cache / package.tarball).write_bytes(source.read_bytes())
        return cache / package.tarball

    monkeypatch.setattr(module, "fetch", fetch)
    return cache


def test_the_build_keeps_what_moves_and_is_microsoft_s_in_the_order_of_concepts(packages: Path, tmp_path: Path) -> None:
    checksum = build(tmp_path / "out", packages, workers=1)
    made = AnimationSet.load(tmp_path / "out", verify=True)
    assert [concept.label for concept in made.concepts] == ["red apple", "rocket", "red heart"]
    assert made.pixels.shape == (3, 16, 4, SIDE, SIDE) and made.checksum == checksum
    for row, colour in enumerate((2, 0, 1)):
        opaque = made.pixels[row].permute(1, 0, 2, 3)[:, made.pixels[row][:, 3] > 250].float().mean(1)
        torch.testing.assert_close(opaque[:3], torch.tensor(COLOURS[colour]).float(), rtol=0, atol=6)


def test_building_again_gives_the_same_files(packages: Path, tmp_path: Path) -> None:
    one, other = (build(tmp_path / name, packages, workers=workers) for name, workers in (("a", 1), ("b", 2)))
    assert one == other
    for name in ("animations.json", "animations.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_tarballs_that_had_to_be_fetched_are_deleted_and_others_kept(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    tarball = module.PACKAGES[1].tarball
    (packages / tarball).rename(tmp_path / "registry" / tarball)
    build(tmp_path / "out", packages, workers=1)
    assert sorted(path.name for path in packages.iterdir()) == [
        "emojibase-data-17.0.0.tgz", module.PACKAGES[0].tarball,
    ]  # fmt: skip


def test_another_package_than_the_pinned_is_refused(tmp_path: Path) -> None:
    (tmp_path / "emojibase-data-17.0.0.tgz").write_bytes(b"other")
    with pytest.raises(HubError, match="not the pinned"):
        build(tmp_path / "out", tmp_path, workers=1)
    assert len({package.sha256 for package in PACKAGES}) == 4 and {package.licence for package in PACKAGES} == {"MIT"}


def test_what_was_changed_or_is_not_there_is_told(packages: Path, tmp_path: Path) -> None:
    checksum = build(tmp_path / "out", packages, workers=1)
    assert load_animations(tmp_path / "out", checksum).checksum == checksum
    with pytest.raises(ConfigError, match=f"the recipe pins the animations aaaa…, .* holds {checksum[:12]}…"):
        load_animations(tmp_path / "out", "aaaa")
    index = json.loads((tmp_path / "out" / "animations.json").read_text())
    index["concepts"][0]["label"] = "green apple"
    (tmp_path / "out" / "animations.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="do not have the checksum that they state"):
        AnimationSet.load(tmp_path / "out", verify=True)
    with pytest.raises(CheckpointError, match="there are no animations in .* 'anygen data build animations --out DIR'"):
        AnimationSet.load(tmp_path)


# --- clips ---------------------------------------------------------------------------------------------------


def make_set(icons: IconSet) -> AnimationSet:
    """Two of the icons' concepts, each a ball that goes from left to right."""
    strips = [decoded(film_strip_of(animated(16, colour=colour))) for colour in (0, 2)]
    pixels = torch.from_numpy(np.stack(strips)).permute(0, 1, 4, 2, 3).contiguous()
    return AnimationSet((icons.concepts[4], icons.concepts[1]), pixels, "")


def test_a_clip_shows_the_loop_in_order_from_any_frame_on(icons: IconSet) -> None:
    source = AnimationSource(make_set(icons), icons, seed=0, side=64)
    batches = list(source.clips(12, most=5))
    assert [len(batch.icons) for batch in batches] == [5, 5, 2]
    begins = set()
    for batch in batches:
        assert batch.pixels.shape[1:] == (16, 3, 64, 64) and 0 <= batch.pixels.min() and batch.pixels.max() <= 1
        assert batch.concepts == [(4, 1)[row] for row in batch.icons]
        assert all(shot.motion == ANIMATED and shot.drawing.style == "3D" for shot in batch.shots)
        for clip, shot in zip(batch.pixels, batch.shots, strict=True):
            if shot.drawing.background == "white":
                places = np.array([foreground(frame).nonzero()[:, 1].float().mean().item() for frame in clip])
                steps = np.diff([*places, places[0]])
                assert (steps > 0).sum() == 15 and (steps < 0).sum() == 1  # once around
                begins.add(int(steps.argmin()))
    assert len(begins) > 1


def test_fewer_frames_show_the_whole_loop(icons: IconSet) -> None:
    clip = next(AnimationSource(make_set(icons), icons, seed=0, side=32, frames=4).clips(8))
    plain = [row for row, shot in enumerate(clip.shots) if shot.drawing.background == "white"]
    for row in plain:
        places = sorted(foreground(frame).nonzero()[:, 1].float().mean().item() / 32 for frame in clip.pixels[row])
        assert len(places) == 4 and places[-1] - places[0] > 0.25
    assert plain


def test_the_seed_decides_the_clips(icons: IconSet) -> None:
    def first(seed: int) -> Any:
        return next(AnimationSource(make_set(icons), icons, seed=seed, side=16).clips(6))

    one, same, other = first(5), first(5), first(6)
    assert torch.equal(one.pixels, same.pixels) and one.shots == same.shots and one.shots != other.shots


def test_a_concept_that_the_icons_lack_is_named(icons: IconSet) -> None:
    strange = AnimationSet((Concept("1f9ff", "nazar amulet", (), 7),), torch.zeros(1, 16, 4, 8, 8).byte(), "")
    with pytest.raises(ConfigError, match="concepts that the icon set lacks: nazar amulet"):
        AnimationSource(strange, icons, seed=0)
