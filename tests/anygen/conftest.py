"""Whole model directories of real classes at tiny width. Weights are random, but heads are solved for what tests ask.

`tiny_directory` reads images, makes images and (by a plugin) sounds: see `ASKED`. `anything_directory` reads and makes
images, videos and sounds by the classes of the embedded default: see `MATRIX`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from anygen.generators.audioldm2 import AudioLDM2Generator
    from anygen.generators.zeroscope import ZeroscopeGenerator
    from anygen.llm import LLM
    from anygen.media import Media
    from anygen.model import AnyGenModel
    from anygen.model_config import AnyGenConfig
    from anygen.pipeline import AnyGenPipeline

ASKED = {
    "Draw": ["image"],
    "Play": ["audio"],
    "Draw and play": ["image", "audio"],
    "Draw three": ["image", "image", "image"],
    "Hello": [],
    "What is this?": [],
}
"""Prompt -> what its answer begins with; words come after, and some more media may."""
MAKES = {"Say": [], "Draw": ["image"], "Film": ["video"], "Play": ["audio"]}
MATRIX = {(words, read): made for words, made in MAKES.items() for read in (None, "image", "video", "audio")} | {
    ("All three", None): ["image", "video", "audio"]
}
"""(words, modality of a medium beside them, see `example`) -> as `ASKED`."""


@pytest.fixture(scope="session")
def plugin() -> Iterator[None]:
    """Registers a generator of sounds, as a user's package would."""
    import torch
    from safetensors.torch import load_file, save_file

    from anygen import registry
    from anygen.features import Condition, ConditionSpec
    from anygen.generators.base import Generator
    from anygen.media import Audio

    class Tones(Generator):
        """One linear map from condition and noise to samples."""

        modality = "audio"
        condition_spec = ConditionSpec(shapes={"pitch": (4,), "words": (3, 6)})

        def __init__(self, weight: torch.Tensor, device: Any = "cpu") -> None:
            self.weight = weight.to(device)

        @classmethod
        def from_pretrained(cls, directory: Any, *, device: Any = "cpu", dtype: Any = torch.float32) -> Any:
            return cls(load_file(Path(directory) / "model.safetensors")["weight"].to(dtype), device)

        def save_pretrained(self, directory: Any) -> None:
            Path(directory).mkdir(parents=True)
            save_file({"weight": self.weight}, Path(directory) / "model.safetensors")

        def to(self, device: Any) -> Any:
            return self

        def encode_text(self, captions: Any) -> Condition:
            raise NotImplementedError

        def denoising_loss(self, condition: Any, media: Any, *, generator: Any = None) -> Any:
            raise NotImplementedError

        def generate(self, condition: Condition, *, seeds: Any, steps: Any = None, **options: Any) -> list[Any]:
            noise = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            for step in range(steps or 2):
                options["on_step"](step + 1, steps or 2)
            pitch = condition.tensors["pitch"] + condition.tensors["words"].mean((1, 2))[:, None]
            samples = torch.tanh((pitch + torch.stack(noise)) @ self.weight)
            return [Audio(row.numpy(), 100) for row in samples]

    registry.register("generator", "test-tones")(Tones)
    yield
    del registry._registered["generator", "test-tones"]


@pytest.fixture(scope="session")
def tiny_directory(plugin: None, tiny_llm: "Callable[..., LLM]", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's directory; not to be written to."""
    import torch
    from peft import LoraConfig

    from anygen.encoders.imagebind import ImageBindEncoder
    from anygen.encoders.imagebind_config import ImageBindConfig, VisionConfig
    from anygen.model import AnyGenModel
    from anygen.pipeline import AnyGenPipeline
    from anygen.registry import lookup

    llm = tiny_llm(tie_word_embeddings=False)
    llm.base.generation_config.eos_token_id = [2, *range(150, 160)]  # type: ignore[union-attr]
    vision = VisionConfig(width=16, blocks=1, heads=2, image_size=16, patch=8)
    encoder = ImageBindEncoder(ImageBindConfig(out_dim=6, vision=vision))
    model = AnyGenModel(_config(), llm, {"image": encoder}).initialize(seed=0).eval()
    generators = {
        "image": _stable_diffusion(tiny_llm),
        "audio": lookup("generator", "test-tones")(torch.randn(4, 50)),
    }
    first, second = (tmp_path_factory.mktemp("model") / name for name in ("plain", "tiny"))
    AnyGenPipeline(model, generators).save_pretrained(first)
    pipe = AnyGenPipeline.from_pretrained(first, device="cpu")
    pipe.model.llm.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    _teach(pipe.model.eval(), {(words, None): media for words, media in ASKED.items()})
    (first / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A tiny model\n")
    pipe.save_pretrained(second)
    return second


@pytest.fixture(scope="session")
def anything_directory(
    tiny_llm: "Callable[..., LLM]",
    tiny_zeroscope: "Callable[..., ZeroscopeGenerator]",
    tiny_audioldm2: "Callable[..., AudioLDM2Generator]",
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The directory of a model of every modality; not to be written to."""
    from anygen.encoders.imagebind import ImageBindEncoder
    from anygen.encoders.imagebind_config import ImageBindConfig, PlaneConfig, VisionConfig
    from anygen.model import AnyGenModel
    from anygen.pipeline import AnyGenPipeline

    llm = tiny_llm(tie_word_embeddings=False, hidden_size=96)
    llm.base.generation_config.eos_token_id = [2, *range(150, 160)]  # type: ignore[union-attr]
    trunks = ImageBindConfig(
        out_dim=6,
        vision=VisionConfig(width=16, blocks=1, heads=2, image_size=16, patch=8),
        audio=PlaneConfig(width=16, blocks=1, heads=2, height=32, plane_width=40, logit_scale=20),
    )
    generators: dict[str, Any] = {
        "image": _stable_diffusion(tiny_llm),
        "video": tiny_zeroscope(),
        "audio": tiny_audioldm2(),
    }
    encoders = {modality: ImageBindEncoder(trunks, modality=modality) for modality in generators}
    conditions = {modality: dict(maker.condition_spec.shapes) for modality, maker in generators.items()}
    model = AnyGenModel(_config_of_all(conditions), llm, encoders).initialize(seed=0).eval()
    _teach(model, MATRIX)
    directory = tmp_path_factory.mktemp("model") / "anything"
    AnyGenPipeline(model, generators).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def anything(anything_directory: Path) -> "AnyGenPipeline":
    """The pipeline of `anything_directory`, loaded once; not to be changed."""
    from anygen.pipeline import AnyGenPipeline

    return AnyGenPipeline.from_pretrained(anything_directory, device="cpu")


@pytest.fixture(scope="session")
def examples() -> "dict[str, Media]":
    """The media that stand beside the words of `MATRIX`."""
    return {modality: example(modality) for modality in ("image", "video", "audio")}


def example(modality: str) -> "Media":
    """One medium of each modality, always the same."""
    import numpy as np

    from anygen.media import Audio, Image, Video

    random = np.random.default_rng(0)
    if modality == "audio":
        return Audio(random.uniform(-0.5, 0.5, 8000).astype(np.float32), 16_000)
    if modality == "video":
        return Video(random.integers(0, 256, (6, 20, 16, 3), dtype=np.uint8), 6)
    return Image.from_any(random.integers(0, 256, (16, 20, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def _tiny_pipeline(tiny_directory: Path) -> "AnyGenPipeline":
    from anygen.pipeline import AnyGenPipeline

    return AnyGenPipeline.from_pretrained(tiny_directory, device="cpu")


@pytest.fixture
def pipe(_tiny_pipeline: "AnyGenPipeline") -> "AnyGenPipeline":
    """The pipeline of `tiny_directory`, loaded once; a test may change its attributes, not its weights."""
    from anygen.pipeline import AnyGenPipeline

    return AnyGenPipeline(_tiny_pipeline.model, _tiny_pipeline.generators)


def _config_of_all(conditions: dict[str, dict[str, tuple[int, ...]]]) -> "AnyGenConfig":
    from anygen.model_config import (
        AnyGenConfig,
        InputConfig,
        ModalityConfig,
        OutputConfig,
        PartConfig,
        SourceConfig,
        SourcedPartConfig,
    )

    def part(name: str, path: str, **options: Any) -> SourcedPartConfig:
        return SourcedPartConfig(name=name, source=SourceConfig(path=path), options=options)

    names = {"image": "stable_diffusion", "video": "zeroscope", "audio": "audioldm2"}
    tokens = {"image": 3, "video": 4, "audio": 2}
    return AnyGenConfig(
        name="anything",
        llm=SourceConfig(path="llm"),
        modalities={
            modality: ModalityConfig(
                input=InputConfig(
                    encoder=part("imagebind", f"encoders/{modality}", modality=modality), feature_dim=6, slots=1
                ),
                output=OutputConfig(
                    signal_tokens=tokens[modality],
                    condition=condition,
                    generator=part(names[modality], f"generators/{modality}"),
                    projector=PartConfig(name="mlp", options={"width": 16}),
                ),
            )
            for modality, condition in conditions.items()
        },
    )


def _config() -> "AnyGenConfig":
    from anygen.model_config import (
        AnyGenConfig,
        InputConfig,
        ModalityConfig,
        OutputConfig,
        PartConfig,
        SourceConfig,
        SourcedPartConfig,
    )

    def part(name: str, path: str) -> SourcedPartConfig:
        return SourcedPartConfig(name=name, source=SourceConfig(path=path))

    small = {"width": 16, "heads": 2, "ffn": 16, "encoder_layers": 1, "decoder_layers": 1}
    return AnyGenConfig(
        name="tiny",
        llm=SourceConfig(path="llm"),
        modalities={
            "image": ModalityConfig(
                input=InputConfig(encoder=part("imagebind", "encoders/imagebind"), feature_dim=6, slots=1),
                output=OutputConfig(
                    signal_tokens=3,
                    condition={"prompt_embeds": (5, 8)},
                    generator=part("stable_diffusion", "generators/image"),
                    projector=PartConfig(name="text_fc", options=small),
                ),
            ),
            "audio": ModalityConfig(
                output=OutputConfig(
                    signal_tokens=2,
                    condition={"pitch": (4,), "words": (3, 6)},
                    generator=part("test-tones", "generators/audio"),
                    projector=PartConfig(name="mlp", options={"width": 16}),
                ),
            ),
        },
    )


def _stable_diffusion(tiny_llm: "Callable[..., LLM]") -> Any:
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from anygen.generators.stable_diffusion import SamplingDefaults, StableDiffusionGenerator, TextConditioner

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=400,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=5,
    )
    blocks: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    vae = AutoencoderKL(norm_num_groups=4, **blocks)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    tokenizer = tiny_llm().tokenizer
    return StableDiffusionGenerator(
        vae=vae,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(),
        unconditional=torch.randn(5, 8),
        text=TextConditioner(CLIPTextModel(text).eval(), tokenizer),
        defaults=SamplingDefaults(steps=2, guidance_scale=3.0),
    )


def _teach(model: "AnyGenModel", asked: dict[tuple[str, str | None], list[str]]) -> None:
    """Solves the head's new rows so that what is asked comes true; the states do not depend on the head."""
    import torch

    from anygen.messages import MediaPart, Message, TextPart

    signals = model.signal_tokens
    assert signals.head_rows is not None
    states: list[Any] = []
    wanted: dict[int, list[float]] = {row: [] for row in range(len(signals))}

    def want(ids: list[int], media: Any, token: int | None) -> None:
        states.append(model(input_ids=torch.tensor([ids]), media=media).hidden_states[0, -1])
        for row, values in wanted.items():
            values.append(30.0 if signals.vocab_size + row == token else -30.0)

    with torch.no_grad():
        for (words, read), made in asked.items():
            beside = [MediaPart(read, example(read))] if read else []
            prompt = model.prompts.prompt([Message("user", (TextPart(words), *beside))])
            ids, media = prompt.ids, model.encode_parts(prompt.media)
            if not read:
                want(ids, media, signals.media_id if made else signals.words_id)
            ids = [*ids, signals.media_id]
            for modality in made:
                run = signals.runs[modality]
                want(ids, media, run.start)
                ids = [*ids, *run]
            if made or read:
                want(ids, media, None)
        for row, values in wanted.items():
            solution = torch.linalg.lstsq(torch.stack(states), torch.tensor(values), driver="gelsd").solution
            signals.head_rows[row] = solution
