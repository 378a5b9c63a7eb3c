"""Pictures.

Shapes: H height, W width.
"""

import io
import json
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL import ImageOps
from PIL.PngImagePlugin import PngInfo

from anygen.errors import MediaError, MediaWarning
from anygen.media_base import Media, Metadata, is_tensor, register_media, to_array
from anygen.metadata import PNG_PREFIX, exif_of, pack
from anygen.sources import MediaLimits, sniff

DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error)
"""What Pillow's readers raise on damaged files."""
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO")
"""The formats that are read; without a list Pillow would start Ghostscript on an EPS file."""


@register_media
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Image(Media):
    """A picture.

    Whatever comes in becomes RGB with 8 bits: transparency is composed on white, 16 bits are scaled, the EXIF
    orientation is applied, CMYK, grey and palette pictures are converted.

        >>> picture = Image.from_any(np.zeros((8, 16, 3), np.uint8))  # or a path, bytes, a PIL image, a tensor
        >>> picture
        Image(16×8)
        >>> Image.from_path(picture.save("black.png", metadata={"seed": 7})) == picture
        True
    """

    modality = "image"
    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

    pil: PIL.Image.Image
    """RGB, a copy of what was given."""

    def __post_init__(self) -> None:
        if not isinstance(self.pil, PIL.Image.Image):
            raise MediaError(
                f"Image wraps a PIL image, not {type(self.pil).__name__}; Image.from_any takes other types"
            )
        object.__setattr__(self, "pil", to_rgb(self.pil))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pil.size

    @property
    def array(self) -> NDArray[np.uint8]:
        """uint8[H, W, 3], a copy."""
        return np.array(self.pil)

    @classmethod
    def _decode(cls, data: bytes, name: str, limits: MediaLimits) -> Self:
        try:
            with warnings.catch_warnings():
                # Pillow warns above a limit of its own; ours is checked below.
                warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
                opened = PIL.Image.open(io.BytesIO(data), formats=_readable_formats())
        except PIL.Image.DecompressionBombError as error:
            raise MediaError(
                f"{name} is refused before decoding: {error}; at most {limits.max_pixels:,} pixels are decoded"
            ) from None
        except PIL.UnidentifiedImageError:
            raise MediaError(
                f"{name} is not a picture that can be read: its content is {sniff(data)}, whatever its name says; "
                "wanted: PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF"
            ) from None
        except DECODING_ERRORS as error:
            raise MediaError(f"{name} is damaged, its header cannot be read ({error})") from None
        limits.check_pixels(*opened.size, name)
        try:
            opened.load()
            if getattr(opened, "is_animated", False) and opened.format != "MPO":  # an MPO's others are previews
                frames = getattr(opened, "n_frames", 2)
                warnings.warn(
                    f"{name} is animated ({frames} frames); only the first is used; pass it as a video for all",
                    MediaWarning,
                    stacklevel=2,
                )
                opened.seek(0)
            return cls(ImageOps.exif_transpose(opened))
        except DECODING_ERRORS as error:
            raise MediaError(f"{name} is damaged or cut short ({error}); its header says {opened.format}") from None

    @classmethod
    def _convert(cls, value: object) -> Self:
        if isinstance(value, PIL.Image.Image):
            return cls(ImageOps.exif_transpose(value))
        if isinstance(value, np.ndarray) or is_tensor(value):
            return cls(_array_to_pil(value))
        raise MediaError(
            f"{type(value).__name__} is not supported as an image; wanted: a path, bytes, a data URI, a PIL image, "
            "an array [H, W, 3] or a tensor [3, H, W]"
        )

    def _write(self, path: Path, suffix: str, metadata: Metadata) -> None:
        options: dict[str, Any] = {}
        if suffix == ".png":
            options["pnginfo"] = chunks = PngInfo()
            for key, value in metadata.items():
                chunks.add_itxt(PNG_PREFIX + key, json.dumps(value, ensure_ascii=False))
        elif metadata and suffix in (".jpg", ".jpeg", ".webp", ".tif", ".tiff"):
            options["exif"] = exif_of(metadata)
        elif metadata and suffix == ".gif":
            options["comment"] = pack(metadata)
        if suffix in (".jpg", ".jpeg", ".webp"):
            options["quality"] = 95
        self.pil.save(path, format=PIL.Image.registered_extensions()[suffix], **options)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.pil.save(buffer, "PNG")
        return buffer.getvalue()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Image):
            return NotImplemented
        return self.size == other.size and self.pil.tobytes() == other.pil.tobytes()

    def __hash__(self) -> int:
        return hash((self.size, self.pil.tobytes()))

    def __repr__(self) -> str:
        return f"Image({self.size[0]}×{self.size[1]})"


def to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A copy with 8-bit RGB pixels: alpha composed on white, 16 bits and floats scaled to 0..255.

    Raises:
        MediaError: a float picture holds NaN.
    """
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = PIL.Image.fromarray(_scale_to_bytes(np.asarray(picture)))
    elif picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, "white"), rgba)
    rgb = picture.convert("RGB")
    rgb.info.clear()  # a colour profile or a comment of the old picture would be saved with the new one
    return rgb


def _scale_to_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey values to 0..255. Integers count as 16 bits (Pillow's "I" too: so it opened 16-bit PNGs for years);
    floats as 0..1, or as 0..255 if any exceeds 1."""
    if np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all():
            raise MediaError("the picture holds NaN or infinite pixels")
        scale = 1.0 if values.max() > 1 else 255.0
    else:
        scale = 1 / 257  # 65535 / 255
    return (values * scale).round().clip(0, 255).astype(np.uint8)


def _array_to_pil(value: Any) -> PIL.Image.Image:
    array, layout = to_array(value), "[H, W, 3]"
    if is_tensor(value) and array.ndim == 3:
        array, layout = np.moveaxis(array, 0, -1), "[3, H, W]"
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or 0 in array.shape:
        raise MediaError(
            f"a picture is {layout} with 1, 3 or 4 channels, or [H, W]; got "
            f"{'a tensor' if is_tensor(value) else 'an array'} {list(value.shape)}"
        )
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = _scale_to_bytes(array)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise MediaError(
                f"a picture of floats has values in 0..1, got {np.nanmin(array):.3g}..{np.nanmax(array):.3g}"
                f"{' with NaN' if np.isnan(array).any() else ''}"
            )
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise MediaError(f"a picture is uint8, uint16, bool or float in 0..1, not {array.dtype}")
    return PIL.Image.fromarray(np.ascontiguousarray(array))


def _readable_formats() -> list[str]:
    PIL.Image.init()
    return [name for name in _FORMATS if name in PIL.Image.OPEN]
