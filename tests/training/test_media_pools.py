"""Pools are read as the model reads the same media, one by one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from anygen.encoders.imagebind import ImageBindEncoder, ImageBindModel
from anygen.encoders.imagebind_clips import sound_values
from anygen.encoders.imagebind_config import ImageBindConfig, PlaneConfig, TextConfig, VisionConfig
from anygen.errors import ConfigError
from anygen.media import Audio, Video
from anygen.training.icons import IconSet
from anygen.training.media_pools import (
    encode_clips,
    encode_pictures,
    encode_sounds,
    make_pools,
    names_of,
    pieces,
    sound_names,
    text_features,
    windows,
)
from anygen.training.motion import FPS, MotionSource, Shot
from anygen.training.pictures import PictureSource
from anygen.training.sound_captions import Sound
from anygen.training.sound_mixing import SoundSource
from anygen.training.sounds import SoundBank
from anygen.training.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, icons: IconSet, bank: SoundBank) -> Path:
    """A random ImageBind of three trunks."""
    out = tmp_path_factory.mktemp("imagebind")
    torch.manual_seed(0)
    config = ImageBindConfig(
        out_dim=16,
        vision=VisionConfig(width=16, blocks=1, heads=2, image_size=32, patch=16, clip_seconds=0.5),
        text=TextConfig(width=16, blocks=1, heads=2, vocab_size=300, context_length=16),
        audio=PlaneConfig(width=16, blocks=1, heads=2, height=128, plane_width=204, logit_scale=20),
    )
    ImageBindModel(config).save_pretrained(out)
    train_tokenizer(names_of(icons, bank), vocab_size=300, context=16).backend_tokenizer.save(
        str(out / "tokenizer.json")
    )
    return out


def test_clips_have_the_features_that_the_encoder_gives_their_frames(encoder: Path, icons: IconSet) -> None:
    reads = ImageBindEncoder.from_pretrained(encoder, modality="video")
    pool = encode_clips(MotionSource(icons, seed=3), reads, 6)
    batch = next(MotionSource(icons, seed=3).clips(6))
    frames = (batch.pixels * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).numpy()
    with torch.no_grad():
        wanted = reads(**reads.preprocess([Video(clip, FPS) for clip in frames])).values
    torch.testing.assert_close(pool.features, wanted, rtol=0, atol=0.01)  # of pixels that are not rounded to bytes
    assert [seen.content for seen in pool.shown] == batch.shots and pool.names.tolist() == batch.concepts
    assert [(seen.modality, seen.index) for seen in pool.shown] == [("video", n) for n in range(6)]


def test_a_clip_is_read_in_five_pieces_from_its_start_to_its_end() -> None:
    assert pieces(16, 2, 0.5) == [[0, 3], [3, 6], [6, 9], [9, 12], [12, 15]]
    assert pieces(16, 2, 2.0) == [[0, 15]] * 5


@pytest.mark.parametrize("samples", [40_960, 20_000])
def test_sounds_are_cut_into_the_windows_that_the_encoder_takes(samples: int) -> None:
    waves = 0.1 * torch.randn(3, samples)
    one_by_one = sound_values([Audio(wave.numpy(), 16_000) for wave in waves], 128, 204)
    torch.testing.assert_close(windows(waves, 128, 204), one_by_one, rtol=1e-4, atol=1e-4)


def test_sounds_are_encoded_with_their_content_and_names(encoder: Path, bank: SoundBank) -> None:
    reads = ImageBindEncoder.from_pretrained(encoder, modality="audio")
    pool = encode_sounds(SoundSource(bank, seed=3), reads, 6)
    batch = next(SoundSource(bank, seed=3).clips(6))
    with torch.no_grad():
        sounds = [Audio(np.ascontiguousarray(wave.numpy()), 16_000) for wave in batch.waveforms]
        wanted = reads(**reads.preprocess(sounds)).values
    torch.testing.assert_close(pool.features, wanted, rtol=0, atol=1e-3)
    known = sound_names(bank)
    assert [known[name].label for name in pool.names] == [sound.label for sound in batch.sounds]
    assert [seen.content for seen in pool.shown] == batch.sounds


def test_every_picture_that_was_asked_for_is_there(
    encoder: Path, icons: IconSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = ImageBindEncoder.from_pretrained(encoder, modality="image")
    pool = encode_pictures(PictureSource(icons, seed=3), reads, 300)  # a full batch and a part of one
    assert pool.features.shape == (300, 1, 16) and len(pool.shown) == len(pool.names) == 300
    assert [seen.index for seen in pool.shown] == list(range(300))
    assert all(icons.concepts[n].label == s.content.label for n, s in zip(pool.names, pool.shown, strict=True))


def test_pools_number_what_they_show_in_one_list_of_names(encoder: Path, icons: IconSet, bank: SoundBank) -> None:
    sizes = {"image": 4, "video": 3, "audio": 5}
    pools = make_pools(sizes, str(encoder), icons, bank, seed=0, device=torch.device("cpu"))
    names = names_of(icons, bank)
    assert {modality: len(pool.shown) for modality, pool in pools.items()} == sizes
    for pool in pools.values():
        for number, seen in zip(pool.names, pool.shown, strict=True):
            content = seen.content.drawing if isinstance(seen.content, Shot) else seen.content
            assert names[number].removeprefix("a ").removeprefix("an ") == content.label.removeprefix("a ")
            assert isinstance(seen.content, Sound) == (seen.modality == "audio")
    texts: Tensor = text_features(str(encoder), names, torch.device("cpu"))
    assert texts.shape == (len(names), 16)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(len(names)))


def test_what_cannot_be_read_is_told(encoder: Path, icons: IconSet, bank: SoundBank, tmp_path: Path) -> None:
    device = torch.device("cpu")
    with pytest.raises(ConfigError, match="sounds are to be heard, so the recipe must name the sound bank"):
        make_pools({"audio": 1}, str(encoder), icons, None, seed=0, device=device)
    vision = VisionConfig(width=16, blocks=1, heads=2, image_size=32, patch=16)
    ImageBindModel(ImageBindConfig(out_dim=16, vision=vision)).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match="pools: the encoder .* cannot read audio: .* no trunk 'audio'; it has vision"
    ):
        make_pools({"image": 1, "audio": 1}, str(tmp_path), icons, bank, seed=0, device=device)
