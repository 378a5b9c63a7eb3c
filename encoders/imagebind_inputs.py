"""Pictures, texts and sensor maps -> the tensors that ImageBind's trunks take.

Source: the released ImageBind pipeline (arXiv:2305.05665, appendix A) and, for text, CLIP's.
Shapes: B batch, T tokens.
"""

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


def sensor_values(samples: Sequence[Any], shape: tuple[int, ...]) -> Tensor:
    """Depth maps, thermal maps or IMU readings, as arrays or tensors of `shape` -> float[B, *shape].

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
