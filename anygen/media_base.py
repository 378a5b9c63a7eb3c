"""What every media value can do, and the table of modalities.

A plugin's modality joins by subclassing `Media` under the decorator `register_media`.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from anygen.errors import ConfigError, MediaError, OutputError
from anygen.files import writing
from anygen.sources import MediaLimits, read_source

MEDIA: dict[str, type["Media"]] = {}
"""modality -> class; filled by `register_media`."""

Metadata = Mapping[str, Any]
"""JSON values by name, written into saved files."""


class Media(ABC):
    """One picture, clip, sound or other value of a modality."""

    modality: ClassVar[str]
    """The key under which messages, encoders and generators know it."""
    suffixes: ClassVar[tuple[str, ...]]
    """What `save` can write; the first is the default."""

    @classmethod
    def from_path(cls, path: str | Path, *, limits: MediaLimits | None = None) -> Self:
        """Reads a file.

        Raises:
            MediaError: there is no such file, it is over a limit, or it cannot be decoded.
        """
        return cls.from_any(Path(path), limits=limits)

    @classmethod
    def from_bytes(cls, data: bytes, *, limits: MediaLimits | None = None) -> Self:
        """Decodes the contents of a file.

        Raises:
            MediaError: the data is over a limit or cannot be decoded.
        """
        return cls.from_any(data, limits=limits)

    @classmethod
    def from_any(cls, value: object, *, limits: MediaLimits | None = None, allow_urls: bool = False) -> Self:
        """Makes a value of whatever stands for one: a path, bytes, a data URI, an array, a tensor, a media value.

        Args:
            value: a string is a path, or a data URI, or a URL if it starts like one.
            limits: what to refuse before decoding.
            allow_urls: fetches http and https URLs, which are refused otherwise.

        Raises:
            MediaError: it is of an unsupported type, cannot be read or decoded, or is over a limit.
        """
        if isinstance(value, cls):
            return value
        limits = limits or MediaLimits()
        if (source := read_source(value, limits=limits, allow_urls=allow_urls)) is not None:
            return cls._decode(source.data, source.name, limits)
        if isinstance(value, Media):
            raise MediaError(f"{article(cls.modality)} is wanted, this is {article(value.modality)}")
        return cls._convert(value)

    @classmethod
    @abstractmethod
    def _decode(cls, data: bytes, name: str, limits: MediaLimits) -> Self:
        """Decodes a file's contents, checking the header first; `name` is for messages."""

    @classmethod
    @abstractmethod
    def _convert(cls, value: object) -> Self:
        """Takes a decoded object of another library; raises MediaError if it knows none like it."""

    @abstractmethod
    def _write(self, path: Path, suffix: str, metadata: Metadata) -> None:
        """Writes to `path` in the format of `suffix`, which is one of `suffixes`."""

    def save(self, path: str | Path, *, metadata: Metadata | None = None, overwrite: bool = False) -> Path:
        """Writes a file, whole or not at all; the suffix decides the format.

        Args:
            path: its folder has to exist.
            metadata: JSON values that `read_metadata` reads back from the file.
            overwrite: replaces a file that is there already.

        Raises:
            OutputError: the suffix is none of `suffixes`, the file exists, or the disk refuses.
        """
        path = Path(path)
        if (suffix := path.suffix.lower()) not in self.suffixes:
            raise OutputError(
                f"{path}: {article(self.modality)} is not written as '{suffix}'; known: {', '.join(self.suffixes)}"
            )
        with writing(path, overwrite=overwrite) as temporary:
            self._write(temporary, suffix, metadata or {})
        return path


T = TypeVar("T", bound=type[Media])


def register_media(cls: T) -> T:
    """Class decorator: makes a media class known under its `modality`.

    Raises:
        ConfigError: the modality is taken by another class.
    """
    taken = MEDIA.setdefault(cls.modality, cls)
    if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"the modality '{cls.modality}' is taken by {taken.__module__}.{taken.__qualname__}")
    return cls


def article(noun: str) -> str:
    """`noun` with its indefinite article, for messages."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def is_tensor(value: object) -> bool:
    """Whether `value` is a torch tensor; torch is not imported to find out."""
    return (torch := sys.modules.get("torch")) is not None and isinstance(value, torch.Tensor)


def to_array(value: Any) -> NDArray[Any]:
    """A torch tensor (on any device, of any type) or anything that numpy takes, as an array."""
    if not is_tensor(value):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()


def optional_module(name: str, purpose: str) -> ModuleType:
    """Imports a package that is not among the requirements.

    Raises:
        MediaError: it is not installed; names it.
    """
    try:
        return import_module(name)
    except ImportError:
        raise MediaError(f"{purpose} needs the package '{name}': pip install {name}") from None
