"""Which generators hold memory: loaded when first asked for, and put away by a policy.

| policy | a generator that is loaded |
|---|---|
| `resident` | stays |
| `auto` | stays until another one needs its memory; the one whose last use is longest ago goes first |
| `after_use` | goes once its media are made |
| `model_offload` | stays in the machine's memory; its models come to the device one at a time |
| `sequential` | the same, layer by layer |

On an accelerator to go is to move to the machine's memory, from where it comes back without being read again. On the
CPU, or where the machine's memory is short too, it is freed and read from disk when it is wanted next. A sample does
not depend on any of this.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from gc import collect
from math import prod
from pathlib import Path
from threading import RLock
from typing import Literal, cast, get_args

import torch

from anygen.errors import ConfigError, ModalityError, OutOfMemoryError
from anygen.generators.base import Generator
from anygen.loading import find_generator, load_generator, memory
from anygen.model_config import AnyGenConfig, OutputConfig

Offload = Literal["auto", "resident", "after_use", "model_offload", "sequential"]
PLACED = ("model_offload", "sequential")
"""Policies under which a generator itself is never on the device."""
LEAST_ACTIVATIONS = 2**30
"""Bytes; what a generator needs beside its weights is taken for as much as these, and for so much at least."""
_CPU = torch.device("cpu")
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Of version 2 and 1: the limit, what is used, and what of that is cache that the kernel gives back."""


@dataclass(frozen=True, slots=True)
class GeneratorSource:
    """Where a generator comes from, as often as it is wanted."""

    load: Callable[[], Generator]
    """Reads it onto its device."""
    weights: Callable[[], int] = lambda: 0
    """Bytes of its weights there; an estimate that may be too high."""


@dataclass(slots=True)
class _Slot:
    source: GeneratorSource | None
    generator: Generator | None = None
    away: bool = False
    """Whether it waits in the machine's memory, off its device."""
    weights: int = 0
    users: int = 0
    last_use: int = field(default=0)

    @property
    def idle(self) -> bool:
        return self.generator is not None and not self.away and not self.users


class Generators(Mapping[str, Generator]):
    """Modality -> generator, each loaded when it is first asked for.

    Args:
        sources: modality -> the generator, or where it comes from (a bare function loads one of unknown size). One that
            is given as it is can be moved, but not freed.
        offload: the policy.
        device: where generators work.

    Raises:
        ConfigError: there is no such policy.
    """

    def __init__(
        self,
        sources: Mapping[str, Generator | GeneratorSource | Callable[[], Generator]],
        *,
        offload: str = "resident",
        device: torch.device | str = _CPU,
    ) -> None:
        self.offload, self.device = check_offload(offload), torch.device(device)
        self._lock, self._uses = RLock(), 0
        self._slots: dict[str, _Slot] = {}
        for modality, source in sources.items():
            if isinstance(source, Generator):
                self._slots[modality] = _Slot(None, source)
            else:
                known = source if isinstance(source, GeneratorSource) else GeneratorSource(source)
                self._slots[modality] = _Slot(known)

    @classmethod
    def of(
        cls,
        directory: Path,
        config: AnyGenConfig,
        wanted: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        *,
        offload: str = "auto",
        prepare: Callable[[Generator], Generator] = lambda generator: generator,
    ) -> "Generators":
        """Those of a model's directory.

        Args:
            directory: the model's.
            config: the model's.
            wanted: output modalities.
            device: where generators work.
            dtype: of their weights.
            offload: the policy.
            prepare: what is done to each when it was loaded.

        Raises:
            ModalityError: the model has no generator for a wanted modality.
            CheckpointError: a generator's directory is missing.
            ConfigError: there is no such policy.
        """
        sources: dict[str, GeneratorSource] = {}
        placed = offload in PLACED and device.type == "cuda"  # elsewhere the device's memory is the machine's
        home = _CPU if placed else device

        def load(output: OutputConfig) -> Generator:
            generator = prepare(load_generator(directory, output, home, dtype))
            return generator.place(device, offload) if placed else generator

        check_generators(directory, config, wanted)
        for modality in wanted:
            output = config.outputs[modality]
            sources[modality] = GeneratorSource(
                lambda output=output: load(output),
                lambda output=output: weight_bytes(
                    cast(Path, find_generator(directory, output.generator.source)), dtype
                ),
            )
        return cls(sources, offload=offload, device=device)

    @contextmanager
    def using(self, modality: str) -> Iterator[Generator]:
        """The generator, on its device until the block ends; the policy follows.

        Raises:
            KeyError: there is none of that modality.
            OutOfMemoryError: it does not fit, even alone.
        """
        with self._lock:
            slot = self._ready(modality)
            slot.users += 1
        try:
            yield cast(Generator, slot.generator)
        finally:
            with self._lock:
                slot.users -= 1
                if not slot.users:
                    cast(Generator, slot.generator).release()
                if self.offload == "after_use" and slot.idle:
                    self._put_away(slot)

    def __getitem__(self, modality: str) -> Generator:
        with self._lock:
            return cast(Generator, self._ready(modality).generator)

    def __contains__(self, modality: object) -> bool:
        return modality in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def loaded(self) -> dict[str, Generator]:
        """Those that are in memory, on their device or off it."""
        return {modality: slot.generator for modality, slot in self._slots.items() if slot.generator is not None}

    def _ready(self, modality: str) -> _Slot:
        """The slot of a modality, its generator on the device."""
        slot = self._slots[modality]
        self._uses += 1
        slot.last_use = self._uses
        others = [] if self.offload in ("resident", *PLACED) else self._others(slot)
        if others:
            if not slot.weights and slot.source is not None:
                slot.weights = slot.source.weights()
            here = slot.generator is not None and not slot.away
            room = free_memory(self.device)
            needed = max(LEAST_ACTIVATIONS, slot.weights) + (0 if here else slot.weights)
            while others and room < needed:
                room += self._put_away(others.pop(0))
        try:
            self._fetch(slot)
        except OutOfMemoryError:
            if not others:
                raise
            for other in others:
                self._put_away(other)
            self._fetch(slot)
        return slot

    def _others(self, slot: _Slot) -> list[_Slot]:
        idle = [other for other in self._slots.values() if other is not slot and other.idle]
        return sorted(idle, key=lambda other: other.last_use)

    def _fetch(self, slot: _Slot) -> None:
        if slot.generator is None:
            collect()  # of a generator that was freed, what refers to itself in a circle
            slot.generator = cast(GeneratorSource, slot.source).load()
        elif slot.away:
            with memory():
                slot.generator.to(self.device)
            slot.away = False

    def _put_away(self, slot: _Slot) -> int:
        """Takes a generator off the device; returns the bytes that are gained there."""
        generator = cast(Generator, slot.generator)
        if not slot.weights and slot.source is not None:
            slot.weights = slot.source.weights()
        shared = self.device.type in ("cpu", "mps")  # the machine's own memory
        if shared or (slot.source is not None and free_memory(_CPU) < 2 * slot.weights):
            if slot.source is None:
                return 0  # nothing to read it from again
            slot.generator = None
        else:
            generator.to(_CPU)
            slot.away = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return slot.weights


def check_generators(directory: Path, config: AnyGenConfig, wanted: Sequence[str]) -> None:
    """Refuses modalities that a model's directory cannot make.

    Raises:
        ModalityError: the model has no generator for a wanted modality.
        CheckpointError: a generator's directory is missing.
    """
    for modality in wanted:
        if modality not in config.outputs:
            has = ", ".join(config.outputs) or "none"
            raise ModalityError(f"the model has no generator for {modality}; it has: {has}")
        find_generator(directory, config.outputs[modality].generator.source, fetch=False)


def check_offload(offload: str) -> Offload:
    """`offload`, if it is a policy.

    Raises:
        ConfigError: it is none; lists them.
    """
    if offload not in get_args(Offload):
        raise ConfigError(f"offload is one of {', '.join(get_args(Offload))}; got {offload!r}")
    return cast(Offload, offload)


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on a device now; on the CPU, what neither the machine nor a container refuses."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps for itself between allocations is free to us.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    machine = psutil.virtual_memory().available
    if device.type == "mps":
        machine = min(machine, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    container = container_memory()
    return machine if container is None else min(machine, container)


def container_memory(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a container's limit leaves; None where there is no limit.

    Args:
        root: where control groups are mounted.
    """
    for limit_file, used_file, stat_file, cache_key in _CGROUPS:
        try:
            limit = (root / limit_file).read_text().strip()
            used = int((root / used_file).read_text())
            stat = dict(line.split() for line in (root / stat_file).read_text().splitlines())
            if limit != "max":
                return max(0, int(limit) - used + int(stat.get(cache_key, 0)))
        except (OSError, ValueError):
            continue
    return None


def weight_bytes(directory: Path, dtype: torch.dtype) -> int:
    """What all weights below a generator's directory take in `dtype`, and those that it shares with another."""
    from safetensors import SafetensorError, safe_open

    from anygen.generators.latent import read_shared

    folders = [directory, *(directory / shared for shared in read_shared(directory).values())]
    count = 0
    for path in {path.resolve() for folder in folders for path in folder.rglob("*.safetensors")}:
        try:
            with safe_open(path, "pt") as file:
                count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())
        except (SafetensorError, OSError):
            continue  # loading says what is wrong with it
    return count * dtype.itemsize
