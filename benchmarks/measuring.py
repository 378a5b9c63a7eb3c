"""What the benchmarks share: a row of their table, child processes with their peak memory, the machine, the table."""

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GB = 1e9


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    value: float | None
    """None: it cannot be measured; the note says why."""
    unit: str
    bar: float | None = None
    """The most that is allowed."""
    note: str = ""
    least: float | None = None
    """The least that is wanted."""

    @property
    def met(self) -> bool | None:
        """Whether the bar, or the least, holds; None without either or without a value."""
        if self.value is None or (self.bar is None and self.least is None):
            return None
        return (self.bar is None or self.value <= self.bar) and (self.least is None or self.value >= self.least)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time, and what `work` returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def run(arguments: list[str]) -> int:
    """Runs `anygen …` -> its peak resident memory in bytes."""
    return peak(["-m", "anygen", *arguments])


def peak(arguments: list[str]) -> int:
    """Runs `python …` -> its peak resident memory in bytes."""
    with quiet() as out:
        process = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=out, env=environment())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            out.seek(0)
            raise SystemExit(f"python {' '.join(arguments)} failed:\n{out.read()}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment()).stdout


def environment() -> dict[str, str]:
    """Children find anygen in a checkout that is not installed, too."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


@contextmanager
def quiet() -> Iterator[Any]:
    """A file that takes what a child says."""
    with tempfile.TemporaryFile("w+") as file:
        yield file


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    packages = {}
    for name in ("torch", "transformers", "diffusers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:  # not every benchmark needs it
            packages[name] = "absent"
    return {
        "system": platform.platform(terse=True),
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "python": platform.python_version(),
    } | packages


def show(rows: list[Row], model: str = "anygen-mini", told: dict[str, Any] | None = None) -> None:
    """One table; `told` is the machine, by default as `machine` has it."""
    from rich.console import Console
    from rich.table import Table

    caption = ", ".join(f"{k} {v}" for k, v in (told or machine()).items())
    table = Table(title=f"{model} on this machine", caption=caption)
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_column("bar", justify="right")
    table.add_column("note", style="dim")
    for row in rows:
        colour = {None: "", True: "[green]", False: "[red]"}[row.met]
        bar = "" if row.bar is None else f"≤ {row.bar:g}"
        bar = bar if row.least is None else f"≥ {row.least:g}"
        value = "-" if row.value is None else f"{colour}{row.value:.3g} {row.unit}"
        table.add_row(row.what, value, bar, row.note)
    console = Console()
    (console if console.is_terminal else Console(width=118)).print(table)
