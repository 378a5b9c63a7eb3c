"""Pictures, texts and sensor maps -> the tensors that ImageBind's trunks take.

Source: the released ImageBind pipeline (arXiv:2305.05665, appendix A) and, for text, CLIP's.
Shapes: B batch, T tokens.
"""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from anygen.errors import CheckpointError, MediaError

if TYPE_CHECKING:
    from PIL.Image import Image
    from tokenizers import Tokenizer

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
START, END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_BYTES = (*range(33, 127), *range(161, 173), *range(174, 256))
"""Bytes that stand for themselves in a vocabulary of bytes; the others follow as characters from 256 on."""


def image_values(images: "Sequence[Image]", size: int) -> Tensor:
    """PIL images of any mode and size -> float[B, 3, size, size], normalised by CLIP's mean and deviation.

    The shorter side is resized to `size` (bicubic, antialiased), the middle cropped; transparency becomes white.
    """
    pixels = np.stack([np.asarray(_square(opaque(image), size)) for image in images])  # uint8[B, size, size, 3]
    return normalised(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)


def normalised(pixels: Tensor) -> Tensor:
    """float[..., 3, H, W] in [0, 1] -> the same by CLIP's mean and deviation."""
    mean, std = (torch.tensor(channel, device=pixels.device).view(3, 1, 1) for channel in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std


def opaque(image: "Image") -> "Image":
    """The picture in RGB; where it is transparent it lies on white."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _square(image: "Image", size: int) -> "Image":
    from PIL import Image

    width, height = image.size
    short = min(width, height)
    width, height = size * width // short, size * height // short
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def thermal_values(samples: Sequence[Any], size: int) -> Tensor:
    """Thermal pictures, or arrays or tensors of shape [1, size, size] -> float[B, 1, size, size].

    A picture (an `Image` value) becomes grey, its shorter side is resized to `size` (bicubic, antialiased), the middle
    cropped; 0 is black and 1 white.

    Raises:
        MediaError: an array has another shape or is not finite.
    """
    values = [_grey(sample.pil, size) if hasattr(sample, "pil") else sample for sample in samples]
    return sensor_values(values, (1, size, size))


def _grey(image: "Image", size: int) -> Tensor:
    return torch.from_numpy(np.array(_square(opaque(image).convert("L"), size)))[None].float() / 255


def sensor_values(samples: Sequence[Any], shape: tuple[int, ...]) -> Tensor:
    """Depth maps, thermal maps or IMU readings, as arrays or tensors of `shape` -> float[B, *shape].

    The release has no code that makes such values of depth cameras' or motion sensors' files, so they are taken as
    they are.

    Raises:
        MediaError: a sample has another shape or is not finite.
    """
    values = [torch.as_tensor(sample).float() for sample in samples]
    for value in values:
        if tuple(value.shape) != shape:
            raise MediaError(f"a sample of shape {list(shape)} is wanted, got {list(value.shape)}")
        if not value.isfinite().all():
            raise MediaError("a sample holds NaN or infinity")
    return torch.stack(values)


def load_tokenizer(path: Path, vocab_size: int) -> "Tokenizer":
    """Reads a `tokenizer.json` that has `<|startoftext|>` and, as its largest id, `<|endoftext|>`.

    Raises:
        CheckpointError: the file is missing or unreadable, a token is missing, or the ids do not fit `vocab_size`.
    """
    from tokenizers import Tokenizer

    if not path.exists():
        raise CheckpointError(f"the tokenizer file {path} is missing")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{path} is not a readable tokenizer: {error}") from None
    ids = tokenizer.get_vocab()
    for token in (START, END):
        if token not in ids:
            raise CheckpointError(f"{path} has no token {token}")
    if ids[END] != max(ids.values()):
        # the text feature is read where the largest id stands
        raise CheckpointError(f"{path}: {END} has id {ids[END]}, but must have the largest, {max(ids.values())}")
    if ids[END] >= vocab_size:
        raise CheckpointError(f"{path} has ids up to {ids[END]}, the ImageBind only {vocab_size} rows")
    return tokenizer


def clip_tokenizer(path: Path, vocab_size: int) -> "Tokenizer":
    """Builds CLIP's tokenizer from the list of merges that ImageBind's release reads.

    The vocabulary is 256 bytes, the same at a word's end, one token a merge, start and end.

    Args:
        path: `bpe_simple_vocab_16e6.txt.gz`, or unpacked: a line of comment, then a merge a line.
        vocab_size: 514 and the merges to take, which are the first; the list is longer.

    Raises:
        CheckpointError: the file is missing, is no list of merges, or has too few.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    if not path.is_file():
        raise CheckpointError(f"the vocabulary {path} is missing")
    try:
        packed = path.read_bytes()
        lines = (gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed).decode().rstrip("\n").split("\n")
        merges = [(left, right) for left, right in (line.split() for line in lines[1 : vocab_size - 514 + 1])]
    except (OSError, EOFError, ValueError):
        raise CheckpointError(f"{path} is not a list of merges") from None
    if len(merges) != vocab_size - 514:
        raise CheckpointError(f"{path} has {len(merges):,} merges, {vocab_size - 514:,} are wanted")
    letters = [chr(byte) for byte in _BYTES] + [chr(256 + n) for n in range(256 - len(_BYTES))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=END, end_of_word_suffix="</w>"))
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    words = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
    letters_of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters_of_bytes])  # type: ignore[assignment]
    return tokenizer


def token_ids(tokenizer: "Tokenizer", texts: Sequence[str], context_length: int) -> Tensor:
    """Texts -> long[B, context_length]: start, words, end, zeros; words beyond the length are cut.

    Differs: the release repairs mojibake and HTML entities first; we leave texts as they are, but for what the
    tokenizer's own normaliser does.

    Raises:
        MediaError: one of them is not a string.
    """
    if wrong := [type(text).__name__ for text in texts if not isinstance(text, str)]:
        raise MediaError(f"texts are wanted as str, got {wrong[0]}")
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    ids = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, encoding in zip(ids, tokenizer.encode_batch(list(texts), add_special_tokens=False), strict=True):
        line = [start, *encoding.ids][: context_length - 1] + [end]
        row[: len(line)] = torch.tensor(line)
    return ids
