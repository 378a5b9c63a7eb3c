"""A small icon set of drawn shapes, in the files that `icons.build` writes, and parts trained on it for two steps."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from anygen.llm import LLM
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


@pytest.fixture(scope="session")
def user_model(
    tiny_llm: "Callable[..., LLM]",
    tiny_zeroscope: "Callable[..., Any]",
    tiny_audioldm2: "Callable[..., Any]",
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A user's model directory: reads images, makes clips and sounds; no adapter. Not to be written to."""
    import torch

    from anygen.encoders.imagebind import ImageBindEncoder
    from anygen.encoders.imagebind_config import ImageBindConfig, VisionConfig
    from anygen.model import AnyGenModel
    from anygen.model_config import (
        AnyGenConfig,
        InputConfig,
        ModalityConfig,
        OutputConfig,
        PartConfig,
        SourceConfig,
        SourcedPartConfig,
    )
    from anygen.saving import save_model

    def part(name: str, path: str) -> SourcedPartConfig:
        return SourcedPartConfig(name=name, source=SourceConfig(path=path))

    torch.manual_seed(0)
    vision = VisionConfig(width=16, blocks=1, heads=2, image_size=16, patch=8, frames=2)
    encoder = ImageBindEncoder(ImageBindConfig(out_dim=6, vision=vision))
    makers: dict[str, Any] = {"video": tiny_zeroscope(), "audio": tiny_audioldm2()}
    names = {"video": "zeroscope", "audio": "audioldm2"}
    outputs = {
        modality: OutputConfig(
            signal_tokens=2,
            condition={name: tuple(shape) for name, shape in maker.condition_spec.shapes.items()},
            generator=part(names[modality], f"generators/{modality}"),
            projector=PartConfig(name="mlp", options={"width": 16}),
        )
        for modality, maker in makers.items()
    }
    projector = PartConfig(name="mlp", options={"tokens": 2})
    encoder_part = part("imagebind", "encoders/image")
    image = InputConfig(encoder=encoder_part, feature_dim=6, slots=2, projector=projector)
    config = AnyGenConfig(
        name="mine",
        llm=SourceConfig(path="llm"),
        modalities={
            "image": ModalityConfig(input=image),
            "video": ModalityConfig(output=outputs["video"]),
            "audio": ModalityConfig(output=outputs["audio"]),
        },
    )
    model = AnyGenModel(config, tiny_llm(), {"image": encoder}).initialize(seed=0).eval()
    directory = tmp_path_factory.mktemp("user") / "model"
    save_model(directory, model, makers)
    return directory


@pytest.fixture(scope="session")
def user_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, captions, conversations and preferences for `user_model`."""
    from anygen.media import Image

    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    pairs, chats = [], []
    for number in range(12):
        words = ("red", "green", "blue")[number % 3]
        pixels = random.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        pixels[..., number % 3] += 190
        Image.from_any(pixels).save(folder / f"{number}.png")
        pairs.append({"image": f"{number}.png", "caption": words})
        turns = [
            {"role": "user", "content": [{"type": "image", "image": f"{number}.png"}, "What is this?"]},
            {"role": "assistant", "content": words},
            {"role": "user", "content": "Play it."},
            {"role": "assistant", "content": ["Here.", {"type": "audio", "caption": f"a {words} dog"}]},
        ]
        chats.append({"messages": turns[:2] if number % 2 else turns})
    talk = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(6)
    ]
    medium = {"role": "assistant", "content": [{"type": "video", "caption": "two dogs"}]}
    words = {"role": "assistant", "content": "I cannot draw."}
    prompts = [[{"role": "user", "content": text}] for text in ("Film two dogs.", "Draw two dogs.", "Two dogs!")]
    wanted = [{"prompt": prompt, "chosen": [medium], "rejected": [words]} for prompt in prompts]
    for name, rows in {"pairs": pairs, "chats": chats, "talk": talk, "wanted": wanted}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    (folder / "captions.txt").write_text("a dog\na red apple\ntwo dogs\na trumpet playing\ntwo red dogs\na red dog\n")
    return folder
