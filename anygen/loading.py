"""From what a user says (a name, "cuda", "bf16") to a directory, a device, a type, a loaded generator."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, cast

import torch

from anygen import hub
from anygen.errors import AnyGenError, CheckpointError, ConfigError, OutOfMemoryError
from anygen.generators.base import Generator
from anygen.model import CONFIG
from anygen.model_config import OutputConfig, SourceConfig
from anygen.model_parts import files_of
from anygen.registry import lookup

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def model_directory(name_or_dir: str | os.PathLike[str] | None) -> Path:
    """The directory of an anygen model.

    Raises:
        HubError, CheckpointError: as `hub.resolve`; CheckpointError also if it holds something else.
    """
    directory = hub.resolve(name_or_dir)
    if not (directory / CONFIG).is_file():
        raise CheckpointError(f"{directory} is not an anygen model: it has no {CONFIG}")
    return directory


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, by default the first that is there of CUDA, Apple's MPS and the CPU.

    Raises:
        ConfigError: it is unknown, or this machine does not have it.
    """
    there = [name for name, module in (("cuda", torch.cuda), ("mps", torch.backends.mps)) if module.is_available()]
    there.append("cpu")
    if device is None:
        return torch.device(there[0])
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"there is no device '{device}'; here there are: {', '.join(there)}") from None
    if chosen.type not in there or (chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"the device '{chosen}' is not available; here there are: {', '.join(there)}")
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The type asked for, by default bfloat16 on CUDA and float32 elsewhere.

    Raises:
        ConfigError: it is none that weights can have.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise ConfigError(f"dtype '{dtype}' is not one of float32, bfloat16, float16")
    return chosen


def find_generator(directory: Path, source: SourceConfig, *, fetch: bool = True) -> Path | None:
    """Where a generator lies; None if it would have to be fetched and may not.

    Raises:
        CheckpointError: it should lie inside the model's directory, and does not.
        HubError: it cannot be fetched.
    """
    if source.path is None:
        return hub.resolve(f"{source.repo}@{source.revision}" if source.revision else source.repo) if fetch else None
    if not (directory / source.path).is_dir():
        raise CheckpointError(
            f"the generator is missing: there is no directory {directory / source.path}; "
            "load without it by generators=False"
        )
    return directory / source.path


def load_generator(directory: Path, output: OutputConfig, device: torch.device, dtype: torch.dtype) -> Generator:
    """One generator of a model's directory, on its device; options that it does not load by are its defaults.

    Raises:
        CheckpointError, HubError: as `find_generator`, or a part is missing or damaged.
        ConfigError: an option is unknown.
        OutOfMemoryError: there is too little memory.
    """
    from anygen.progress import quiet_libraries

    part = output.generator
    where = cast(Path, find_generator(directory, part.source))
    maker = lookup("generator", part.name)
    taken = signature(maker.from_pretrained).parameters.values()
    open_ended = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in taken)
    names = part.options if open_ended else {parameter.name for parameter in taken}
    with quiet_libraries(diffusers=True), memory(), files_of(f"the generator '{part.name}'", where):
        told = {name: value for name, value in part.options.items() if name in names}
        generator = maker.from_pretrained(where, device=device, dtype=dtype, **told)
    if defaults := {name: value for name, value in part.options.items() if name not in names}:
        try:
            generator.defaults = replace(generator.defaults, **defaults)
        except (AttributeError, TypeError):
            raise ConfigError(f"the generator '{part.name}' has no options {', '.join(defaults)}") from None
    return generator


_HELPS = (
    "lower batch_size, pass dtype='bfloat16', quantization='4bit', savers=['vae_tiling'] or offload='sequential', "
    "restrict generators=[…], or take device='cpu'"
)


@contextmanager
def memory(helps: str = _HELPS) -> Iterator[None]:
    """Inside, running out of memory is told with what helps.

    Raises:
        OutOfMemoryError: the device or the machine has too little.
    """
    try:
        yield
    except AnyGenError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(f"not enough memory ({_first_line(error)}); {helps}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise OutOfMemoryError(f"not enough memory ({_first_line(error)}); {helps}") from error


def _first_line(error: Any) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
