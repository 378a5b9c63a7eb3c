"""From whatever a user passes as media (path, bytes, data URI, URL) to its bytes, within limits.

Nothing is decoded here. What a file holds is judged by its first bytes, never by its name.
"""

import base64
import binascii
import os
import re
import stat
from codecs import getincrementaldecoder
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.error import URLError
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import Request, url2pathname, urlopen

from anygen.config import Config
from anygen.errors import ConfigError, MediaError


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaLimits(Config):
    """What is refused before it is decoded."""

    max_bytes: int = 256 * 2**20
    """Size of a file, of raw bytes, or of what a URL delivers."""
    max_pixels: int = 64 * 10**6
    """Width times height of a picture or of one frame."""
    max_frames: int = 1800
    """Frames of a clip."""
    max_seconds: float = 600.0
    """Length of a clip or sound."""
    max_decoded_bytes: int = 2 * 2**30
    """What a clip or sound takes in memory once decoded."""
    url_timeout: float = 20.0
    """Seconds that a URL may keep us waiting."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ConfigError(f"MediaLimits: {field.name} must be positive, got {getattr(self, field.name)}")

    def check_bytes(self, count: int, name: str) -> None:
        """Raises MediaError if `name` has more bytes than allowed, or none."""
        if count == 0:
            raise MediaError(f"{name} is empty (0 bytes)")
        if count > self.max_bytes:
            raise MediaError(f"{name} has {count:,} bytes, at most {self.max_bytes:,} are read (max_bytes)")

    def check_pixels(self, width: int, height: int, name: str) -> None:
        """Raises MediaError if a picture or frame of that size is over the limit."""
        if width * height > self.max_pixels:
            raise MediaError(
                f"{name} has {width:,} × {height:,} = {width * height:,} pixels, at most {self.max_pixels:,} are "
                "decoded (max_pixels); scale it down, or raise the limit if you trust the file"
            )

    def check_length(self, *, seconds: float, name: str, frames: int = 0, decoded_bytes: int = 0) -> None:
        """Raises MediaError if a clip or sound is too long for `max_seconds`, `max_frames` or the memory."""
        for count, limit, unit, field in (
            (seconds, self.max_seconds, "seconds", "max_seconds"),
            (frames, self.max_frames, "frames", "max_frames"),
            (decoded_bytes, self.max_decoded_bytes, "bytes once decoded", "max_decoded_bytes"),
        ):
            if count > limit:
                raise MediaError(
                    f"{name} has {count:,.10g} {unit}, at most {limit:,.10g} are decoded ({field}); cut it, "
                    "or raise the limit if you trust the file"
                )


@dataclass(frozen=True, slots=True)
class Source:
    """Encoded media, not yet looked into."""

    data: bytes
    name: str
    """What messages call it: the file's name, "the data URI", …"""


def read_source(value: object, *, limits: MediaLimits, allow_urls: bool = False) -> Source | None:
    """Reads a path, bytes, a data URI or (only if allowed) a URL; None for anything else.

    Raises:
        MediaError: nothing is there, it is no regular file, it is empty, too large or not allowed.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        limits.check_bytes(len(value), "the data")
        return Source(bytes(value), "the data")
    if isinstance(value, os.PathLike):
        return _read_path(Path(value), limits)
    if not isinstance(value, str):
        return None
    match re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):", value):  # two letters at least: C:\ is a path
        case None:
            return _read_path(Path(value), limits)
        case found if found[1].lower() == "data":
            return Source(decode_data_uri(value, limits), "the data URI")
        case found if found[1].lower() in ("http", "https"):
            return _read_url(value, limits, allow_urls)
        case found if found[1].lower() == "file":
            return _read_path(Path(url2pathname(unquote(urlsplit(value).path))), limits)
        case _:
            return _read_path(Path(value), limits)


def decode_data_uri(uri: str, limits: MediaLimits) -> bytes:
    """The bytes of `data:[<type>][;base64],<payload>`.

    Raises:
        MediaError: there is no comma, the base64 is damaged, or it holds too much or nothing.
    """
    head, comma, payload = uri.partition(",")
    if not comma:
        raise MediaError(f"the data URI '{shorten(uri)}' has no comma; wanted: data:image/png;base64,iVBOR…")
    if head.lower().endswith(";base64"):
        return decode_base64(payload, "the data URI", limits)
    limits.check_bytes(len(payload), "the data URI")
    return unquote_to_bytes(payload)


def decode_base64(text: object, name: str, limits: MediaLimits) -> bytes:
    """Standard base64, checked for size before it is decoded.

    Raises:
        MediaError: it is no string, is damaged, or holds too much or nothing.
    """
    if not isinstance(text, str):
        raise MediaError(f"{name} is of type {type(text).__name__}; a string of base64 is wanted")
    limits.check_bytes(len(text) * 3 // 4, name)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{name} is not valid base64 ({error})") from None


def sniff(data: bytes) -> str:
    """What the first bytes look like, for messages: "a PNG picture", "text", …, or "of an unknown format"."""
    for offset, magic, what in _MAGIC:
        if data[offset : offset + len(magic)] == magic:
            return what
    head = data[:1024].lstrip().lower()
    if head.startswith((b"<svg", b"<?xml")) and b"<svg" in head:
        return "an SVG drawing"
    try:
        text = getincrementaldecoder("utf-8")().decode(data[:1024])  # incremental: a cut-off last letter is fine
    except UnicodeDecodeError:
        return "of an unknown format"
    return "of an unknown format" if re.search(r"[\x00-\x08\x0e-\x1f]", text) else "text"


def shorten(text: str, length: int = 60) -> str:
    """`text` cut to `length` characters, for messages."""
    return text if len(text) <= length else text[: length - 1] + "…"


_MAGIC = (
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"GIF8", "a GIF picture"),
    (8, b"WEBP", "a WebP picture"),
    (0, b"BM", "a BMP picture"),
    (0, b"II*\0", "a TIFF picture"),
    (0, b"MM\0*", "a TIFF picture"),
    (8, b"WAVE", "a WAV sound"),
    (0, b"fLaC", "a FLAC sound"),
    (0, b"OggS", "an Ogg sound"),
    (0, b"ID3", "an MP3 sound"),
    (4, b"ftyp", "an MP4 or HEIF file"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a ZIP archive"),
)


def _read_path(path: Path, limits: MediaLimits) -> Source:
    name = shorten(str(path), 200)
    try:
        mode = path.stat()
        if stat.S_ISDIR(mode.st_mode):
            raise MediaError(f"{name} is a directory; a file is wanted")
        if not stat.S_ISREG(mode.st_mode):  # a pipe or a device may never end
            raise MediaError(f"{name} is not a regular file")
        limits.check_bytes(mode.st_size, name)
        return Source(path.read_bytes(), path.name)
    except MediaError:
        raise
    except FileNotFoundError:
        raise MediaError(f"there is no file {name}") from None
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL in the name
        hint = "; base64 has to come as a data URI (data:image/png;base64,…)" if len(str(path)) > 200 else ""
        raise MediaError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}{hint}") from None


def _read_url(url: str, limits: MediaLimits, allow_urls: bool) -> Source:
    if not allow_urls:
        raise MediaError(f"'{shorten(url)}' is a URL, and fetching is off; download the file, or pass allow_urls=True")
    try:
        with urlopen(Request(url, headers={"User-Agent": "anygen"}), timeout=limits.url_timeout) as response:
            data = response.read(limits.max_bytes + 1)
    except (URLError, OSError, ValueError) as error:
        raise MediaError(f"'{shorten(url)}' cannot be fetched: {error}") from None
    limits.check_bytes(len(data), shorten(url))
    return Source(data, shorten(url))
