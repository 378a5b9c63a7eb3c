"""A directory's checksums: `manifest.json` is `{"files": {relative path: {"sha256": hex, "bytes": size}}}`."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anygen.errors import CheckpointError
from anygen.files import writing

NAME = "manifest.json"


def write_manifest(directory: str | Path) -> None:
    """Writes `manifest.json` over all files below `directory`, but hidden ones and documents (`.md`)."""
    directory = Path(directory)
    entries = {}
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and path.suffix != ".md" and relative.as_posix() != NAME:
            entries[relative.as_posix()] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    with writing(directory / NAME, overwrite=True) as temporary:
        temporary.write_text(json.dumps({"files": entries}, indent=2) + "\n", encoding="utf-8")


def verify(directory: str | Path) -> None:
    """Compares every file that `manifest.json` lists with its size and sha256.

    Hashing runs at 0.6 to 2 GB/s and brings the files into the page cache, from which they are loaded next.

    Raises:
        CheckpointError: there is no manifest or it is damaged, or files are missing or changed; names them.
    """
    directory = Path(directory)
    try:
        files = json.loads((directory / NAME).read_text(encoding="utf-8"))["files"]
        wanted = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {NAME}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory / NAME} is damaged ({error})") from None
    with ThreadPoolExecutor(4) as pool:  # hashlib lets other threads run
        faults = pool.map(lambda item: _fault(directory / item[0], *item[1]), wanted.items())
        told = [f"{name} {fault}" for name, fault in zip(wanted, faults, strict=True) if fault]
    if told:
        more = f" and {len(told) - 5} more" if len(told) > 5 else ""
        listed = "; ".join(told[:5]) + more
        raise CheckpointError(f"{directory} is damaged: {listed}. Delete it, and fetch or install it again")


def sha256(path: Path) -> str:
    """The file's checksum in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(path: Path, digest: str, size: int) -> str:
    if not path.is_file():
        return "is missing"
    if (found := path.stat().st_size) != size:
        return f"has {found:,} bytes, not {size:,}"
    return "" if sha256(path) == digest else "has another content than its sha256 says"
