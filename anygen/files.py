"""Writing files and folders so that nothing half-written is ever seen: a temporary name beside, then a rename."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anygen.errors import AnyGenError, OutputError


@contextmanager
def writing(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write to; on leaving, that file becomes `path` in one step.

    On any exception, Ctrl-C included, the temporary file is deleted and `path` is as it was.

    Args:
        path: where the file shall be; its folder has to exist.
        overwrite: replaces a file that is there already.

    Raises:
        OutputError: the file exists, the folder does not, or the disk refuses (full, read-only).
    """
    path = Path(path)
    if not overwrite and os.path.lexists(path):
        raise _exists(path)
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: there is no folder {path.parent}; create it first")
    temporary = path.with_name(_temporary_name(path))
    try:
        yield temporary
        if overwrite:
            os.replace(temporary, path)
        else:
            _rename_to_new(temporary, path)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Makes `folder` by `build(temporary folder)`, unless it is there; any number of processes may ask at once.

    One process builds, the others wait for it. What a killed process left behind is deleted by the next.

    Raises:
        OutputError: the disk is full or cannot be written.
        Exception: whatever `build` raises; the temporary folder is deleted first.
    """
    from filelock import FileLock

    if folder.is_dir():  # also serves a cache that cannot be written
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if folder.is_dir():
                return
            for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary = folder.with_name(_temporary_name(folder))
            try:
                temporary.mkdir()
                build(temporary)
                os.rename(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except AnyGenError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise OutputError(f"the disk of {folder.parent} is full; nothing was left behind") from error
        if isinstance(error, OSError):
            raise OutputError(f"{folder} cannot be made: {error}") from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception means a full disk; safetensors and pip say so in words only."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _temporary_name(path: Path) -> str:
    return f".{path.name}.{secrets.token_hex(4)}.tmp"


def _rename_to_new(source: Path, target: Path) -> None:
    """Renames, and fails if `target` has appeared in the meantime: a hard link never replaces a file."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise _exists(target) from None
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise _exists(target) from None
        os.replace(source, target)


def _exists(path: Path) -> OutputError:
    return OutputError(f"{path} exists already; choose another name or ask for it to be replaced (overwrite)")
