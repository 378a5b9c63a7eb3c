"""Writing a model's directory, whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from anygen.errors import OutputError
from anygen.generators.base import Generator
from anygen.manifest import write_manifest
from anygen.model import CONFIG, AnyGenModel
from anygen.reply import make_directory

_DOCUMENTS = ("*.md", "LICENSE*", "NOTICE*")


def save_model(
    directory: Path, model: AnyGenModel, generators: Mapping[str, Generator], *, overwrite: bool = False
) -> None:
    """Writes the model, its encoders, its generators and `manifest.json`.

    What was loaded from a directory and is frozen is copied from there, byte by byte, with the model card. Parts
    that the configuration takes from the hub stay there.

    Args:
        directory: new, empty, or with `overwrite` a model's directory, which is replaced.
        model: what to write.
        generators: output modality -> those that were not loaded from the model's directory.
        overwrite: replaces a model.

    Raises:
        OutputError: the directory is not empty and is not to be replaced, or the disk refuses.
    """
    with replacing(directory, overwrite=overwrite) as temporary:
        model.save_pretrained(temporary)
        for modality, output in model.settings.outputs.items():
            if (path := output.generator.source.path) is None:
                continue
            if model.origin is not None and (model.origin / path).is_dir():
                shutil.copytree(model.origin / path, temporary / path, dirs_exist_ok=True)
            elif modality in generators:
                generators[modality].save_pretrained(temporary / path)
        if model.origin is not None:
            for document in (found for pattern in _DOCUMENTS for found in model.origin.glob(pattern)):
                shutil.copy2(document, temporary)
        mode = (temporary / CONFIG).stat().st_mode
        for weights in temporary.rglob("*.safetensors"):
            weights.chmod(mode)  # safetensors writes for the owner alone; a model may serve several users
        write_manifest(temporary)


@contextmanager
def replacing(directory: Path, *, overwrite: bool, holds: str = CONFIG) -> Iterator[Path]:
    """Yields a temporary directory that becomes `directory` on leaving; on any exception it is deleted.

    Args:
        directory: new, empty, or with `overwrite` one that may be replaced.
        overwrite: replaces it.
        holds: the file by which one that may be replaced is known.

    Raises:
        OutputError: as `save_model`.
    """
    if directory.is_dir() and any(directory.iterdir()):
        if not overwrite:
            raise OutputError(f"{directory} is not empty; choose another directory, or pass overwrite=True")
        if not (directory / holds).is_file():
            raise OutputError(f"{directory} is not empty and holds no model, so it is not replaced")
    make_directory(directory)
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
    old = temporary.with_suffix(".old")
    try:
        temporary.mkdir()
        yield temporary
        os.rename(directory, old)
        os.rename(temporary, directory)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{directory} cannot be written: {error.strerror or error}") from error
    finally:
        if old.exists() and not directory.exists():
            os.rename(old, directory)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
