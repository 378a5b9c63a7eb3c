"""ImageBind's model: the published layout, clips, pooling, disk. Its values: tests/parity/test_imagebind.py."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.encoders.imagebind import ImageBindModel
from anygen.encoders.imagebind_config import (
    ImageBindConfig,
    MotionConfig,
    PlaneConfig,
    TextConfig,
    VisionConfig,
)
from anygen.errors import CheckpointError, ConfigError, MediaError, ModalityError

CONFIG = ImageBindConfig(
    out_dim=8,
    vision=VisionConfig(width=16, blocks=2, heads=2, image_size=32, patch=16),
    text=TextConfig(width=12, blocks=2, heads=3, vocab_size=50, context_length=10),
    audio=PlaneConfig(width=12, blocks=1, heads=2, height=32, plane_width=40, stride=12, logit_scale=20),
    depth=PlaneConfig(width=12, blocks=1, heads=2, height=32, plane_width=32, logit_scale=5),
    thermal=PlaneConfig(width=12, blocks=1, heads=2, height=32, plane_width=32, logit_scale=10),
    imu=MotionConfig(width=12, blocks=1, heads=2, steps=40),
)
BLOCKS = {"vision": 32, "text": 24, "audio": 12, "depth": 12, "thermal": 12, "imu": 6}


@pytest.fixture
def model() -> ImageBindModel:
    torch.manual_seed(0)
    return ImageBindModel(CONFIG).eval()


@pytest.fixture
def samples() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "vision": torch.randn(2, 3, 32, 32),
        "text": torch.tensor([[1, 7, 49, 0, 0, 0, 0, 0, 0, 0], [1, 3, 4, 5, 6, 7, 8, 9, 2, 49]]),
        "audio": torch.randn(2, 1, 32, 40),
        "depth": torch.randn(2, 1, 32, 32),
        "thermal": torch.randn(2, 1, 32, 32),
        "imu": torch.randn(2, 6, 40),
    }


def test_huge_has_the_published_keys_and_shapes() -> None:
    published: dict[str, str] = {}
    for line in (Path(__file__).parent / "imagebind_huge_keys.txt").read_text().splitlines():
        key, shape = line.split("\t")
        for block in range(BLOCKS[key.split(".")[1]] if "*" in key else 1):
            published[key.replace("*", str(block))] = shape
    with torch.device("meta"):
        own = ImageBindModel(ImageBindConfig.huge()).state_dict()
    assert len(published) == 1311
    assert {key: str(tuple(value.shape)) for key, value in own.items()} == published


def test_every_embedding_has_length_one_and_the_scale_comes_after(
    model: ImageBindModel, samples: dict[str, Tensor]
) -> None:
    scales = {"text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}
    for trunk, scaled in model(samples).items():
        embedding = model.embed(trunk, samples[trunk])
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(2))
        torch.testing.assert_close(scaled, embedding * scales.get(trunk, 1.0))
        if trunk in scales:
            torch.testing.assert_close(model.logit_scale(trunk), torch.tensor(scales[trunk]))


def test_clips_are_averaged_and_only_embed_restores_the_length(model: ImageBindModel) -> None:
    clips = torch.randn(2, 3, 1, 32, 40)
    single = torch.stack([model({"audio": clips[:, clip]})["audio"] for clip in range(3)])
    torch.testing.assert_close(model({"audio": clips})["audio"], single.mean(0))
    torch.testing.assert_close(model.embed("audio", clips), F.normalize(single.mean(0), dim=-1))


def test_a_still_image_is_a_clip_of_equal_frames(model: ImageBindModel, samples: dict[str, Tensor]) -> None:
    still = samples["vision"]
    clip = still[:, None, :, None].expand(-1, -1, -1, 2, -1, -1)  # [B, 1, 3, 2, H, W]
    torch.testing.assert_close(model.embed("vision", clip), model.embed("vision", still))


def test_what_stands_behind_the_end_of_a_text_does_not_matter(
    model: ImageBindModel, samples: dict[str, Tensor]
) -> None:
    ids = samples["text"][:1]
    other = ids.clone()
    other[:, 3:] = 11
    expected = model.embed("text", ids)
    torch.testing.assert_close(model.embed("text", other), expected)
    torch.testing.assert_close(model.embed("text", ids[:, :3]), expected)


def test_the_embedding_is_read_from_the_first_of_the_tokens(model: ImageBindModel, samples: dict[str, Tensor]) -> None:
    tokens = model.tokens("vision", samples["vision"])
    assert tokens.shape == (2, 1 + 4, 16)
    projection = model.state_dict()["modality_heads.vision.2.weight"]
    expected = F.normalize(tokens[:, 0] @ projection.T, dim=-1)
    torch.testing.assert_close(model.embed("vision", samples["vision"]), expected)


def test_tokens_of_clips_follow_each_other(model: ImageBindModel) -> None:
    clips = torch.randn(2, 3, 1, 32, 40)
    each = [model.tokens("audio", clips[:, clip]) for clip in range(3)]
    torch.testing.assert_close(model.tokens("audio", clips), torch.cat(each, dim=1))


def test_a_learned_scale_stops_at_100(model: ImageBindModel) -> None:
    model.load_state_dict(model.state_dict() | {"modality_postprocessors.text.1.log_logit_scale": torch.tensor(9.0)})
    assert model.logit_scale("text").item() == 100


def test_bfloat16_autocast_stays_close(model: ImageBindModel, samples: dict[str, Tensor]) -> None:
    for trunk, values in samples.items():
        expected = model.embed(trunk, values)
        with torch.autocast("cpu", torch.bfloat16):
            embedding = model.embed(trunk, values)
        assert embedding.dtype == torch.float32
        torch.testing.assert_close(embedding, expected, rtol=0, atol=0.03)


def test_disk_gives_back_the_same_model(tmp_path: Path, model: ImageBindModel, samples: dict[str, Tensor]) -> None:
    model.save_pretrained(tmp_path)
    loaded = ImageBindModel.from_pretrained(tmp_path)
    assert loaded.config == CONFIG
    before, after = model(samples), loaded(samples)
    assert all(torch.equal(before[trunk], after[trunk]) for trunk in samples)


def test_a_missing_key_is_named(tmp_path: Path, model: ImageBindModel) -> None:
    del model.modality_trunks["vision"].blocks[1].attn.out_proj.bias  # type: ignore[union-attr,operator]
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing modality_trunks\.vision\.blocks\.1\.attn\.out_proj\.bias$"):
        ImageBindModel.from_pretrained(tmp_path)


def test_a_trunk_that_is_none_does_not_exist() -> None:
    model = ImageBindModel(ImageBindConfig.mini(vocab_size=16))
    assert list(model.modality_trunks) == ["vision", "text"]
    with pytest.raises(ModalityError, match="this ImageBind has no trunk 'audio'; it has vision, text$"):
        model({"audio": torch.zeros(1, 1, 128, 204)})


def test_vision_has_no_logit_scale(model: ImageBindModel) -> None:
    with pytest.raises(ModalityError, match="the trunk 'vision' has no logit scale"):
        model.logit_scale("vision")


@pytest.mark.parametrize(
    ("trunk", "shape", "message"),
    [
        ("vision", (2, 3, 30, 32), r"takes samples of shape \[3, 32, 32\] or \[3, 2, 32, 32\], got \[3, 30, 32\]"),
        ("vision", (1, 3, 2, 32, 32), r"got \[2, 32, 32\] \(5 and 6 axes are read as \[batch, clips, \*sample\]\)"),
        ("imu", (1, 6, 41), r"takes samples of shape \[6, 40\], got \[6, 41\]"),
        ("depth", (1, 3, 32, 32), r"takes samples of shape \[1, 32, 32\], got \[3, 32, 32\]"),
    ],
)
def test_another_shape_is_refused(model: ImageBindModel, trunk: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(MediaError, match=message):
        model.embed(trunk, torch.zeros(shape))


def test_a_text_that_is_too_long_is_refused(model: ImageBindModel) -> None:
    with pytest.raises(MediaError, match=r"text takes long\[B, at most 10\], got \[1, 11\]"):
        model.embed("text", torch.zeros(1, 11, dtype=torch.long))


def test_configurations_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(ConfigError, match="width 10 is not a multiple of heads 4"):
        VisionConfig(width=10, blocks=1, heads=4)
    with pytest.raises(ConfigError, match=r"drop_path is 1\.0, not in \[0, 1\)"):
        MotionConfig(width=8, blocks=1, heads=4, drop_path=1.0)
    with pytest.raises(ConfigError, match=r"drop_patches is 1, not in \[0, 1\)"):
        VisionConfig(width=8, blocks=1, heads=4, drop_patches=1)
    with pytest.raises(ConfigError, match="image_size 100 is not a multiple of patch 14"):
        VisionConfig(width=8, blocks=1, heads=4, image_size=100)
    with pytest.raises(ConfigError, match="an ImageBind needs one of vision, text, audio, depth, thermal, imu"):
        ImageBindConfig()
