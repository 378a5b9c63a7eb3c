"""From a model's name to a directory on this machine.

A name is, in this order: the embedded default, a package that anygen pins, a local directory, or a repository of
the Hugging Face hub ("org/name" or "org/name@revision"). What is fetched stays in a cache (`environment.py`).
"""

import os
import re
import sys
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from anygen.environment import home, is_offline
from anygen.errors import HubError
from anygen.files import is_disk_full
from anygen.manifest import NAME as MANIFEST
from anygen.manifest import verify, write_manifest
from anygen.wheels import PACKAGES, install

__all__ = ["DEFAULT", "PACKAGES", "home", "is_offline", "known", "resolve", "verify", "write_manifest"]

DEFAULT = "anygen-mini"
"""The model that ships inside the package."""

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"]
"""What is fetched of a repository: no pickles, no code."""


def resolve(name_or_dir: str | os.PathLike[str] | None = None, *, progress: bool | None = None) -> Path:
    """The directory of a model; fetched, converted and checked first where that is needed.

    Args:
        name_or_dir: None is the embedded default. A known name wins over a directory of that name ("./name" is
            always the directory), a directory wins over a repository of the hub.
        progress: None shows bars on stderr if that is a terminal.

    Raises:
        HubError: there is no such model, or it cannot be fetched; says what to do.
        CheckpointError: a file does not have the checksum that the directory's manifest gives.
    """
    name = os.fspath(DEFAULT if name_or_dir is None else name_or_dir)
    directory = Path(name).expanduser()
    if name == DEFAULT:
        found = _embedded()
    elif name in PACKAGES:
        found = install(name, PACKAGES[name], progress=progress)
    elif name and directory.is_dir():
        found = directory
    elif isinstance(name_or_dir, os.PathLike) or name.startswith((".", "~")) or directory.is_absolute():
        what = "is a file; a model is a directory" if directory.exists() else "does not exist"
        raise HubError(f"the model directory {name} {what}")
    elif parts := _HUB_NAME.fullmatch(name):
        return _from_hub(parts["repo"], parts["revision"], progress)
    else:
        near = get_close_matches(name, known(), n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise HubError(
            f"there is no model '{name}'{hint}; known: {', '.join(known())}, a directory, "
            "or a repository of the Hugging Face hub (org/name)"
        )
    if (found / MANIFEST).exists():
        verify(found)
    return found


def known() -> list[str]:
    """The names that need no directory and no repository."""
    return [DEFAULT, *PACKAGES]


def _embedded() -> Path:
    directory = Path(str(resources.files("anygen"))) / "assets" / "mini"
    if not (directory / MANIFEST).exists():
        raise HubError(f"this installation lacks the embedded model ({directory}); install anygen-mm again")
    return directory


def _from_hub(repo: str, revision: str | None, progress: bool | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = sys.stderr.isatty() if progress is None else progress
    silence = not shown and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        offline = is_offline()
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES, local_files_only=offline))
    except GatedRepoError:
        raise HubError(f"{repo} wants its terms accepted: log in with `hf auth login` after accepting them") from None
    except RevisionNotFoundError:
        raise HubError(f"{repo} has no revision '{revision}'") from None
    except RepositoryNotFoundError:
        raise HubError(
            f"there is no model '{repo}', neither as a directory nor on the Hugging Face hub (or it is private: "
            f"`hf auth login`); known: {', '.join(known())}"
        ) from None
    except LocalEntryNotFoundError:
        why = "ANYGEN_OFFLINE or HF_HUB_OFFLINE is set" if is_offline() else "the Hugging Face hub cannot be reached"
        raise HubError(
            f"{repo} is not in the cache and {why}. Fetch it once with network (`hf download {repo}`), "
            "or pass a directory that holds it"
        ) from None
    except OSError as error:
        full = "the disk is full" if is_disk_full(error) else str(error)
        raise HubError(f"{repo} could not be fetched: {full}") from error
    finally:
        if silence:
            enable_progress_bars()
