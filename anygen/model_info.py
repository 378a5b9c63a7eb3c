"""What a model's directory holds: parts, sizes, licences, trained parameters, modalities. Read without torch.

Nothing is loaded and nothing is fetched: the counts come from the headers of the weight files.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anygen.environment import home
from anygen.errors import CheckpointError
from anygen.model_config import AnyGenConfig, SourceConfig
from anygen.plugins import installed
from anygen.weight_files import headers
from anygen.wheels import PACKAGES


@dataclass(frozen=True, kw_only=True, slots=True)
class PartInfo:
    """One part of a model."""

    role: str
    """What it does, such as "image encoder"."""
    name: str
    """The registry's name, or where it comes from."""
    parameters: int | None
    """None: it is not on this machine yet."""
    trained: bool
    """Whether anygen trained it for this model to join the others; frozen otherwise."""
    bytes: int | None
    """Of its weight files; None where it shares a file or is not here yet."""
    licence: str
    """As its model card states it; empty if it does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What `anygen info` shows."""

    name: str
    directory: str
    licence: str
    parts: tuple[PartInfo, ...]
    reads: tuple[str, ...]
    """Modalities that may stand in a message."""
    makes: tuple[str, ...]
    """Modalities that may stand in an answer."""
    plugins: tuple[str, ...] = ()
    """Packages that it needs beside anygen; the absent ones say so."""

    @property
    def parameters(self) -> int:
        """Of all parts that are here."""
        return sum(part.parameters or 0 for part in self.parts)

    @property
    def trained(self) -> int:
        """Of the parts that join the others: projectors, signal rows, adapter."""
        return sum(part.parameters or 0 for part in self.parts if part.trained)

    @property
    def matrix(self) -> dict[str, dict[str, bool]]:
        """modality read -> modality made -> whether the model goes from the one to the other."""
        known = list(dict.fromkeys([*self.reads, *self.makes]))
        return {a: {b: a in self.reads and b in self.makes for b in known} for a in known}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"parameters": self.parameters, "trained": self.trained, "matrix": self.matrix}

    def __str__(self) -> str:
        """Tables of plain text."""
        rows = [["part", "is", "parameters", "trained", "on disk", "licence"]]
        for part in self.parts:
            rows.append(
                [
                    part.role,
                    part.name,
                    "fetched at first use" if part.parameters is None else f"{part.parameters:,}",
                    "yes" if part.trained else "",
                    "" if part.bytes is None else f"{part.bytes / 2**20:.1f} MiB",
                    part.licence or "?",
                ]
            )
        columns = list(self.matrix)
        crosses = [["in \\ out", *columns]]
        crosses += [[a, *("yes" if self.matrix[a][b] else "-" for b in columns)] for a in columns]
        share = f"{100 * self.trained / self.parameters:.1f} %" if self.parameters else "none"
        return "\n".join(
            [
                f"{self.name} ({self.licence or 'no licence stated'}), {self.directory}",
                "",
                *_aligned(rows, right=(2, 4)),
                "",
                f"{self.parameters:,} parameters; trained to join the parts: {self.trained:,} ({share})",
                "",
                *_aligned(crosses),
                *(["", f"needs {', '.join(self.plugins)}"] if self.plugins else []),
            ]
        )


def describe(directory: Path) -> ModelInfo:
    """Reads a model's directory.

    Raises:
        ConfigError: its configuration does not fit.
        CheckpointError: a weight file is missing or damaged.
    """
    config = AnyGenConfig.load(directory / "anygen.json")
    licence = _licence(directory)
    rows = _tensors(directory, "signal_tokens*.safetensors")
    projectors = _tensors(directory, "projectors*.safetensors")
    parts = [_source_part("LLM", config.llm, directory, licence)]
    if (adapter := directory / "adapter").is_dir():
        parts.append(_part("LLM adapter", "PEFT", _tensors(adapter, "*.safetensors"), adapter, licence))
    if words := _tensors(directory, "vocabulary*.safetensors"):
        parts.append(_part("words", "vocabulary, in place of the LLM's", words, None, licence))
    parts.append(_part("signal rows", "signal_tokens", rows, None, licence))
    for modality, reading in config.inputs.items():
        parts.append(_source_part(f"{modality} encoder", reading.encoder.source, directory, licence))
        own = _below(projectors, f"input.{modality}.")
        kind = reading.projector.name if reading.shares is None else f"shift, then that of {reading.shares}"
        parts.append(_part(f"{modality} input projector", kind, own, None, licence))
    for modality, making in config.outputs.items():
        own = _below(projectors, f"output.{modality}.")
        kind = making.projector.name if making.shares is None else f"that of {making.shares}"
        parts.append(_part(f"{modality} output projector", kind, own, None, licence))
        parts.append(_source_part(f"{modality} generator", making.generator.source, directory, licence))
    return ModelInfo(
        name=config.name or directory.resolve().name,
        directory=str(directory),
        licence=licence,
        parts=tuple(parts),
        reads=("text", *config.inputs),
        makes=("text", *config.outputs),
        plugins=tuple(package if _installed(package) else f"{package} (not installed)" for package in config.plugins),
    )


def _installed(package: str) -> bool:
    return any(plugin.package == package for plugin in installed())


def _part(role: str, name: str, tensors: Mapping[str, int], folder: Path | None, licence: str) -> PartInfo:
    size = None if folder is None else sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return PartInfo(role=role, name=name, parameters=sum(tensors.values()), trained=True, bytes=size, licence=licence)


def _source_part(role: str, source: SourceConfig, directory: Path, licence: str) -> PartInfo:
    """A frozen part; one that comes from elsewhere is looked for in the cache only."""
    folder, name = folder_of(source, directory, role), source.path or str(source.repo)
    package = None if source.path is not None else PACKAGES.get(name)
    licence = (package.licence if package else "") or _licence(folder) or (licence if source.path is not None else "")
    here = folder.is_dir()
    tensors = _tensors(folder, "**/*model*.safetensors")
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return PartInfo(
        role=role,
        name=name,
        parameters=sum(tensors.values()) if here else None,
        trained=False,
        bytes=size if here else None,
        licence=licence,
    )


def folder_of(source: SourceConfig, directory: Path, role: str) -> Path:
    """Where a part lies; a folder that is not there, if it has to be fetched first.

    Raises:
        CheckpointError: it should lie inside the model's directory, and does not.
    """
    if source.path is not None:
        if not (directory / source.path).is_dir():
            raise CheckpointError(f"the {role} is missing: there is no directory {directory / source.path}")
        return directory / source.path
    package = PACKAGES.get(str(source.repo))
    return home() / "models" / f"{source.repo}-{package.version}" if package else _in_hub_cache(source)


def _in_hub_cache(source: SourceConfig) -> Path:
    """Where a repository lies; a directory that is not there, if it is not in the cache."""
    if (folder := Path(str(source.repo))).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source.repo), revision=source.revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no name of a repository
        return folder


def _tensors(folder: Path, pattern: str) -> dict[str, int]:
    """Tensor -> numbers in it, of all weight files that match."""
    counts: dict[str, int] = {}
    for path in sorted(folder.glob(pattern)):
        for header in headers(path):
            counts[f"{path.parent.relative_to(folder)}:{header.name}"] = header.numbers
    return counts


def _below(tensors: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {name: count for name, count in tensors.items() if name.split(":", 1)[1].startswith(prefix)}


def _licence(directory: Path) -> str:
    """`license:` in the front matter of the directory's model card."""
    try:
        card = (directory / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    front = re.match(r"---\n(.*?)\n---", card, flags=re.DOTALL)
    found = re.search(r"^license:\s*(\S+)", front[1], flags=re.MULTILINE) if front else None
    return found[1] if found else ""


def _aligned(rows: list[list[str]], right: tuple[int, ...] = ()) -> list[str]:
    """A table of plain text under a heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
