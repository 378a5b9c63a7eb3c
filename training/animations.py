"""Animated icons of the embedded default: concepts that were drawn moving, as sixteen frames with their alpha.

`build` fetches the pinned packages one at a time, takes frames evenly from each animation's loop, and writes two files
that training reads on any machine:

    animations.safetensors   WebP film strips (the frames side by side) in one uint8 tensor, with their offsets
    animations.json          the concept of each strip; the checksum of the decoded pixels

`AnimationSet.load` decodes them; an `AnimationSource` puts them on backgrounds, as `motion.MotionSource` does icons.

Shapes: N animations, B clips, F frames, S side in pixels.
"""

import hashlib
import io
import json
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anygen.errors import CheckpointError, ConfigError
from anygen.training.captions import random_drawing
from anygen.training.compose import NORMAL, Panoramas
from anygen.training.icons import Concept, IconSet, plain_code, read_concepts
from anygen.training.motion import ANIMATED, FRAMES, ClipBatch, Shot, moving_backgrounds, over, paint, premultiplied
from anygen.training.packages import EMOJIBASE, NpmPackage, fetch, read_files

STYLE = "3D"
"""The style word of captions: the animations are Fluent's, as the icons in that style."""
SIDE = 96
QUALITY = 80
ALPHA_QUALITY = 50

PACKAGES = tuple(
    NpmPackage(f"@lobehub/fluent-emoji-anim-{part}", "1.0.0", sha256, "MIT")
    for part, sha256 in (
        (1, "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea"),
        (2, "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0"),
        (3, "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43"),
        (4, "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3"),
    )
)


def build(out: Path, cache: Path, *, workers: int = 2) -> str:
    """Renders everything into `out` and returns the checksum of the decoded pixels, concepts and order.

    Args:
        out: where `animations.safetensors` and `animations.json` go.
        cache: where the packages' tarballs are looked for. The animations' take 730 MB together: those that had to be
            fetched are deleted once they are read.
        workers: processes that render.

    Raises:
        HubError: a package cannot be fetched or is not the pinned one.
    """
    from safetensors.torch import save_file

    concepts = read_concepts(fetch(EMOJIBASE, cache))
    known = {concept.code for concept in concepts} - _not_microsoft()
    strips: dict[str, bytes] = {}
    with ProcessPoolExecutor(workers) as pool:
        for package in PACKAGES:
            had = (cache / package.tarball).exists()
            tarball = fetch(package, cache)
            sources = {plain_code(Path(path).stem): blob for path, blob in read_files(tarball, suffix=".webp").items()}
            wanted = {code: blob for code, blob in sources.items() if code in known}
            rendered = pool.map(film_strip_of, wanted.values(), chunksize=4)
            strips |= {code: strip for code, strip in zip(wanted, rendered, strict=True) if strip}
            if not had:
                tarball.unlink()
    shown = [concept for concept in concepts if concept.code in strips]
    blobs = [strips[concept.code] for concept in shown]
    index: dict[str, Any] = {"side": SIDE, "frames": FRAMES, "concepts": [asdict(concept) for concept in shown]}
    index["checksum"] = _checksum(blobs, index)
    offsets = torch.tensor([0, *np.cumsum([len(blob) for blob in blobs])], dtype=torch.int64)
    out.mkdir(parents=True, exist_ok=True)
    data = torch.frombuffer(bytearray(b"".join(blobs)), dtype=torch.uint8)
    save_file({"blobs": data, "offsets": offsets}, out / "animations.safetensors")
    (out / "animations.json").write_text(json.dumps(index, separators=(",", ":")) + "\n", encoding="utf-8")
    return index["checksum"]


def film_strip_of(source: bytes) -> bytes:
    """An animated WebP -> FRAMES frames of SIDE, side by side in one WebP; empty if it is one picture, or nothing.

    The frames are taken evenly from the loop, whatever its length, so that the clip loops as well; most loops last
    three seconds, so that a clip of two seconds runs at one and a half times the pace.
    """
    picture = Image.open(io.BytesIO(source))
    count = getattr(picture, "n_frames", 1)
    if count < 2:
        return b""
    strip = Image.new("RGBA", (FRAMES * SIDE, SIDE))
    for frame in range(FRAMES):
        picture.seek(frame * count // FRAMES)
        # Premultiplied resampling, or the colour of transparent pixels bleeds into the edge.
        small = picture.convert("RGBA").convert("RGBa").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        strip.paste(small.convert("RGBA"), (frame * SIDE, 0))
    if np.asarray(strip.getchannel("A")).max() < 128:
        return b""
    buffer = io.BytesIO()
    strip.save(buffer, "WEBP", quality=QUALITY, method=4, alpha_quality=ALPHA_QUALITY)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class AnimationSet:
    """The built set in memory."""

    concepts: tuple[Concept, ...]
    """N of them, one an animation."""
    pixels: Tensor
    """uint8[N, F, 4, S, S], straight (not premultiplied) RGBA."""
    checksum: str

    @classmethod
    def load(cls, directory: Path, *, verify: bool = False) -> Self:
        """Decodes the files of `build`.

        Args:
            directory: where they are.
            verify: recompute the checksum.

        Raises:
            CheckpointError: a file is missing, or the pixels are not those that the checksum was taken of.
        """
        from safetensors.torch import load_file

        if not (directory / "animations.json").exists():
            raise CheckpointError(
                f"there are no animations in {directory}: make them with 'anygen data build animations --out DIR'"
            )
        index = json.loads((directory / "animations.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "animations.safetensors")
        raw, ends = tensors["blobs"].numpy().tobytes(), tensors["offsets"].tolist()
        blobs = [raw[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
        if verify and _checksum(blobs, index) != index["checksum"]:
            raise CheckpointError(f"the animations in {directory} do not have the checksum that they state")
        pixels = torch.empty(len(blobs), index["frames"], 4, index["side"], index["side"], dtype=torch.uint8)

        def read(row: int) -> None:
            strip = torch.from_numpy(_decode(blobs[row]))  # [S, F * S, 4]
            pixels[row] = strip.unflatten(1, (index["frames"], -1)).permute(1, 3, 0, 2)

        with ThreadPoolExecutor() as pool:
            list(pool.map(read, range(len(blobs))))
        concepts = tuple(Concept(**{**c, "aliases": tuple(c["aliases"])}) for c in index["concepts"])
        return cls(concepts, pixels, index["checksum"])


class AnimationSource:
    """Endless clips of animated icons: each in turn, in a seeded order, from a random frame of its loop on."""

    def __init__(
        self,
        animations: AnimationSet,
        icons: IconSet,
        *,
        seed: int,
        side: int | None = None,
        frames: int = FRAMES,
        device: torch.device | str = "cpu",
    ) -> None:
        """`icons` numbers the concepts and has the panoramas; `side` is theirs unless it is said.

        Raises:
            ConfigError: an animated concept is not among the icons'.
        """
        number = {concept.code: row for row, concept in enumerate(icons.concepts)}
        if unknown := [concept.label for concept in animations.concepts if concept.code not in number]:
            raise ConfigError(f"the animations show concepts that the icon set lacks: {', '.join(unknown[:5])}")
        self.animations, self.device = animations, torch.device(device)
        self.side, self.frames = side or icons.pixels.shape[-1], frames
        self.pixels = animations.pixels.to(self.device)
        self.panoramas = Panoramas.stack(icons.panoramas, self.device)
        self.rng = random.Random(seed)
        self._concepts = [number[concept.code] for concept in animations.concepts]

    def clips(self, number: int, most: int = 64) -> Iterator[ClipBatch]:
        """So many clips, in batches of at most `most`."""
        turns = self._turns()
        for first in range(0, number, most):
            yield self.make(list(islice(turns, min(most, number - first))))

    def make(self, rows: list[int]) -> ClipBatch:
        """One clip of each animation of the list."""
        shots = [self._draw(row) for row in rows]
        length = self.pixels.shape[1]
        begins = torch.tensor([self.rng.randrange(length) for _ in rows])
        shown = torch.arange(self.frames) * length // self.frames  # fewer frames still show the whole loop
        index = torch.tensor(rows)[:, None].to(self.device), ((begins[:, None] + shown) % length).to(self.device)
        source = premultiplied(self.pixels[index], self.side)  # [B, F, 4, S, S]
        place = torch.tensor([0.0, 0.0, NORMAL, NORMAL, 0.0], device=self.device)
        rgba = paint(source.flatten(0, 1), place.expand(len(rows) * self.frames, 1, 5), self.side)
        grounds = moving_backgrounds(shots, self.panoramas, self.side, self.frames, self.rng, self.device)
        clips = over(rgba.view(len(rows), self.frames, 4, self.side, self.side), grounds)
        return ClipBatch(clips, rows, [self._concepts[row] for row in rows], shots)

    def _turns(self) -> Iterator[int]:
        while True:
            order = list(range(len(self.pixels)))
            self.rng.shuffle(order)
            yield from order

    def _draw(self, row: int) -> Shot:
        drawing = random_drawing(self.animations.concepts[row], STYLE, self.rng)
        return Shot(drawing=replace(drawing, count=1, place=None, size=None), motion=ANIMATED)


def load_animations(directory: str | Path, checksum: str | None) -> AnimationSet:
    """A built set, refused if it is not the one that the recipe pins.

    Raises:
        ConfigError: the checksum differs.
    """
    animations = AnimationSet.load(Path(directory))
    if checksum is not None and animations.checksum != checksum:
        held = animations.checksum[:12]
        raise ConfigError(f"the recipe pins the animations {checksum[:12]}…, {directory} holds {held}…")
    return animations


def _not_microsoft() -> set[str]:
    """Codes of the packages' pictures that are not Microsoft's own."""
    listed = files("anygen.training").joinpath("words/fluent_animated_not_microsoft.json").read_text(encoding="utf-8")
    return {plain_code(code) for code in json.loads(listed)}


def _checksum(blobs: list[bytes], index: dict[str, Any]) -> str:
    """Over decoded pixels, not over WebP bytes, which another version of the codec may write differently."""
    digest = hashlib.sha256(json.dumps([index[k] for k in ("side", "frames", "concepts")]).encode())
    for blob in blobs:
        digest.update(_decode(blob).tobytes())
    return digest.hexdigest()


def _decode(blob: bytes) -> np.ndarray:
    """uint8[S, F * S, 4]."""
    return np.array(Image.open(io.BytesIO(blob)).convert("RGBA"))
