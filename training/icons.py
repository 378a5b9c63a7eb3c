"""The icon set that the embedded default learns from: concepts with names, each drawn in up to six styles.

`build` fetches the pinned packages, renders every icon at one size with its alpha, cuts the panoramas to 8 bit, and
writes two files that training reads on any machine without a renderer:

    icons.safetensors   WebP blobs (icons and panoramas) in one uint8 tensor, with their offsets
    icons.json          concepts, and which blob shows which concept in which style; the checksum of the decoded pixels

`IconSet.load` decodes them into tensors. The style `emojione` is held out: it is built for measuring, never trained on.

Shapes: N icons, S side in pixels.
"""

import base64
import hashlib
import io
import json
import re
import unicodedata
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anygen.errors import CheckpointError
from anygen.training.packages import EMOJIBASE, PANORAMAS, NpmPackage, fetch, read_files

SIDE = 128
QUALITY = 92
_COUNTRY_FLAG = re.compile(r"^flag: (?!England|Scotland|Wales)")


@dataclass(frozen=True, slots=True)
class Style:
    """One drawing style: a package and the word that captions use for it."""

    word: str
    package: NpmPackage
    held_out: bool = False


def _iconify(name: str, version: str, sha256: str, licence: str) -> NpmPackage:
    return NpmPackage(f"@iconify-json/{name}", version, sha256, licence)


STYLES = (
    Style(
        "cartoon",
        _iconify("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0"),
    ),
    Style(
        "sticker",
        _iconify("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "CC-BY-4.0"),
    ),
    Style(
        "flat",
        _iconify(
            "fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", "MIT"
        ),
    ),
    Style(
        "3D",
        NpmPackage(
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            "MIT",
        ),
    ),
    Style(
        "retro",
        _iconify("noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", "Apache-2.0"),
    ),
    Style(
        "emojione",
        _iconify("emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", "CC-BY-4.0"),
        held_out=True,
    ),
)
TRAINED_STYLES = tuple(style.word for style in STYLES if not style.held_out)

SCENES = {
    "forest": "in a forest",
    "city": "in a city",
    "park": "in a meadow",
    "sky": "in the sky",
    "venice": "in Venice",
    "dawn": "at dawn",
    "sunset": "at sunset",
    "night": "at night",
    "apartment": "in a room",
    "studio": "in a studio",
    "workshop": "in a workshop",
}
"""Panorama -> the words of a caption. The package's others look like one of these."""


@dataclass(frozen=True, slots=True)
class Concept:
    """One thing that can be drawn."""

    code: str
    """Unicode code points, lower case, joined by '-', without variation selectors."""
    label: str
    """Its name in captions: 'red apple'."""
    aliases: tuple[str, ...]
    """Other names that mean this concept and no other: 'apple'."""
    group: int
    """Emojibase's group: 0 smileys, 1 people, 3 nature, 4 food, 5 travel, 6 activities, 7 objects, 8 symbols."""


def plain_code(code: str) -> str:
    """'1F34E-FE0F' -> '1f34e': lower case, without variation selectors, which packages spell differently."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def plain_words(text: str) -> str:
    """ASCII words: 'seven o’clock' -> "seven o'clock", 'keycap: 10' -> 'keycap 10'."""
    text = text.replace("’", "'").replace("&", "and").replace("#", "hash").replace("*", "asterisk")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"[^A-Za-z0-9' .-]", " ", text).replace(" - ", " ").split())


def read_concepts(tarball: Path) -> list[Concept]:
    """Emojibase's base emoji without country flags and components, with the names that are theirs alone."""
    sources = read_files(tarball, prefix="en/", suffix=".json")
    entries = [
        entry
        for entry in json.loads(sources["en/data.json"])
        if entry.get("group") not in (None, 2) and not _COUNTRY_FLAG.match(entry["label"])
    ]
    names: dict[str, list[str]] = {}
    for source in ("iamcal", "github", "joypixels", "emojibase"):
        for code, words in json.loads(sources[f"en/shortcodes/{source}.json"]).items():
            listed = [words] if isinstance(words, str) else words
            names.setdefault(plain_code(code), []).extend(word.replace("_", " ") for word in listed)
    labels = Counter(plain_words(entry["label"]).lower() for entry in entries)
    claimed: dict[str, set[str]] = {}
    for entry in entries:
        for name in names.get(plain_code(entry["hexcode"]), []):
            claimed.setdefault(plain_words(name).lower(), set()).add(plain_code(entry["hexcode"]))
    concepts = []
    for entry in entries:
        code, label = plain_code(entry["hexcode"]), plain_words(entry["label"])
        own = {plain_words(name).lower() for name in names.get(code, [])}
        aliases = sorted(name for name in own if len(claimed[name]) == 1 and name not in labels and _is_a_name(name))
        concepts.append(Concept(code, label, tuple(aliases), entry["group"]))
    return concepts


def _is_a_name(words: str) -> bool:
    """Short codes such as 'family wwbb' or 'ja vacancy' are no words that anybody says."""
    spelt = re.fullmatch(r"[a-z][a-z' -]{2,}", words) and not words.startswith("ja ")
    return bool(spelt) and all(re.search(r"[aeiouy]", word) for word in re.split(r"[ -]", words) if word)


def build(out: Path, cache: Path, *, workers: int = 2) -> str:
    """Renders everything into `out` and returns the checksum of the decoded pixels, names and order.

    Args:
        out: where `icons.safetensors` and `icons.json` go.
        cache: where the packages' tarballs are kept between builds.
        workers: processes that render.

    Raises:
        HubError: a package cannot be fetched or is not the pinned one.
    """
    from safetensors.torch import save_file

    concepts = read_concepts(fetch(EMOJIBASE, cache))
    by_code = {concept.code: number for number, concept in enumerate(concepts)}
    jobs: list[tuple[int, str, bytes]] = []
    for style in STYLES:
        tarball = fetch(style.package, cache)
        sources = _webp_sources(tarball) if "lobehub" in style.package.name else _svg_sources(tarball, concepts)
        found = {code: source for code, source in sources.items() if code in by_code}
        jobs += [(by_code[code], style.word, found[code]) for code in sorted(found, key=by_code.__getitem__)]
    with ProcessPoolExecutor(workers) as pool:
        blobs = list(pool.map(_render, [source for _, _, source in jobs], chunksize=32))
    icons = [{"concept": c, "style": s} for (c, s, _), blob in zip(jobs, blobs, strict=True) if blob]
    blobs = [blob for blob in blobs if blob]
    panoramas = {name: view for name, view in _panoramas(fetch(PANORAMAS, cache)).items() if name in SCENES}
    blobs += list(panoramas.values())
    offsets = torch.tensor([0, *np.cumsum([len(blob) for blob in blobs])], dtype=torch.int64)
    index: dict[str, Any] = {
        "side": SIDE,
        "concepts": [asdict(concept) for concept in concepts],
        "icons": icons,
        "panoramas": list(panoramas),
    }
    index["checksum"] = _checksum(blobs, index)
    out.mkdir(parents=True, exist_ok=True)
    data = torch.frombuffer(bytearray(b"".join(blobs)), dtype=torch.uint8)
    save_file({"blobs": data, "offsets": offsets}, out / "icons.safetensors")
    (out / "icons.json").write_text(json.dumps(index, separators=(",", ":")) + "\n", encoding="utf-8")
    return index["checksum"]


@dataclass(frozen=True, slots=True)
class IconSet:
    """The built set in memory."""

    concepts: tuple[Concept, ...]
    pixels: Tensor
    """uint8[N, 4, S, S], straight (not premultiplied) RGBA."""
    concept: Tensor
    """int64[N], index into `concepts`."""
    style: tuple[str, ...]
    """N style words."""
    panoramas: dict[str, Tensor]
    """Scene -> uint8[3, 256, 512], equirectangular."""
    checksum: str

    @classmethod
    def load(cls, directory: Path, *, styles: tuple[str, ...] | None = TRAINED_STYLES, verify: bool = False) -> Self:
        """Decodes the files of `build`.

        Args:
            directory: where they are.
            styles: which styles to read; None reads all, the held-out one included.
            verify: recompute the checksum.

        Raises:
            CheckpointError: a file is missing, or the pixels are not those that the checksum was taken of.
        """
        from safetensors.torch import load_file

        if not (directory / "icons.json").exists():
            raise CheckpointError(
                f"there is no icon set in {directory}: make it with 'anygen data build icons --out DIR'"
            )
        index = json.loads((directory / "icons.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "icons.safetensors")
        raw, ends = tensors["blobs"].numpy().tobytes(), tensors["offsets"].tolist()
        blobs = [raw[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
        if verify and _checksum(blobs, index) != index["checksum"]:
            raise CheckpointError(f"the icon set in {directory} does not have the checksum that it states")
        count = len(index["icons"])
        wanted = [n for n, icon in enumerate(index["icons"]) if styles is None or icon["style"] in styles]
        with ThreadPoolExecutor() as pool:
            pictures = list(pool.map(lambda n: _decode(blobs[n]), wanted))
        concepts = tuple(Concept(**{**c, "aliases": tuple(c["aliases"])}) for c in index["concepts"])
        return cls(
            concepts=concepts,
            pixels=torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(),
            concept=torch.tensor([index["icons"][n]["concept"] for n in wanted]),
            style=tuple(index["icons"][n]["style"] for n in wanted),
            panoramas={
                name: torch.from_numpy(np.array(Image.open(io.BytesIO(blobs[count + n])).convert("RGB"))).permute(
                    2, 0, 1
                )
                for n, name in enumerate(index["panoramas"])
            },
            checksum=index["checksum"],
        )


def _checksum(blobs: list[bytes], index: dict[str, Any]) -> str:
    """Over decoded pixels, not over WebP bytes, which another version of the codec may write differently."""
    digest = hashlib.sha256(json.dumps([index[k] for k in ("side", "concepts", "icons", "panoramas")]).encode())
    for blob in blobs:
        digest.update(np.asarray(Image.open(io.BytesIO(blob))).tobytes())
    return digest.hexdigest()


def _decode(blob: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(blob)).convert("RGBA"))


def _webp_sources(tarball: Path) -> dict[str, bytes]:
    """Code -> WebP, without the pictures of the package that are not Microsoft's own."""
    foreign = files("anygen.training").joinpath("words/fluent3d_not_microsoft.json").read_text(encoding="utf-8")
    left_out = {plain_code(code) for code in json.loads(foreign)}
    found = {plain_code(Path(path).stem): blob for path, blob in read_files(tarball, suffix=".webp").items()}
    return {code: blob for code, blob in found.items() if code not in left_out}


def _svg_sources(tarball: Path, concepts: list[Concept]) -> dict[str, bytes]:
    """Code -> SVG. Sets with a table of characters are matched by code point, older ones by name."""
    sources = read_files(tarball, suffix=".json")
    icons = json.loads(sources["icons.json"])
    known: dict[str, Any] = icons["icons"]
    for alias, target in icons.get("aliases", {}).items():
        known.setdefault(alias, known.get(target["parent"]))
    named = {plain_code(code): name for code, name in json.loads(sources["chars.json"]).items()}
    if not named:
        slugs = {re.sub(r"[^a-z0-9]+", "-", c.label.lower()).strip("-"): c for c in reversed(concepts)}
        spare = {alias.replace(" ", "-"): c for c in reversed(concepts) for alias in c.aliases}
        named = {c.code: slug for slug, c in (spare | slugs).items() if slug in known}
    width, height = icons.get("width", 16), icons.get("height", 16)
    found = {}
    for code, name in sorted(named.items()):
        if (icon := known.get(name)) is not None:
            w, h = icon.get("width", width), icon.get("height", height)
            left, top = icon.get("left", 0), icon.get("top", 0)
            # The attribute xlink:href occurs in bodies, so its namespace has to be declared.
            names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            found[code] = f'<svg {names} viewBox="{left} {top} {w} {h}">{icon["body"]}</svg>'.encode()
    return found


def _render(source: bytes) -> bytes:
    """An SVG or a WebP -> RGBA WebP at SIDE; empty where nothing is drawn."""
    if source.startswith(b"<svg"):
        import resvg_py

        png = resvg_py.svg_to_bytes(svg_string=source.decode(), width=SIDE, height=SIDE)
        picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    else:
        picture = Image.open(io.BytesIO(source)).convert("RGBA")
        # Premultiplied resampling, or the colour of transparent pixels bleeds into the edge.
        picture = picture.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.LANCZOS).convert("RGBA")
    if picture.size != (SIDE, SIDE):
        square = Image.new("RGBA", (SIDE, SIDE))
        square.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
        picture = square
    if np.asarray(picture.getchannel("A")).max() < 128:
        return b""
    return _webp(picture)


def _webp(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=4, alpha_quality=100)
    return buffer.getvalue()


def _panoramas(tarball: Path) -> dict[str, bytes]:
    """Scene -> tone-mapped 512×256 WebP of the high-dynamic-range panorama."""
    import tempfile

    import OpenEXR
    from scipy.ndimage import binary_dilation, median_filter

    views = {}
    for path, script in read_files(tarball, prefix="hdri/", suffix=".exr.js").items():
        match = re.search(rb"base64,([A-Za-z0-9+/=]+)", script)
        assert match is not None, path  # the package is pinned
        with tempfile.TemporaryDirectory() as scratch:
            exr = Path(scratch) / "view.exr"
            exr.write_bytes(base64.b64decode(match.group(1)))
            with OpenEXR.File(str(exr)) as file:
                channels = file.channels()
                light = np.array((channels.get("RGB") or channels["RGBA"]).pixels[..., :3], dtype=np.float32)
        # A few pixels near the sun and lamps overflowed in some channels: take them from their surroundings.
        broken = (~np.isfinite(light) | (light < 0)).any(-1, keepdims=True)
        broken = binary_dilation(broken, iterations=2) if broken.any() else broken
        light = np.nan_to_num(light, nan=0, posinf=0, neginf=0)
        light = np.where(broken, median_filter(light, size=(9, 9, 1)), light)
        light = light / (np.percentile(light, 90) + 1e-6)
        tone = np.clip(light * (1 + light / 6) / (1 + light) * 1.3, 0, 1) ** (1 / 2.2)
        picture = Image.fromarray((tone * 255).astype(np.uint8)).resize((512, 256), Image.Resampling.LANCZOS)
        views[Path(path).name.removesuffix(".exr.js")] = _webp(picture)
    return views
