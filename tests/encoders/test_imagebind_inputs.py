"""What ImageBind's trunks are given for pictures, texts and sensors."""

from pathlib import Path

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
    image_values,
    load_tokenizer,
    sensor_values,
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
