"""The sheets of a report: pictures, film strips and spectrograms, numbered, each kind in one PNG.

Shapes: F frames, S side in pixels, N samples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.files import writing

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

GAP, HEAD = 6, 14
EVERY, FRAME = 2, 64
"""A strip shows one frame in so many, at this side."""
NOTHING = (225, 225, 225)


def sheet(pictures: "Sequence[Tensor | None]", path: Path, columns: int = 8) -> Path:
    """Writes the numbered pictures, each float[3, H, W] in [0, 1] and all of one size, as one PNG; returns `path`.

    None leaves a grey field.
    """
    from PIL import Image, ImageDraw

    height, width = next((picture.shape[-2:] for picture in pictures if picture is not None), (128, 128))
    cell, line = width + GAP, height + GAP + HEAD
    rows, columns = -(-len(pictures) // columns), min(columns, len(pictures))
    canvas = Image.new("RGB", (columns * cell, rows * line), "white")
    draw = ImageDraw.Draw(canvas)
    for number, picture in enumerate(pictures):
        x, y = number % columns * cell, number // columns * line
        draw.text((x + 2, y + 1), str(number + 1), fill="black")
        canvas.paste(NOTHING if picture is None else _pil(picture), (x, y + HEAD, x + width, y + HEAD + height))
    with writing(path, overwrite=True) as temporary:
        canvas.save(temporary, format="PNG")
    return path


def film_strips(clips: "Sequence[Tensor | None]", path: Path) -> Path:
    """Writes frames of each clip float[F, 3, S, S] side by side, one strip below the other."""
    return sheet([None if clip is None else film_strip(clip) for clip in clips], path, columns=1)


def film_strip(clip: Tensor) -> Tensor:
    """float[F, 3, S, S] -> float[3, FRAME, FRAME * F / EVERY]."""
    frames = clip[::EVERY].float().cpu()
    size = min(FRAME, frames.shape[-1])
    return torch.cat(list(F.interpolate(frames, size=size, mode="area")), -1)


def mel_plots(waveforms: "Sequence[Tensor | None]", path: Path) -> Path:
    """Writes the log-mel spectrograms of sounds float[N] at 16 kHz, four in a row."""
    return sheet([None if wave is None else mel_plot(wave) for wave in waveforms], path, columns=4)


def mel_plot(waveform: Tensor) -> Tensor:
    """float[N] -> float[3, 2 F, T]: time to the right, high tones on top, from black to yellow."""
    from anygen.generators.mel import LogMel
    from anygen.training.sound_autoencoder import as_pictures

    grey = as_pictures(LogMel()(waveform.float().cpu()[None]))[0, 0].repeat_interleave(2, 0)
    stops = torch.tensor([[0.0, 0.0, 0.02], [0.36, 0.09, 0.43], [0.87, 0.32, 0.23], [0.99, 1.0, 0.64]])
    place = grey * (len(stops) - 1)
    low = place.long().clamp(max=len(stops) - 2)
    part = (place - low)[..., None]
    return (stops[low] * (1 - part) + stops[low + 1] * part).permute(2, 0, 1)


def _pil(picture: Tensor) -> "Picture":
    from anygen.media import Image

    return Image.from_any(picture.clamp(0, 1)).pil
