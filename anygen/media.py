"""Media as values: `Image`, `Video`, `Audio`. Immutable, comparable, checked against limits before decoding.

    picture = Image.from_any("apple.png")            # or bytes, a data URI, a PIL image, an array, a tensor
    picture.save("copy.png", metadata={"seed": 7})   # read back by read_metadata("copy.png")

This is the door; the rooms are `image.py`, `clips.py`, `metadata.py`, `sources.py` and `media_base.py`.
"""

from anygen.clips import Audio, Video
from anygen.errors import ModalityError
from anygen.image import Image
from anygen.media_base import MEDIA, Media, register_media
from anygen.metadata import read_metadata
from anygen.registry import load_plugins
from anygen.sources import MediaLimits

__all__ = [
    "Audio",
    "Image",
    "Media",
    "MediaLimits",
    "Video",
    "media_type",
    "modalities",
    "read_metadata",
    "register_media",
]


def media_type(modality: str) -> type[Media]:
    """The media class of a modality; plugins are loaded only if anygen itself has none.

    Raises:
        ModalityError: nobody registered it; lists the known ones.
    """
    if modality not in MEDIA:
        load_plugins()
    if modality not in MEDIA:
        raise ModalityError(f"there is no modality '{modality}'; known: {', '.join(MEDIA)}")
    return MEDIA[modality]


def modalities() -> list[str]:
    """All modalities that have a media class, plugins' included."""
    load_plugins()
    return list(MEDIA)
