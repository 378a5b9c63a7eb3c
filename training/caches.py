"""Tensors that are computed once and kept on disk: encoder features by medium, generator conditions by caption.

A cache is a folder of safetensors shards and `index.json`. It only grows: a shard is written whole, with a temporary
name, before the index names it, and every `SECONDS` at least, so that a run that is killed goes on where it was.
Each shard's SHA-256 stands in the index and is checked when the cache is opened; a damaged one is computed again.
Reading maps the files into memory.

Shapes: B rows that are asked for.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from anygen.errors import ConfigError, OutputError
from anygen.files import is_disk_full, writing
from anygen.manifest import sha256

logger = logging.getLogger("anygen.training")

INDEX = "index.json"
SECONDS = 20.0
"""After these a shard is written and progress told, however few rows there are."""
Compute = Callable[[Sequence[str]], tuple[Sequence[str], Mapping[str, Tensor]]]
"""Keys -> those that could be computed, and name -> tensor with one row for each of these."""


class TensorCache:
    """Key -> named tensors.

    Args:
        folder: made if it is not there.
        identity: what computes the tensors, as JSON values; a cache of something else is refused.
        verify: whether to check the files; takes as long as reading them once.

    Raises:
        ConfigError: the folder holds what something else computed, or its index is damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, verify: bool = True) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        self.shards: list[dict[str, Any]] = []
        self._where: dict[str, tuple[int, int]] = {}
        self._open: list[Any] = []
        try:
            stored = _index(json.loads((folder / INDEX).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return
        except ValueError as error:
            raise ConfigError(f"{folder / INDEX} is damaged ({error}); delete the folder to compute it anew") from None
        if stored["identity"] != self.identity:
            raise ConfigError(f"{folder} holds what {stored['identity']} computed, not {self.identity}")
        for shard in stored["shards"]:
            self._admit(shard, verify)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def keys(self) -> list[str]:
        """All of them, in the order of their computation."""
        return list(self._where)

    def fill(
        self, keys: Iterable[str], compute: Compute, *, batch_size: int = 32, shard_rows: int = 2048, what: str = ""
    ) -> int:
        """Computes what is missing; returns how many rows that were.

        Args:
            keys: all that are going to be asked for.
            compute: called with up to `batch_size` keys.
            batch_size: rows computed at a time.
            shard_rows: rows of a file at most.
            what: for the log.

        Raises:
            ConfigError: a row holds no numbers, or numbers that half precision does not reach, or rows differ in shape.
            OutputError: the disk refuses.
        """
        wanted = [key for key in dict.fromkeys(keys) if key not in self._where]
        first = done = 0  # rows that are written, or could not be computed; rows that were tried
        made: list[tuple[Sequence[str], Mapping[str, Tensor]]] = []
        since = monotonic()
        while done < len(wanted):
            part = wanted[done : min(done + batch_size, first + shard_rows)]
            made.append(compute(part))
            done += len(part)
            if done not in (first + shard_rows, len(wanted)) and monotonic() - since < SECONDS:
                continue
            if kept := [key for keys, _ in made for key in keys]:
                self._write(kept, _joined([tensors for keys, tensors in made if keys], self._shapes()))
            logger.info("%s: %d of %d computed", what or self.folder, done, len(wanted))
            first, made, since = done, [], monotonic()
        return len(wanted)

    def rows(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Name -> [B, ...]: floating point as float32.

        Raises:
            ConfigError: a key was not computed.
        """
        found: dict[str, list[Tensor]] = {}
        for key in keys:
            if key not in self._where:
                raise ConfigError(f"{self.folder} holds nothing for '{key[:80]}'; fill it first")
            shard, row = self._where[key]
            file = self._open[shard]
            for name in file.keys():  # noqa: SIM118  # an open file, not a table
                found.setdefault(name, []).append(file.get_slice(name)[row : row + 1])
        joined = {name: torch.cat(parts) for name, parts in found.items()}
        return {name: value.float() if value.is_floating_point() else value for name, value in joined.items()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> the shape of a row, of what is written already."""
        file = self._open[0] if self._open else None
        return {name: tuple(file.get_slice(name).get_shape()[1:]) for name in file.keys()} if file else {}  # noqa: SIM118

    def _admit(self, shard: dict[str, Any], verify: bool) -> None:
        path = self.folder / shard["file"]
        whole = path.is_file() and (not verify or sha256(path) == shard["sha256"])
        opened = _opened(path) if whole else None
        if opened is None:
            logger.warning("%s is missing or damaged; its %d rows are computed again", path, shard["rows"])
            return
        file, keys = opened
        self._where |= {key: (len(self.shards), row) for row, key in enumerate(keys)}
        self.shards.append(shard)
        self._open.append(file)

    def _write(self, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        taken = {shard["file"] for shard in self.shards}
        name = next(name for n in range(len(taken) + 1) if (name := f"shard-{n:05d}.safetensors") not in taken)
        told = {"keys": json.dumps(list(keys))}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with writing(self.folder / name, overwrite=True) as temporary:
                save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata=told)
            shard = {"file": name, "rows": len(keys), "sha256": sha256(self.folder / name)}
            with writing(self.folder / INDEX, overwrite=True) as temporary:
                text = json.dumps({"identity": self.identity, "shards": [*self.shards, shard]}, indent=1)
                temporary.write_text(text, encoding="utf-8")
        except Exception as error:
            if is_disk_full(error):
                raise OutputError(f"the disk of {self.folder} is full; what was computed so far is kept") from error
            if isinstance(error, OSError | SafetensorError) and not isinstance(error, OutputError):
                raise OutputError(f"{self.folder} cannot be written: {error}") from error
            raise
        self._admit(shard, verify=False)


def fingerprint(folder: Path) -> str:
    """Tells a part's weights from others: names and sizes of its files, and the first and last 64 KiB of each."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}:{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**16))
            file.seek(max(0, size - 2**16))
            digest.update(file.read(2**16))
    return digest.hexdigest()


def _index(stored: Any) -> dict[str, Any]:
    """What an index holds. Raises ValueError if it is none."""
    shards = stored.get("shards") if isinstance(stored, dict) and "identity" in stored else None
    kinds = {"file": str, "rows": int, "sha256": str}
    if not isinstance(shards, list) or not all(
        isinstance(shard, dict) and all(isinstance(shard.get(key), kind) for key, kind in kinds.items())
        for shard in shards
    ):
        raise ValueError("it is not an index of shards")
    return stored


def _opened(path: Path) -> tuple[Any, list[str]] | None:
    """A shard, mapped into memory, and its keys; None if it is cut off or no shard."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "pt").__enter__()
        return file, json.loads(file.metadata()["keys"])
    except (SafetensorError, OSError, ValueError, TypeError, KeyError):
        return None


def _joined(parts: Sequence[Mapping[str, Tensor]], written: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Name -> all rows; `written` has the shapes of rows that they have to fit."""
    joined = {}
    for name in parts[0]:
        shapes = {tuple(part[name].shape[1:]) for part in parts} | ({written[name]} if name in written else set())
        if len(shapes) > 1:
            raise ConfigError(f"'{name}' differs in shape from row to row ({sorted(shapes)}); a cache needs one")
        joined[name] = _half(torch.cat([part[name].detach().cpu() for part in parts]), name)
    return joined


def _half(value: Tensor, name: str) -> Tensor:
    if not value.is_floating_point():
        return value
    half = value.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise ConfigError(f"'{name}' holds values that are no numbers, or beyond what half precision reaches")
    return half
