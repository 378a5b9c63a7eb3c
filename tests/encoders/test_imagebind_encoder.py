"""One modality of an ImageBind as an encoder."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from anygen.encoders.imagebind import ImageBindEncoder, ImageBindModel
from anygen.encoders.imagebind_config import (
    ImageBindConfig,
    MotionConfig,
    PlaneConfig,
    TextConfig,
    VisionConfig,
)
from anygen.errors import CheckpointError, ConfigError, ModalityError
from anygen.media import Audio, Image, Video
from anygen.registry import lookup

CONFIG = ImageBindConfig(
    out_dim=8,
    vision=VisionConfig(width=16, blocks=1, heads=2, image_size=32, patch=16),
    text=TextConfig(width=12, blocks=1, heads=3, vocab_size=5, context_length=6),
    audio=PlaneConfig(width=12, blocks=1, heads=2, height=32, plane_width=40, logit_scale=20),
    depth=PlaneConfig(width=12, blocks=1, heads=2, height=32, plane_width=32, logit_scale=5),
    imu=MotionConfig(width=12, blocks=1, heads=2, steps=40),
)
MEDIA: dict[str, list[Any]] = {
    "image": [Image(PIL.Image.new("RGB", (40, 50), color)) for color in ("red", "blue")],
    "video": [Video(np.full((4, 32, 40, 3), level, dtype=np.uint8), 2.0) for level in (0, 200)],
    "text": ["red apple", "apple"],
    "audio": [Audio(np.sin(np.arange(9000) * step).astype(np.float32), 8000) for step in (0.1, 0.5)],
    "depth": [np.zeros((1, 32, 32)), np.ones((1, 32, 32))],
    "imu": [torch.zeros(6, 40), torch.ones(6, 40)],
}
TRUNK = {name: name for name in MEDIA} | {"image": "vision", "video": "vision"}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, ImageBindModel]:
    """A directory with a whole ImageBind, and the model."""
    torch.manual_seed(0)
    model = ImageBindModel(CONFIG).eval()
    model.save_pretrained(tmp_path)
    tokenizer = Tokenizer(
        WordLevel({"[UNK]": 0, "red": 1, "apple": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path, model


@pytest.mark.parametrize("modality", MEDIA)
def test_features_are_the_model_s(modality: str, saved: tuple[Path, ImageBindModel]) -> None:
    directory, model = saved
    pooled = ImageBindEncoder.from_pretrained(directory, modality=modality)
    inputs = pooled.preprocess(MEDIA[modality])
    features = pooled(**inputs)
    torch.testing.assert_close(features.values[:, 0], model.embed(TRUNK[modality], inputs["inputs"]))
    assert features.mask.tolist() == [[True], [True]]
    assert features.values.shape == (2, 1, pooled.feature_dim)
    assert not torch.equal(features.values[0], features.values[1])

    sequence = ImageBindEncoder.from_pretrained(directory, modality=modality, features="tokens")
    tokens = sequence(**inputs)
    torch.testing.assert_close(tokens.values, model.tokens(TRUNK[modality], inputs["inputs"]))
    assert tokens.mask.shape == tokens.values.shape[:2]
    assert tokens.values.shape[2] == sequence.feature_dim


def test_text_tokens_are_masked_behind_the_end(saved: tuple[Path, ImageBindModel]) -> None:
    encoder = ImageBindEncoder.from_pretrained(saved[0], modality="text", features="tokens")
    mask = encoder(**encoder.preprocess(["red apple", "apple"])).mask
    assert mask.int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]


def test_only_the_modality_s_trunk_is_built_and_checked(saved: tuple[Path, ImageBindModel]) -> None:
    directory, model = saved
    del model.modality_heads["audio"]
    model.save_pretrained(directory)
    encoder = ImageBindEncoder.from_pretrained(directory, modality="image")
    assert list(encoder.config.trunks) == list(encoder.model.modality_trunks) == ["vision"]
    with pytest.raises(CheckpointError, match=r"ImageBindEncoder \(audio\) from .* missing modality_heads\.audio\.0"):
        ImageBindEncoder.from_pretrained(directory, modality="audio")


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_saved_encoder_gives_the_same_features(
    modality: str, saved: tuple[Path, ImageBindModel], tmp_path: Path
) -> None:
    encoder = ImageBindEncoder.from_pretrained(saved[0], modality=modality)
    encoder.save_pretrained(tmp_path / "again")
    again = ImageBindEncoder.from_pretrained(tmp_path / "again", modality=modality)
    inputs = encoder.preprocess(MEDIA[modality])
    assert torch.equal(again(**again.preprocess(MEDIA[modality])).values, encoder(**inputs).values)


def test_a_bfloat16_encoder_takes_what_preprocess_gives(saved: tuple[Path, ImageBindModel]) -> None:
    encoder = ImageBindEncoder.from_pretrained(saved[0], modality="image").to(torch.bfloat16)
    assert encoder(**encoder.preprocess(MEDIA["image"])).values.dtype == torch.bfloat16


def test_the_registry_knows_it() -> None:
    assert lookup("encoder", "imagebind") is ImageBindEncoder


def test_what_it_cannot_be_is_refused() -> None:
    with pytest.raises(ModalityError, match="ImageBind has no modality 'smell'; it has image, video, text, audio"):
        ImageBindEncoder(CONFIG, modality="smell")
    with pytest.raises(ModalityError, match="this ImageBind has no trunk 'thermal'; it has vision, text, audio"):
        ImageBindEncoder(CONFIG, modality="thermal")
    with pytest.raises(ConfigError, match="features is 'cls'; known: pooled, tokens"):
        ImageBindEncoder(CONFIG, features="cls")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="an ImageBind text encoder needs a tokenizer"):
        ImageBindEncoder(CONFIG, modality="text").preprocess(["red"])


def test_pictures_of_another_size_are_read_with_interpolated_positions() -> None:
    """The reference is the interpolation of transformers' own ViT."""
    from transformers import ViTConfig
    from transformers.models.vit.modeling_vit import ViTEmbeddings

    torch.manual_seed(0)
    vision = VisionConfig(width=16, blocks=1, heads=2, image_size=32, patch=8)
    encoder = ImageBindEncoder(ImageBindConfig(out_dim=6, vision=vision)).eval()
    tokens: Any = encoder.model.modality_preprocessors["vision"]
    before = tokens.pos_embedding_helper["pos_embed"].detach().clone()
    theirs = ViTEmbeddings(ViTConfig(hidden_size=16, image_size=32, patch_size=8))
    theirs.position_embeddings.data.copy_(before)
    encoder.set_image_size(48)
    wanted = theirs.interpolate_pos_encoding(torch.zeros(1, 37, 16), 48, 48)
    torch.testing.assert_close(tokens.pos_embedding_helper["pos_embed"], wanted)
    picture = Image.from_any(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
    inputs = encoder.preprocess([picture])
    assert inputs["inputs"].shape[-2:] == (48, 48) and encoder(**inputs).values.shape == (1, 1, 6)
    encoder.set_image_size(48)
    torch.testing.assert_close(tokens.pos_embedding_helper["pos_embed"], wanted)


def test_sizes_that_cannot_be_read_are_told() -> None:
    vision = VisionConfig(width=16, blocks=1, heads=2, image_size=32, patch=8)
    with pytest.raises(ConfigError, match="image_size 20 is not a multiple of patch 8"):
        ImageBindEncoder(ImageBindConfig(out_dim=6, vision=vision)).set_image_size(20)
    with pytest.raises(ConfigError, match="at 16 pixels there are other numbers of tokens than at 32"):
        ImageBindEncoder(ImageBindConfig(out_dim=6, vision=vision), features="tokens").set_image_size(16)
    audio = PlaneConfig(width=16, blocks=1, heads=2, height=32, plane_width=40, logit_scale=20)
    with pytest.raises(ConfigError, match="an ImageBind encoder of audio reads no pictures"):
        ImageBindEncoder(ImageBindConfig(out_dim=6, audio=audio), modality="audio").set_image_size(16)
