"""Tensors that are computed once and kept on disk: encoder features by medium, generator conditions by caption.

A cache is a folder of safetensors shards and `index.json`. It only grows: a shard is written whole, with a temporary
name, before the index names it, so that a run that is killed goes on where it was. Each shard's SHA-256 stands in the
index and is checked when the cache is opened; a damaged one is computed again. Reading maps the files into memory.

Shapes: B rows that are asked for.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anygen.errors import ConfigError, OutputError
from anygen.files import is_disk_full, writing
from anygen.manifest import sha256

logger = logging.getLogger("anygen.training")

INDEX = "index.json"
Compute = Callable[[Sequence[str]], tuple[Sequence[str], Mapping[str, Tensor]]]
"""Keys -> those that could be computed, and name -> tensor with one row for each of these."""


class TensorCache:
    """Key -> named tensors.

    Args:
        folder: made if it is not there.
        identity: what computes the tensors, as JSON values; a cache of something else is refused.
        verify: whether to check the files; takes as long as reading them once.

    Raises:
        ConfigError: the folder holds what something else computed.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, verify: bool = True) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        self.shards: list[dict[str, Any]] = []
        self._where: dict[str, tuple[int, int]] = {}
        self._open: dict[int, Any] = {}
        try:
            stored = json.loads((folder / INDEX).read_text(encoding="utf-8"))
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
            shard_rows: rows of a file.
            what: for the log.

        Raises:
            ConfigError: a row holds no numbers, or numbers that half precision does not reach, or rows differ in shape.
            OutputError: the disk refuses.
        """
        wanted = [key for key in dict.fromkeys(keys) if key not in self._where]
        for first in range(0, len(wanted), shard_rows):
            part = wanted[first : first + shard_rows]
            made = [compute(part[row : row + batch_size]) for row in range(0, len(part), batch_size)]
            if kept := [key for keys, _ in made for key in keys]:
                self._write(kept, _joined([tensors for keys, tensors in made if keys]))
            logger.info("%s: %d of %d computed", what or self.folder, first + len(part), len(wanted))
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
            file = self._file(shard)
            for name in file.keys():  # noqa: SIM118  # an open file, not a table
                found.setdefault(name, []).append(file.get_slice(name)[row : row + 1])
        joined = {name: torch.cat(parts) for name, parts in found.items()}
        return {name: value.float() if value.is_floating_point() else value for name, value in joined.items()}

    def _file(self, shard: int) -> Any:
        from safetensors import safe_open

        if shard not in self._open:
            self._open[shard] = safe_open(self.folder / self.shards[shard]["file"], "pt").__enter__()
        return self._open[shard]

    def _admit(self, shard: dict[str, Any], verify: bool) -> None:
        path = self.folder / shard["file"]
        if not path.is_file() or (verify and sha256(path) != shard["sha256"]):
            logger.warning("%s is missing or damaged; its %d rows are computed again", path, shard["rows"])
            return
        self.shards.append(shard)
        number = len(self.shards) - 1
        keys = json.loads(self._file(number).metadata()["keys"])
        self._where |= {key: (number, row) for row, key in enumerate(keys)}

    def _write(self, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
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


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    joined = {}
    for name in parts[0]:
        shapes = {tuple(part[name].shape[1:]) for part in parts}
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
