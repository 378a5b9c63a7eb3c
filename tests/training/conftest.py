"""A small icon set of drawn shapes, in the files that `icons.build` writes, and parts trained on it for two steps."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from anygen.training.icons import IconSet
    from anygen.training.sounds import SoundBank

SHAPES = {
    "red circle": (("ball",), (220, 30, 30)),
    "blue square": ((), (30, 60, 220)),
    "green triangle": ((), (20, 160, 60)),
    "purple bar": (("plank", "beam"), (140, 40, 190)),
    "orange cross": ((), (240, 140, 20)),
    "black diamond": ((), (10, 10, 10)),
}
"""Label -> aliases and colour."""


def draw_shape(label: str, side: int, style: int) -> Any:
    """An RGBA picture in whose middle the shape lies; styles differ in shade."""
    from PIL import Image, ImageDraw

    colour = tuple(min(255, channel + 8 * style) for channel in SHAPES[label][1])
    picture = Image.new("RGBA", (4 * side, 4 * side))
    draw, full, near, far = ImageDraw.Draw(picture), 4 * side, 0.6 * side, 3.4 * side
    middle = full / 2
    match label.split()[1]:
        case "circle":
            draw.ellipse((near, near, far, far), fill=colour)
        case "square":
            draw.rectangle((near, near, far, far), fill=colour)
        case "triangle":
            draw.polygon(((middle, near), (far, far), (near, far)), fill=colour)
        case "bar":
            draw.rectangle((near, 1.5 * side, far, 2.5 * side), fill=colour)
        case "cross":
            draw.rectangle((near, 1.6 * side, far, 2.4 * side), fill=colour)
            draw.rectangle((1.6 * side, near, 2.4 * side, far), fill=colour)
        case "diamond":
            draw.polygon(((middle, near), (far, middle), (middle, far), (near, middle)), fill=colour)
    return picture.resize((side, side), Image.Resampling.BOX)


def write_icons(directory: Path, side: int) -> Path:
    """The files of `icons.build`: six shapes in all six styles, and a view for each scene."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from anygen.training.icons import SCENES, STYLES, Concept, _checksum, _webp

    concepts = [Concept(f"{n:x}", label, aliases, 7) for n, (label, (aliases, _)) in enumerate(SHAPES.items())]
    icons = [{"concept": n, "style": style.word} for style in STYLES for n in range(len(concepts))]
    words = [style.word for style in STYLES]
    blobs = [_webp(draw_shape(concepts[i["concept"]].label, side, words.index(i["style"]))) for i in icons]
    rng = np.random.default_rng(0)
    for _ in SCENES:
        coarse = Image.fromarray(rng.integers(0, 256, (8, 16, 3), dtype=np.uint8))
        blobs.append(_webp(coarse.resize((512, 256), Image.Resampling.BILINEAR)))
    index: dict[str, Any] = {"side": side, "concepts": [asdict(c) for c in concepts], "icons": icons}
    index["panoramas"] = list(SCENES)
    index["checksum"] = _checksum(blobs, index)
    directory.mkdir(parents=True, exist_ok=True)
    offsets = torch.tensor([0, *np.cumsum([len(blob) for blob in blobs])], dtype=torch.int64)
    data = torch.frombuffer(bytearray(b"".join(blobs)), dtype=torch.uint8)
    save_file({"blobs": data, "offsets": offsets}, directory / "icons.safetensors")
    (directory / "icons.json").write_text(json.dumps(index), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def icons_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set at a side of 32 pixels."""
    return write_icons(tmp_path_factory.mktemp("icons"), 32)


@pytest.fixture(scope="session")
def large_icons_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set at 128 pixels, as the embedded default has it."""
    return write_icons(tmp_path_factory.mktemp("large-icons"), 128)


@pytest.fixture(scope="session")
def icons(icons_dir: Path) -> "IconSet":
    """The trained styles at 32 pixels."""
    from anygen.training.icons import IconSet

    return IconSet.load(icons_dir)


@pytest.fixture(scope="session")
def large_icons(large_icons_dir: Path) -> "IconSet":
    """The trained styles at 128 pixels."""
    from anygen.training.icons import IconSet

    return IconSet.load(large_icons_dir)


@pytest.fixture(scope="session")
def trained_vae(icons_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The folder and the figures of two steps of the autoencoder's recipe."""
    from anygen.training.autoencoder import AutoencoderRecipe, train

    out = tmp_path_factory.mktemp("vae-run")
    recipe = AutoencoderRecipe(
        icons=str(icons_dir), channels=(16, 16, 16, 16), latent_channels=4, pool=32, batch_size=4, steps=2
    )
    return out, train(recipe, out)


@pytest.fixture(scope="session")
def trained_generator(
    icons_dir: Path, trained_vae: tuple[Path, dict[str, float]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float]]:
    """The folder and the figures of two steps of the diffusion's recipe."""
    from anygen.generators.stable_diffusion import SamplingDefaults
    from anygen.training.diffusion import DiffusionRecipe, train

    out = tmp_path_factory.mktemp("diffusion-run")
    recipe = DiffusionRecipe(
        icons=str(icons_dir),
        vae=str(trained_vae[0] / "vae"),
        channels=(32, 32, 32),
        text_width=32,
        text_layers=1,
        context=24,
        vocab_size=400,
        pool=32,
        batch_size=4,
        steps=2,
        sampling=SamplingDefaults(steps=2, guidance_scale=2.0),
    )
    return out, train(recipe, out)


def write_sounds(directory: Path) -> Path:
    """The files of `sounds.build`: four instruments of sines, three drums and two effects of noise."""
    from anygen.training.sound_packages import RATE
    from anygen.training.sounds import Effect, Instrument, Percussion, StemWriter

    writer, rng = StemWriter(), np.random.default_rng(0)

    def add(sound: np.ndarray) -> int:
        number = writer.add(sound.astype(np.float32))
        assert number is not None
        return number

    def tone(key: int, overtone: float) -> int:
        phase = 2 * np.pi * 440 * 2 ** ((key - 69) / 12) * np.arange(RATE) / RATE
        return add(np.sin(phase) + overtone * np.sin(3 * phase))

    def burst(seconds: float, fall: float) -> int:
        time = np.arange(round(seconds * RATE)) / RATE
        return add(rng.normal(0, 0.2, len(time)) * np.exp(-fall * time))

    roots = (63, 69, 75)
    instruments = [
        Instrument(
            name=name, family=family, chords=chords, roots=roots, stems=tuple(tone(root, overtone) for root in roots)
        )
        for name, family, chords, overtone in (
            ("flute", "flute", False, 0.0),
            ("organ", "organ", True, 0.5),
            ("tuba", "brass", False, 0.7),  # these two have phrases that are held out
            ("violin", "strings", False, 0.3),
        )
    ]
    drums = {"bass drum": 30.0, "snare drum": 20.0, "hi-hat": 60.0}
    percussion = [Percussion(name=name, stems=(burst(0.3, fall),)) for name, fall in drums.items()]
    effects = [
        Effect(label="a dog barking", aliases=("a dog", "a bark"), group="animals", repeat=0.5, stems=(burst(0.4, 9),)),
        Effect(label="rain falling", aliases=("rain",), group="weather", background=True, stems=(burst(3.0, 0),)),
    ]
    writer.write(directory, instruments, percussion, effects)
    return directory


@pytest.fixture(scope="session")
def sound_bank_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sound bank's files."""
    return write_sounds(tmp_path_factory.mktemp("sounds"))


@pytest.fixture(scope="session")
def bank(sound_bank_dir: Path) -> "SoundBank":
    """That sound bank in memory."""
    from anygen.training.sounds import SoundBank

    return SoundBank.load(sound_bank_dir)
