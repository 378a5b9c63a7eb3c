"""Building and loading the icon set, from small packages made here."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anygen.errors import CheckpointError
from anygen.training import icons as icons_module
from anygen.training.icons import (
    SCENES,
    SIDE,
    STYLES,
    TRAINED_STYLES,
    IconSet,
    _render,
    build,
    plain_code,
    plain_words,
    read_concepts,
)
from anygen.training.packages import NpmPackage

DISC = '<circle cx="8" cy="8" r="6" fill="#e02020"/>'
EMOJI = [
    {"hexcode": "1F534", "label": "red circle", "group": 8},
    {"hexcode": "2764-FE0F", "label": "heart & love", "group": 0},
    {"hexcode": "1F1E9-1F1EA", "label": "flag: Germany", "group": 9},
    {"hexcode": "1F3FB", "label": "light skin tone", "group": 2},
    {"hexcode": "1F385", "label": "Santa’s hat", "group": 1},
]
SHORTCODES = {
    "iamcal": {"1F534": "red_circle", "2764-FE0F": ["heart", "love"], "1F385": "santa_wwbb"},
    "github": {"1F534": "disc", "1F385": "love"},
    "joypixels": {},
    "emojibase": {"1F534": "ja_red"},
}


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """An npm tarball."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def emojibase(folder: Path) -> Path:
    files = {"en/data.json": json.dumps(EMOJI).encode()}
    files |= {f"en/shortcodes/{name}.json": json.dumps(words).encode() for name, words in SHORTCODES.items()}
    return pack(folder / "emojibase.tgz", files)


def webp(colour: tuple[int, int, int, int], size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", size, colour).save(buffer, "WEBP", lossless=True, exact=True)
    return buffer.getvalue()


def panoramas(folder: Path) -> Path:
    import OpenEXR

    light = np.full((16, 32, 3), 0.5, dtype=np.float32)
    light[8, 8] = (np.inf, 3, 1)
    for n, name in enumerate((*SCENES, "warehouse")):
        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        with OpenEXR.File(header, {"RGB": light * (n + 1)}) as file:
            file.write(str(folder / f"{name}.exr"))
    files = {
        f"hdri/{path.stem}.exr.js": b'export default "data:;base64,' + base64.b64encode(path.read_bytes()) + b'"'
        for path in sorted(folder.glob("*.exr"))
    }
    return pack(folder / "panoramas.tgz", files)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The set of two concepts in six styles; the sticker style matches by name and lacks the heart."""
    folder = tmp_path_factory.mktemp("packages")
    drawn = {"icons": {"red": {"body": DISC}, "love": {"body": DISC}, "nothing": {"body": ""}}, "width": 16}
    by_code = {"icons.json": drawn, "chars.json": {"1f534": "red", "2764": "love", "1f385": "nothing"}}
    by_name = {"icons.json": {"icons": {"red-circle": {"body": DISC}}}, "chars.json": {}}
    tarballs = {"emojibase-data": emojibase(folder), "@pmndrs/assets": panoramas(folder)}
    for style in STYLES:
        name = folder / f"{style.word}.tgz"
        if style.word == "3D":
            tarballs[style.package.name] = pack(name, {"assets/1f534.webp": webp((30, 40, 250, 255))})
        else:
            files = by_name if style.word == "sticker" else by_code
            contents = {path: json.dumps(data).encode() for path, data in files.items()}
            tarballs[style.package.name] = pack(name, contents)

    def fetched(package: NpmPackage, cache: Path) -> Path:
        return tarballs[package.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icons_module, "fetch", fetched)
        checksum = build(folder / "set", folder, workers=1)
        assert build(folder / "again", folder, workers=2) == checksum
    return folder / "set", checksum


def test_names_are_plain() -> None:
    assert plain_code("2764-FE0F-200D-1F525") == "2764-200d-1f525"
    assert plain_words("seven o’clock") == "seven o'clock"
    assert plain_words("keycap: #") == "keycap hash"
    assert plain_words("São Tomé & Príncipe") == "Sao Tome and Principe"


def test_concepts_have_the_names_that_are_theirs_alone(tmp_path: Path) -> None:
    concepts = {concept.code: concept for concept in read_concepts(emojibase(tmp_path))}
    assert list(concepts) == ["1f534", "2764", "1f385"]  # no country, no skin tone
    assert concepts["1f534"].aliases == ("disc",)  # not its own label, not a code that nobody says
    assert concepts["2764"].label == "heart and love"
    assert concepts["2764"].aliases == ("heart",)  # "love" is claimed by two
    assert concepts["1f385"].label == "Santa's hat" and concepts["1f385"].aliases == ()


def test_a_built_set_holds_what_each_style_draws(built: tuple[Path, str]) -> None:
    icons = IconSet.load(built[0], styles=None, verify=True)
    assert icons.checksum == built[1]
    shown = [(icons.concepts[int(c)].label, s) for c, s in zip(icons.concept, icons.style, strict=True)]
    one, two = [("red circle", s.word) for s in STYLES], ("heart and love", "sticker")
    assert set(one) <= set(shown) and two not in shown and ("heart and love", "3D") not in shown
    assert len(shown) == 10  # the empty drawing is left out
    assert icons.pixels.shape == (10, 4, SIDE, SIDE) and icons.pixels.dtype == torch.uint8


def test_a_disc_is_red_inside_and_clear_outside(built: tuple[Path, str]) -> None:
    icons = IconSet.load(built[0], styles=("flat",))
    alpha, middle = icons.pixels[0, 3], icons.pixels[0, :, SIDE // 2, SIDE // 2]
    torch.testing.assert_close(middle.float(), torch.tensor([224.0, 32, 32, 255]), rtol=0, atol=6)
    assert alpha[0, 0] == 0 and (alpha > 128).float().mean().item() == pytest.approx(np.pi * (6 / 16) ** 2, abs=0.01)


def test_the_held_out_style_is_loaded_on_request_alone(built: tuple[Path, str]) -> None:
    assert set(IconSet.load(built[0]).style) == set(TRAINED_STYLES)
    assert set(IconSet.load(built[0], styles=("emojione",)).style) == {"emojione"}
    assert "emojione" not in TRAINED_STYLES


def test_panoramas_are_toned_and_their_broken_pixels_mended(built: tuple[Path, str]) -> None:
    views = IconSet.load(built[0]).panoramas
    assert set(views) == set(SCENES)  # not the warehouse
    assert all(view.shape == (3, 256, 512) and view.dtype == torch.uint8 for view in views.values())
    spread = views["forest"].float().flatten(1).std(1)
    assert (spread < 3).all()  # the light is even, but for the pixel that overflowed


def test_changed_pixels_are_noticed(built: tuple[Path, str], tmp_path: Path) -> None:
    for name in ("icons.safetensors", "icons.json"):
        (tmp_path / name).write_bytes((built[0] / name).read_bytes())
    index: dict[str, Any] = json.loads((tmp_path / "icons.json").read_text())
    index["icons"][0]["style"] = "flat"
    (tmp_path / "icons.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="does not have the checksum that it states"):
        IconSet.load(tmp_path, verify=True)


def test_a_set_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no icon set in .*: make it with 'anygen data build icons --out DIR'"):
        IconSet.load(tmp_path)


def test_resizing_does_not_bleed_the_colour_of_clear_pixels() -> None:
    picture = Image.new("RGBA", (512, 512), (0, 255, 0, 0))
    picture.paste((200, 0, 0, 255), (128, 128, 384, 384))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    out = np.array(Image.open(io.BytesIO(_render(buffer.getvalue()))).convert("RGBA")).astype(int)
    seen = out[out[..., 3] > 100]
    assert out.shape == (SIDE, SIDE, 4) and seen[:, 1].max() < 40


def test_a_wide_drawing_lies_in_the_middle_of_its_square() -> None:
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 16">'
    blob = _render(f'{head}<rect width="32" height="16" fill="red"/></svg>'.encode())
    alpha = np.array(Image.open(io.BytesIO(blob)).convert("RGBA"))[..., 3] > 128
    assert alpha[32:96].all() and not alpha[:30].any() and not alpha[98:].any()


def test_nothing_drawn_is_nothing() -> None:
    assert _render(b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"></svg>') == b""
