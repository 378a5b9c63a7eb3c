"""Work that is done step by step: a Python generator that yields (steps done, steps in all) and returns its result.

def halves():
    yield 1, 2
    yield 2, 2
    return "whole"


assert drained(halves(), on_step=print) == "whole"
"""

from collections.abc import Callable, Generator
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Event as Flag
from threading import Thread
from typing import TypeVar

T = TypeVar("T")
StepCallback = Callable[[int, int], None]
"""Called with (steps done, steps in all) after each step."""
Steps = Generator[tuple[int, int], None, T]


def drained(steps: Steps[T], on_step: StepCallback | None = None) -> T:
    """All steps at once: what the work returns.

    Args:
        steps: not begun yet.
        on_step: told of each.
    """
    while True:
        try:
            done, total = next(steps)
        except StopIteration as end:
            return end.value
        if on_step is not None:
            on_step(done, total)


class _Stopped(Exception):
    """Nobody waits for the result any more."""


def in_thread(work: Callable[[StepCallback], T]) -> Steps[T]:
    """Runs `work(on_step)` in a thread, for work whose loop cannot yield by itself.

    If the consumer stops early (Ctrl-C, `break`), the work ends with its current step. On a CPU a second thread has an
    OpenMP team of its own, and with more threads than cores each of them waits in its sleep: a loop that can yield is
    up to twice as fast.

    Raises:
        BaseException: whatever `work` raises.
    """
    steps: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
    outcome: Future[T] = Future()
    stop = Flag()

    def on_step(done: int, total: int) -> None:
        if stop.is_set():
            raise _Stopped
        steps.put((done, total))

    def run() -> None:
        try:
            outcome.set_result(work(on_step))
        except BaseException as error:  # Ctrl-C, too, is the consumer's to handle
            outcome.set_exception(error)
        finally:
            steps.put(None)

    thread = Thread(target=run, name="anygen-generator", daemon=True)
    thread.start()
    try:
        while (step := steps.get()) is not None:
            yield step
    finally:
        stop.set()
        thread.join()
    return outcome.result()
