"""Work that is done step by step, here or in a thread."""

import threading
from typing import Any

import pytest

from anygen.stepwise import drained, in_thread


def take(work: Any) -> tuple[list[tuple[int, int]], Any]:
    steps, running = [], in_thread(work)
    while True:
        try:
            steps.append(next(running))
        except StopIteration as end:
            return steps, end.value


def test_steps_come_while_the_work_goes_on() -> None:
    seen, go_on = [], threading.Event()

    def work(on_step: Any) -> str:
        on_step(1, 2)
        assert go_on.wait(10)  # set by the consumer of the first step
        on_step(2, 2)
        return "done"

    running = in_thread(work)
    seen.append(next(running))
    go_on.set()
    seen.append(next(running))
    with pytest.raises(StopIteration) as end:
        next(running)
    assert seen == [(1, 2), (2, 2)] and end.value.value == "done"


def test_work_without_steps_returns_its_result() -> None:
    assert take(lambda _: 7) == ([], 7)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_what_the_work_raises_is_raised(error: BaseException) -> None:
    def work(on_step: Any) -> None:
        on_step(1, 1)
        raise error

    with pytest.raises(type(error)):
        take(work)


@pytest.mark.parametrize("way_out", ["close", "throw"])
def test_the_work_stops_with_its_consumer(way_out: str) -> None:
    done = []

    def work(on_step: Any) -> None:
        for step in range(10**6):
            done.append(step)
            on_step(step, 10**6)

    running = in_thread(work)
    next(running)
    if way_out == "close":
        running.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            running.throw(KeyboardInterrupt())
    count = len(done)
    assert count < 10**6 and not any(thread.name == "anygen-generator" for thread in threading.enumerate())


def test_drained_work_tells_each_step_and_returns_its_result() -> None:
    def work() -> Any:
        yield 1, 2
        yield 2, 2
        return "done"

    seen: list[tuple[int, int]] = []
    assert drained(work(), lambda *step: seen.append(step)) == drained(work()) == "done"
    assert seen == [(1, 2), (2, 2)]
