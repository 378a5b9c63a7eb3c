"""What ImageBind's trunks are given for pictures, texts and sensors."""

import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from anygen.encoders.imagebind_inputs import (
    PIXEL_MEAN,
    PIXEL_STD,
    clip_tokenizer,
    image_values,
    load_tokenizer,
    sensor_values,
    thermal_values,
    token_ids,
)
from anygen.errors import CheckpointError, MediaError

WORDS = {"[UNK]": 0, "red": 1, "apple": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}


def pixels_of(values: torch.Tensor) -> np.ndarray:
    """float[B, 3, H, W] -> uint8[B, H, W, 3], the normalisation undone."""
    mean, std = (torch.tensor(channel).view(3, 1, 1) for channel in (PIXEL_MEAN, PIXEL_STD))
    return ((values * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def word_tokenizer(words: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    return tokenizer


def test_a_picture_of_the_right_size_is_only_normalised() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    values = image_values([Image.fromarray(pixels)], 16)
    channels = [(pixels[..., c] / 255 - PIXEL_MEAN[c]) / PIXEL_STD[c] for c in range(3)]
    torch.testing.assert_close(values[0], torch.tensor(np.stack(channels), dtype=torch.float32))


def test_the_shorter_side_is_resized_and_the_middle_kept() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    resized = np.asarray(picture.resize((30, 20), Image.Resampling.BICUBIC))  # 20 * 61 / 40 = 30.5
    np.testing.assert_array_equal(pixels_of(image_values([picture], 20))[0], resized[:, 5:25])
    tall = picture.transpose(Image.Transpose.TRANSPOSE)
    resized = np.asarray(tall.resize((20, 30), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pixels_of(image_values([tall], 20))[0], resized[5:25])


def test_transparency_becomes_white() -> None:
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 4, 8))
    pixels = pixels_of(image_values([picture], 8))[0]
    assert pixels[0, 0].tolist() == [0, 0, 255]
    assert pixels[0, 7].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    values = image_values([Image.new("RGB", (8, 8), "white").convert(mode)], 8)
    assert (pixels_of(values) == 255).all()


def test_texts_are_framed_cut_and_filled_with_zeros() -> None:
    ids = token_ids(word_tokenizer(WORDS), ["red apple", "red red red red red", ""], 5)
    assert ids.tolist() == [[3, 1, 2, 4, 0], [3, 1, 1, 1, 4], [3, 4, 0, 0, 0]]


def test_only_strings_are_texts() -> None:
    with pytest.raises(MediaError, match="texts are wanted as str, got bytes"):
        token_ids(word_tokenizer(WORDS), ["red", b"red"], 5)  # type: ignore[list-item]


def test_sensors_are_stacked_as_float32() -> None:
    samples = [np.ones((1, 2, 2)), torch.zeros(1, 2, 2, dtype=torch.float16)]
    torch.testing.assert_close(
        sensor_values(samples, (1, 2, 2)), torch.stack([torch.ones(1, 2, 2), torch.zeros(1, 2, 2)])
    )


def test_sensors_of_another_shape_or_not_finite_are_refused() -> None:
    with pytest.raises(MediaError, match=r"a sample of shape \[6, 40\] is wanted, got \[40, 6\]"):
        sensor_values([np.zeros((40, 6))], (6, 40))
    with pytest.raises(MediaError, match="a sample holds NaN or infinity"):
        sensor_values([np.full((6, 40), np.nan)], (6, 40))


def test_thermal_pictures_are_grey_and_from_black_to_white() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    values = thermal_values([SimpleNamespace(pil=picture), np.ones((1, 8, 8))], 8)
    grey = np.asarray(picture.convert("L"))[2:10]
    torch.testing.assert_close(values[0, 0], torch.from_numpy(grey.copy()).float() / 255)
    torch.testing.assert_close(values[1], torch.ones(1, 8, 8))
    scaled = np.asarray(picture.convert("L").resize((4, 6), Image.Resampling.BICUBIC))[1:5]
    torch.testing.assert_close(
        thermal_values([SimpleNamespace(pil=picture)], 4)[0, 0], torch.from_numpy(scaled.copy()).float() / 255
    )
    with pytest.raises(MediaError, match=r"a sample of shape \[1, 8, 8\] is wanted, got \[8, 8\]"):
        thermal_values([np.ones((8, 8))], 8)


MERGES = ["d o", "do g</w>", "a n", "an d</w>", "! !</w>", "Ã ©</w>", "1 2</w>", "' s</w>"]


def merge_list(path: Path, *, packed: bool) -> Path:
    text = "\n".join(["#version: 0.2", *MERGES, "n o"]) + "\n"  # one merge more than is taken
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


@pytest.mark.parametrize("packed", [True, False])
def test_clip_s_vocabulary_gives_what_transformers_clip_tokenizer_gives(tmp_path: Path, packed: bool) -> None:
    from transformers import CLIPTokenizer

    ours = clip_tokenizer(merge_list(tmp_path / "bpe.txt.gz", packed=packed), 514 + len(MERGES))
    merges: Any = [tuple(merge.split()) for merge in MERGES]
    theirs = CLIPTokenizer(vocab=ours.get_vocab(), merges=merges)
    for text in ("A Dog and  the dog's café!!", "12 dogs, 1 cat\n...", "日本 I'll <and> DON'T"):
        wanted = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False).ids == wanted
    size = ours.get_vocab_size()
    assert (ours.token_to_id("!"), ours.token_to_id("!</w>"), ours.token_to_id("do")) == (0, 256, 512)
    ids = token_ids(ours, ["dog"], 4).tolist()
    assert ids == [[size - 2, 513, size - 1, 0]]
    ours.save(str(tmp_path / "tokenizer.json"))
    assert token_ids(load_tokenizer(tmp_path / "tokenizer.json", size), ["dog"], 4).tolist() == ids


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the vocabulary .*nowhere is missing"):
        clip_tokenizer(tmp_path / "nowhere", 520)
    path = merge_list(tmp_path / "bpe.txt", packed=False)
    with pytest.raises(CheckpointError, match=r"bpe.txt has 9 merges, 486 are wanted"):
        clip_tokenizer(path, 1000)
    for spoilt in (b"\x1f\x8bno", b"#version\none\ntwo", b"\xff\xfe\xff"):
        path.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match="bpe.txt is not a list of merges"):
            clip_tokenizer(path, 516)


def test_a_tokenizer_is_read(tmp_path: Path) -> None:
    word_tokenizer(WORDS).save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json", 5)
    assert token_ids(loaded, ["apple"], 4).tolist() == [[3, 2, 4, 0]]


@pytest.mark.parametrize(
    ("words", "vocab_size", "message"),
    [
        ({"[UNK]": 0, "<|endoftext|>": 1}, 9, r"has no token <\|startoftext\|>"),
        (WORDS | {"pear": 5}, 9, r"<\|endoftext\|> has id 4, but must have the largest, 5"),
        (WORDS, 4, "has ids up to 4, the ImageBind only 4 rows"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    tmp_path: Path, words: dict[str, int], vocab_size: int, message: str
) -> None:
    word_tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path / "tokenizer.json", vocab_size)


def test_a_tokenizer_file_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match=r"the tokenizer file .*tokenizer\.json is missing"):
        load_tokenizer(path, 5)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a readable tokenizer: "):
        load_tokenizer(path, 5)
