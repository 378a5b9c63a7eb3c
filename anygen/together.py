"""Media of several modalities at once on one GPU: their generators take turns, step by step, each on a CUDA stream.

The UNet of a sound or of a single picture leaves most of a GPU idle, that of a clip little. A turn launches one step of
each and waits for none, so that small steps run beside a large one. Everything stays in one thread, and each modality
is computed as if it were alone: media are the same.

Source: NVIDIA, "CUDA C++ Programming Guide", streams and their priorities.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from anygen.stepwise import Steps

T = TypeVar("T")
MOST = 4
"""Media of one modality in one reply or batch up to which it pays: more of them fill a GPU by themselves."""
LARGE = ("video",)
"""Modalities whose steps let the others' go first."""
Lane = Callable[[str], AbstractContextManager[Any]]
"""Given a modality, the context in which its steps are launched."""


def in_turns(
    works: Mapping[str, Steps[T]], lane: Lane, on_step: Callable[[str, int, int], None] | None = None
) -> dict[str, T]:
    """Drains several step-by-step works by turns; large ones lead each turn, so that the GPU always has something.

    Args:
        works: modality -> its steps, not begun yet; all are closed if one fails.
        lane: where each is launched.
        on_step: told the modality, its steps done and its steps in all.

    Returns:
        What each returns, in the order of `works`.
    """
    results: dict[str, T] = {}
    with ExitStack() as stack:
        for steps in works.values():
            stack.enter_context(closing(steps))
        waiting = sorted(works, key=lambda modality: modality not in LARGE)
        while waiting:
            for modality in list(waiting):
                with lane(modality):
                    try:
                        done, total = next(works[modality])
                    except StopIteration as end:
                        results[modality] = end.value
                        waiting.remove(modality)
                        continue
                if on_step is not None:
                    on_step(modality, done, total)
    return {modality: results[modality] for modality in works}


class Lanes:
    """A CUDA stream for each modality, the same ones at every call: the allocator keeps memory by stream.

    Args:
        device: a CUDA device; on any other the lanes are none.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams: dict[str, Any] = {}

    def lane(self, modality: str) -> AbstractContextManager[Any]:
        """The context in which a modality's work is launched."""
        return torch.cuda.stream(self._stream(modality))

    @contextmanager
    def joined(self, *modalities: str) -> Iterator[Lane]:
        """What was launched before is done before the lanes begin, and they are done before what follows."""
        if self.device.type != "cuda":
            yield lambda _: nullcontext()
            return
        current = torch.cuda.current_stream(self.device)
        streams = [self._stream(modality) for modality in modalities]
        for stream in streams:
            stream.wait_stream(current)
        try:
            yield self.lane
        finally:
            for stream in streams:
                current.wait_stream(stream)

    def _stream(self, modality: str) -> Any:
        if modality not in self._streams:
            self._streams[modality] = torch.cuda.Stream(self.device, priority=0 if modality in LARGE else -1)
        return self._streams[modality]


def scaled(steps: Steps[T], number: int, count: int) -> Steps[T]:
    """The steps of the `number`-th of `count` batches, counted over all."""
    while True:
        try:
            done, total = next(steps)
        except StopIteration as end:
            return end.value
        yield number * total + done, count * total
