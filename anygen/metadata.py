"""What anygen writes about a file into the file: prompt, seed, model.

PNG has one international text chunk a value, its key prefixed by "anygen:". The other formats have one text field
(EXIF description, GIF, MP4 and WAV comment), which holds "anygen:" and one JSON object.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image

from anygen.errors import MediaError
from anygen.media_base import optional_module
from anygen.sources import MediaLimits, read_source, sniff

PNG_PREFIX = "anygen:"
_EXIF_DESCRIPTION = 0x010E


def pack(metadata: Mapping[str, Any]) -> str:
    """One line of ASCII that `unpack` reads back."""
    return PNG_PREFIX + json.dumps(dict(metadata))


def unpack(text: str | bytes | None) -> dict[str, Any]:
    """The metadata in a comment; empty if the comment is somebody else's."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    if not text or not text.startswith(PNG_PREFIX):
        return {}
    try:
        return json.loads(text.removeprefix(PNG_PREFIX).rstrip("\0"))
    except json.JSONDecodeError:
        return {}


def exif_of(metadata: Mapping[str, Any]) -> PIL.Image.Exif:
    """An EXIF block with the metadata in its description."""
    exif = PIL.Image.Exif()
    exif[_EXIF_DESCRIPTION] = pack(metadata)
    return exif


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What anygen wrote into a file when it saved it; empty if the file is not from anygen.

    Raises:
        MediaError: there is no such file, or it is of a format that anygen does not write.
    """
    source = read_source(Path(path), limits=MediaLimits())
    assert source is not None
    match sniff(source.data).split()[-1]:
        case "picture":
            return _from_picture(source.data, source.name)
        case "sound":
            soundfile = optional_module("soundfile", "reading a sound's metadata")
            try:
                with soundfile.SoundFile(io.BytesIO(source.data)) as file:
                    return unpack(file.comment)
            except soundfile.LibsndfileError as error:
                raise MediaError(f"{source.name} is damaged ({error.error_string})") from None
        case "file" | "video":
            av = optional_module("av", "reading a video's metadata")
            try:
                with av.open(io.BytesIO(source.data)) as container:
                    return unpack(container.metadata.get("comment"))
            except av.FFmpegError as error:
                raise MediaError(f"{source.name} is damaged ({error.strerror})") from None
        case _:
            raise MediaError(f"{source.name} is of no kind that anygen writes: its content is {sniff(source.data)}")


def _from_picture(data: bytes, name: str) -> dict[str, Any]:
    try:
        with PIL.Image.open(io.BytesIO(data)) as opened:
            if opened.format == "PNG":
                texts = {str(key): str(value) for key, value in opened.info.items()}
                return {
                    key.removeprefix(PNG_PREFIX): json.loads(value)
                    for key, value in texts.items()
                    if key.startswith(PNG_PREFIX)
                }
            return unpack(opened.info.get("comment")) or unpack(opened.getexif().get(_EXIF_DESCRIPTION))
    except (OSError, ValueError, SyntaxError) as error:
        raise MediaError(f"{name} is damaged, its metadata cannot be read ({error})") from None
