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

    @property
    def met(self) -> bool | None:
        """Whether the bar holds; None without a bar or without a value."""
        return None if self.bar is None or self.value is None else self.value <= self.bar


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
    from importlib.metadata import version

    import torch

    packages = {name: version(name) for name in ("torch", "transformers", "diffusers")}
    return {
        "system": platform.platform(terse=True),
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "python": platform.python_version(),
    } | packages


def show(rows: list[Row], model: str = "anygen-mini") -> None:
    """One table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model} on this machine", caption=", ".join(f"{k} {v}" for k, v in machine().items()))
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_column("bar", justify="right")
    table.add_column("note", style="dim")
    for row in rows:
        colour = {None: "", True: "[green]", False: "[red]"}[row.met]
        bar = "" if row.bar is None else f"≤ {row.bar:g}"
        value = "-" if row.value is None else f"{colour}{row.value:.3g} {row.unit}"
        table.add_row(row.what, value, bar, row.note)
    console = Console()
    (console if console.is_terminal else Console(width=118)).print(table)
