"""Progress on stderr for a person at a terminal, silence for everybody else."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def progress_bars(*, shown: bool | None = None) -> "Progress":
    """A rich progress display on stderr, to be entered with `with`; its bars vanish when done.

    Args:
        shown: None shows it if stderr is a terminal.
    """
    from rich.console import Console
    from rich.progress import Progress

    shown = sys.stderr.isatty() if shown is None else shown
    return Progress(console=Console(file=sys.stderr), disable=not shown, transient=True)


@contextmanager
def quiet_libraries(*, diffusers: bool = False) -> Iterator[None]:
    """Silences the progress bars and notes of transformers (and of diffusers, imported for it) while they load.

    Errors still show; notes about what a later version will remove do not.
    """
    from transformers.utils import logging as transformers_switches

    libraries = [transformers_switches]
    if diffusers:
        from diffusers.utils import logging as diffusers_switches

        libraries.append(diffusers_switches)
    before = [(switches, switches.is_progress_bar_enabled(), switches.get_verbosity()) for switches in libraries]
    for switches in libraries:
        switches.disable_progress_bar()
        switches.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for switches, bars, level in before:
            switches.set_verbosity(level)
            if bars:
                switches.enable_progress_bar()
