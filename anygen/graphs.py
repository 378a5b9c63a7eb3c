"""CUDA graphs of functions, one for each shape: what the host launches kernel by kernel is replayed as a whole.

At batch 1 a 7B LLM and most UNets wait for the host, not for the GPU; a graph takes the host out without compiling
anything. The first call of a shape runs plainly, on the tensors of a graph to be, which warms up whatever has to be;
the second is captured, so that a shape that never comes again costs next to nothing. Where a capture fails, one line is
logged and the function stays plain.

Source: Gray, "Getting Started with CUDA Graphs" (NVIDIA, 2019); `torch.cuda.graph`.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

logger = logging.getLogger(__name__)

MOST = 8
"""Graphs that one function keeps; the one whose last use is longest ago goes first."""
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], Any], Any]]
"""Takes work on fixed tensors; returns what repeats it, and the tensors that a repetition writes to."""


def cuda_capture(work: Callable[[], Any], pool: Any = None, stream: Any = None) -> tuple[Callable[[], Any], Any]:
    """`work` as a CUDA graph.

    Args:
        work: on tensors that stay where they are; launched already at least once.
        pool: memory that several graphs share; each gets its own by default.
        stream: to capture on; libraries keep a workspace for each, which graphs that are replayed at once must not
            share. One for all by default.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        made = work()
    return graph.replay, made


class PooledCapture:
    """Captures in one pool of memory, for graphs of which one is replayed at a time, and results are copied before the
    next is. Others may be replayed meanwhile: they share neither memory nor workspaces."""

    def __init__(self) -> None:
        self._pools: dict[int, Any] = {}

    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        """As `cuda_capture`."""
        device = torch.cuda.current_device()
        if device not in self._pools:
            handle, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            # A pool ends with its last graph, and PyTorch refuses to begin it again: one that does nothing outlives all
            anchor = cuda_capture(lambda: torch.zeros(1, device="cuda"), handle, stream)
            self._pools[device] = (handle, stream, anchor)
        handle, stream, _ = self._pools[device]
        try:
            return cuda_capture(work, handle, stream)
        except Exception:
            # What was begun is not ended: the pool goes on recording, and random numbers count as the graph's.
            del self._pools[device]
            random = torch.cuda.default_generators[device]
            random.graphsafe_set_state(random.clone_state())
            raise


class Graphed:
    """A function of tensors that is captured for each shape it meets.

    Args:
        function: any arguments and results of tensors in lists, tuples, dicts; other values are taken as constant. It
            may change tensors of its own in place, but must not look at a tensor's values on the host.
        name: what messages call it.
        capture: how; by default in a pool of its own.
        copies: whether results are copied out of the graph's memory; without, the next call overwrites them.

    Attributes:
        active: whether it captures; switched off by a capture that failed.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, *, capture: Capture | None = None, copies: bool = True
    ) -> None:
        self.function, self.name, self.copies = function, name, copies
        self.capture = capture or PooledCapture()
        self.active = True
        self._known: OrderedDict[Hashable, _Graph] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns; in training it is never captured."""
        if not self.active or torch.is_grad_enabled():
            return self.function(*args, **kwargs)
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):  # a step of an LLM counts microseconds
            leaves, spec = list(args), None
        else:
            leaves, spec = tree_flatten((args, kwargs))
        key = (spec, tuple(_described(leaf) for leaf in leaves))
        try:
            hash(key)
        except TypeError:  # a constant that cannot be compared
            return self.function(*args, **kwargs)
        graph = self._known.get(key)
        if graph is None:
            graph = _Graph(self.function, leaves, spec)
            self._remember(key, graph)
            return graph.plainly(leaves)
        if graph.replay is None and not self._captured(graph, leaves):
            return self.function(*args, **kwargs)
        self._remember(key, graph)
        return graph(leaves, copies=self.copies)

    def __len__(self) -> int:
        """Graphs that are kept."""
        return sum(graph.replay is not None for graph in self._known.values())

    def clear(self) -> None:
        """Forgets all graphs; needed when weights move, as a graph knows them by their address."""
        self._known.clear()

    def _remember(self, key: Hashable, graph: "_Graph") -> None:
        self._known[key] = graph
        self._known.move_to_end(key)
        while len(self._known) > MOST:
            self._known.popitem(last=False)

    def _captured(self, graph: "_Graph", leaves: list[Any]) -> bool:
        try:
            graph.record(leaves, self.capture)
            return True
        except (RuntimeError, torch.OutOfMemoryError) as error:
            self.active = False
            self.clear()
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            logger.warning("%s runs without a CUDA graph: %s", self.name, reason)
            return False


class _Graph:
    """One shape's: inputs of its own, and, once it is recorded, what repeats the work on them."""

    def __init__(self, function: Callable[..., Any], leaves: list[Any], spec: Any) -> None:
        with torch.inference_mode(False):  # so that it may be written to in any mode
            self.inputs = [torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = (self.inputs, {}) if spec is None else tree_unflatten(self.inputs, spec)
        self.work = lambda: function(*args, **kwargs)
        self.replay: Callable[[], Any] | None = None

    def plainly(self, leaves: list[Any]) -> Any:
        """On the tensors that will be recorded: to a compiler they are other ones than the caller's."""
        self._fill(leaves)
        return self.work()

    def record(self, leaves: list[Any], capture: Capture) -> None:
        """Records the work, without doing it."""
        self._fill(leaves)
        self.replay, self.made = capture(self.work)
        self.outputs, self.spec = tree_flatten(self.made)

    def __call__(self, leaves: list[Any], *, copies: bool) -> Any:
        assert self.replay is not None
        self._fill(leaves)
        self.replay()
        if not copies:
            return self.made
        outputs = [made.clone() if isinstance(made, Tensor) else made for made in self.outputs]
        return tree_unflatten(outputs, self.spec)

    def _fill(self, leaves: list[Any]) -> None:
        for own, given in zip(self.inputs, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given, non_blocking=True)


def _described(leaf: Any) -> Hashable:
    """What makes a graph another one: a tensor's form, a constant's value."""
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
    return (type(leaf), leaf)
