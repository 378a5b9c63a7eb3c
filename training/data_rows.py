"""Rows of a user's data, from JSONL, Parquet, WebDataset, Hugging Face datasets and plain text, with what is wrong.

Every kind is a `Rows`: it has a length, gives row `i` again whenever it is asked, and says under which line or place
`i` is found. Nothing but offsets is kept in memory, so media that lie inside the rows are read when they are needed.
A row that does not fit raises `RowFault`; `read` counts those, and stops a run that would leave out too many.
"""

import codecs
import json
import logging
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from anygen.config import Config
from anygen.errors import ConfigError

logger = logging.getLogger("anygen.training")

T = TypeVar("T")
LONGEST = 64 * 2**20
"""Bytes of a JSON line; media inside a row count."""
LONGEST_CAPTION = 2000
"""Characters of a caption."""
Format = Literal["jsonl", "parquet", "webdataset", "datasets", "text"]
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".txt": "text",
}
_PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
"""First bytes of compressed files -> what unpacks them."""
_NULS = "it holds NUL characters, as UTF-16 does"


class RowFault(ValueError):
    """What is wrong with one row, in a few words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOfRows(Config):
    """Where rows come from; a recipe may write the path alone."""

    path: str
    """A file, a pattern such as `shards/*.tar`, a directory that `Dataset.save_to_disk` wrote, or, with `format:
    datasets`, the name of a dataset on the Hugging Face hub."""
    format: Format | None = None
    """None tells it by the suffix; a directory is a dataset."""
    name: str | None = None
    """Configuration of a hub's dataset."""
    split: str = "train"
    """Split of a hub's dataset, or of a directory with several."""
    revision: str | None = None
    """Of a hub's dataset; pin it in a recipe that is to be reproduced."""
    columns: dict[str, str] = field(default_factory=dict)
    """Key that anygen reads -> key that the rows have."""


Source = str | SourceOfRows


class Rows(ABC):
    """Rows by number."""

    unit = "row"
    """What `place` counts."""
    base: Path = Path(".")
    """The folder that relative paths of media start from."""
    name: str = ""
    """For messages."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, number: int) -> dict[str, Any]:
        """Row `number`, from 0. Raises RowFault if it cannot be read."""

    def place(self, number: int) -> int:
        """Where row `number` is found, counted from 1 in `unit`s."""
        return number + 1


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Each line's number from 1, where it begins, and its bytes, without the mark of UTF-8 that a file may begin with.

    Raises:
        ConfigError: the file is UTF-16 or UTF-32.
    """
    offset = 0
    with path.open("rb") as file:
        for line, text in enumerate(file, start=1):
            # Without a mark, the byte beside a line's end, or beside any ASCII letter, tells UTF-16 by the second line.
            if line <= 2 and (
                b"\0" in text or (line == 1 and text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)))
            ):
                raise ConfigError(f"{path} is UTF-16, or holds NUL characters; save it as UTF-8")
            mark = len(codecs.BOM_UTF8) if line == 1 and text.startswith(codecs.BOM_UTF8) else 0
            yield line, offset + mark, text[mark:]
            offset += len(text)


class JsonLines(Rows):
    """One JSON object a line; empty lines do not count as rows.

    Raises:
        ConfigError: the file is UTF-16.
    """

    unit = "line"

    def __init__(self, path: Path) -> None:
        self.path, self.base, self.name = path, path.parent, str(path)
        self._lines = [(line, offset, len(text)) for line, offset, text in _lines(path) if text.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def place(self, number: int) -> int:
        return self._lines[number][0]

    def __getitem__(self, number: int) -> dict[str, Any]:
        _, offset, length = self._lines[number]
        if length > LONGEST:
            raise RowFault(f"the line has {length:,} bytes, more than {LONGEST:,}")
        with self.path.open("rb") as file:
            file.seek(offset)
            text = file.read(length)
        if b"\0" in text:
            raise RowFault(_NULS)
        try:
            row = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError:
            raise RowFault("it is not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise RowFault(f"it is not JSON ({str(error)[:60]})") from None
        if not isinstance(row, dict):
            raise RowFault("it is no JSON object")
        return row


class CaptionLines(Rows):
    """One caption a line, as `{"caption": …}`; of equal ones the first counts, empty lines do not count.

    Raises:
        ConfigError: the file is UTF-16.
    """

    unit = "line"

    def __init__(self, path: Path) -> None:
        self.path, self.base, self.name = path, path.parent, str(path)
        self._lines: list[tuple[int, str | None, str]] = []
        seen: set[str] = set()
        self.empty = self.repeated = 0
        for line, _, raw in _lines(path):
            if not raw.strip():
                self.empty += 1
                continue
            try:
                caption = " ".join(raw.decode("utf-8").split())
            except UnicodeDecodeError:
                self._lines.append((line, None, "it is not UTF-8"))
                continue
            if "\0" in caption:
                self._lines.append((line, None, _NULS))
            elif len(caption) > LONGEST_CAPTION:
                why = f"it has {len(caption):,} characters; a caption has at most {LONGEST_CAPTION:,}"
                self._lines.append((line, None, why))
            elif caption in seen:
                self.repeated += 1
            else:
                seen.add(caption)
                self._lines.append((line, caption, ""))
        if self.empty or self.repeated:
            logger.info("%s: %d empty lines and %d repeated captions passed over", path, self.empty, self.repeated)

    def __len__(self) -> int:
        return len(self._lines)

    def place(self, number: int) -> int:
        return self._lines[number][0]

    def __getitem__(self, number: int) -> dict[str, Any]:
        _, caption, why = self._lines[number]
        if caption is None:
            raise RowFault(why)
        return {"caption": caption}


class TarSamples(Rows):
    """WebDataset: members of a tar file that share a name up to its first dot are one sample.

    A sample's row is what its `json` member holds, or empty; `members` has the bytes of the others by their extension.
    A `txt` member is its caption.

    Raises:
        ConfigError: the file is compressed, or no tar file.
    """

    unit = "sample"

    def __init__(self, path: Path) -> None:
        self.path, self.base, self.name = path, path.parent, str(path)
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as file:  # members are read by their offsets, which compression moves
                for member in file:
                    folder, _, name = member.name.rpartition("/")
                    if member.isfile() and not name.startswith((".", "_")) and "." in name:
                        key, extension = name.split(".", 1)
                        place = (member.offset_data, member.size)
                        groups.setdefault(f"{folder}/{key}", {})[extension.lower()] = place
        except tarfile.TarError as error:
            if (tool := _unpacker(path)) is not None:
                raise ConfigError(
                    f"{path} is compressed; unpack it first, as with {tool} < {path.name} > unpacked.tar"
                ) from None
            raise ConfigError(f"{path} is not a tar file, or is cut off ({error})") from None
        self._samples = list(groups.values())

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, number: int, extension: str) -> bytes:
        """The bytes of one member."""
        offset, size = self._samples[number][extension]
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def __getitem__(self, number: int) -> dict[str, Any]:
        members = self._samples[number]
        row: Any = {}
        try:
            if "json" in members:
                row = json.loads(self.read(number, "json").decode("utf-8"))
            if isinstance(row, dict) and "txt" in members:
                row.setdefault("caption", self.read(number, "txt").decode("utf-8"))
        except UnicodeDecodeError:
            raise RowFault("it is not UTF-8") from None
        except ValueError as error:
            raise RowFault(f"its json member is not JSON ({str(error)[:60]})") from None
        if not isinstance(row, dict):
            raise RowFault("its json member is no JSON object")
        others = {name: self.read(number, name) for name in members if name not in ("json", "txt")}
        return row | {"members": others}


def _unpacker(path: Path) -> str | None:
    with path.open("rb") as file:
        first = file.read(8)
    return next((tool for mark, tool in _PACKED.items() if first.startswith(mark)), None)


class ArrowRows(Rows):
    """A table of the package `datasets`: memory-mapped, media not decoded."""

    def __init__(self, table: Any, name: str, base: Path) -> None:
        from datasets import Audio, Image, Video

        for column, kind in table.features.items():
            if isinstance(kind, Audio | Image | Video):
                table = table.cast_column(column, type(kind)(decode=False))
        self.table, self.name, self.base = table, name, base

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return _without_nones(self.table[number])


class _Renamed(Rows):
    def __init__(self, rows: Rows, columns: dict[str, str]) -> None:
        self.rows, self.columns = rows, columns
        self.unit, self.base, self.name = rows.unit, rows.base, rows.name

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, number: int) -> int:
        return self.rows.place(number)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        if lacking := [theirs for theirs in self.columns.values() if theirs not in row]:
            raise RowFault(f"it has no '{lacking[0]}', only {', '.join(row) or 'nothing'}")
        return row | {ours: row[theirs] for ours, theirs in self.columns.items()}


def _without_nones(value: Any) -> Any:
    """Arrow gives every record of a column all keys that any of them has."""
    if isinstance(value, dict):
        return {key: _without_nones(inner) for key, inner in value.items() if inner is not None}
    return [_without_nones(inner) for inner in value] if isinstance(value, list) else value


def open_rows(source: Source) -> list[Rows]:
    """The rows of a source, one `Rows` a file.

    Raises:
        ConfigError: there is no such file, its kind cannot be told or read, or a package is missing.
    """
    told = SourceOfRows(path=source) if isinstance(source, str) else source
    path = Path(told.path)
    if told.format == "datasets" or (told.format is None and path.is_dir()):
        opened: list[Rows] = [_dataset(told)]
    else:
        files = sorted(path.parent.glob(path.name)) if any(mark in path.name for mark in "*?[") else [path]
        if not files or not all(file.is_file() for file in files):
            raise ConfigError(f"there is no file {path} with data")
        opened = [_open(file, told.format) for file in files]
    return [_Renamed(rows, told.columns) for rows in opened] if told.columns else opened


def _open(path: Path, kind: Format | None) -> Rows:
    kind = kind or _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(
            f"{path}: the suffix '{path.suffix}' tells no kind of data; known: {', '.join(_SUFFIXES)}, or say format:"
        )
    if kind == "parquet":
        return _parquet(path)
    makers: dict[str, Callable[[Path], Rows]] = {"jsonl": JsonLines, "webdataset": TarSamples, "text": CaptionLines}
    return makers[kind](path)


def _package() -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError("Parquet and Hugging Face datasets need a package: pip install 'anygen-mm[train]'") from None
    return datasets


def _parquet(path: Path) -> Rows:
    package = _package()
    try:
        return ArrowRows(package.Dataset.from_parquet(str(path)), str(path), path.parent)
    except Exception as error:
        raise ConfigError(f"{path} is not a readable Parquet file ({_cause(error)})") from None


def _dataset(told: SourceOfRows) -> Rows:
    package, path = _package(), Path(told.path)
    try:
        if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
            table = package.load_from_disk(told.path)
            table = table[told.split] if isinstance(table, dict) else table
        else:
            table = package.load_dataset(told.path, told.name, split=told.split, revision=told.revision)
    except Exception as error:
        raise ConfigError(f"the dataset {told.path} cannot be read ({_cause(error)})") from None
    return ArrowRows(table, told.path, path if path.is_dir() else Path("."))


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@dataclass(slots=True)
class Faults:
    """The rows of a source that do not fit."""

    source: str
    unit: str = "row"
    rows: int = 0
    """How many there were, those that fit among them."""
    found: list[tuple[int, str]] = field(default_factory=list)
    """Where, and why not."""

    def report(self, shown: int = 8) -> str:
        """One sentence: how many of how many, in which lines, and why the first ones."""
        places = [str(place) for place, _ in self.found]
        listed = ", ".join(places[:shown]) + (f" and {len(places) - shown} more" if len(places) > shown else "")
        reasons = list(dict.fromkeys(why for _, why in self.found))
        told = "; ".join(reasons[:3])
        if more := len(reasons) - len(reasons[:3]):
            told += f"; and {more} other reason{'s' if more > 1 else ''}"
        what = f"{self.unit}{'s' if len(places) > 1 else ''}"
        return f"{self.source}: {len(places)} of {self.rows} rows do not fit ({what} {listed}): {told}"

    def check(self, allowed: float) -> None:
        """Tells of them.

        Raises:
            ConfigError: they are more than the share `allowed`, or no row is left.
        """
        if self.rows == 0:
            raise ConfigError(f"{self.source} is empty")
        if len(self.found) > allowed * self.rows or len(self.found) == self.rows:
            raise ConfigError(f"{self.report()}; bad_rows allows a share of {allowed:g}")
        if self.found:
            logger.warning("%s; they are left out", self.report())


def read(source: Source, parse: Callable[[Rows, int], T], allowed: float = 0.0) -> list[T]:
    """All rows of a source that fit, parsed.

    Args:
        source: where they come from.
        parse: (rows, number) -> whatever is made of it; raises RowFault.
        allowed: share of the rows that may be left out.

    Raises:
        ConfigError: as `open_rows` and `Faults.check`.
    """
    good: list[T] = []
    for rows in open_rows(source):
        faults = Faults(rows.name, rows.unit, len(rows))
        good += _parsed(rows, parse, faults)
        faults.check(allowed)
    return good


def _parsed(rows: Rows, parse: Callable[[Rows, int], T], faults: Faults) -> Iterator[T]:
    for number in range(len(rows)):
        try:
            yield parse(rows, number)
        except RowFault as fault:
            faults.found.append((rows.place(number), str(fault)))
