"""The fast way through the LLM: keys and values in memory of a fixed size, a step as one CUDA graph.

A step is one token a row, or a run. Everything that it reads and writes lies in place: ids go in, embedding, decoder,
head and the choice of the likeliest word follow, and the host waits for one small tensor. So a step can be captured
(`graphs.py`), and its layers compiled (`compiling.py`). Rows that are done stay as rows of padding, so that the shape
does. The memory and its graphs are kept for the next prompt; a conversation finds its last turn there.

```
columns   0 ...          filled ... filled + q           capacity
         | seen by rows | this step's tokens | not yet ...      |
```

Source: transformers' `StaticCache`, whose memory this is; gpt-fast (PyTorch, 2023), which captures a step as a whole.
Shapes: B rows, T columns of a prompt, q tokens of a step, N capacity, V vocabulary, R new tokens, D LLM width.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from anygen import compiling
from anygen.graphs import Capture, Graphed, cuda_capture
from anygen.prompts import pad
from anygen.rows import Kept, common_prefix, heads, without_gradients

if TYPE_CHECKING:
    from anygen.model import AnyGenModel, MediaInput

BUCKET = 256
"""Capacities are multiples of it."""
MOST = 3
"""Memories that are kept between prompts."""
Region = Callable[[Any], AbstractContextManager[None]]
"""Given a cache, the context in which the decoder's layers are compiled."""


class Place:
    """The columns that a step writes to, computed once for all layers."""

    columns: Tensor
    """long[q]."""


class PlacedLayer(StaticLayer):
    """A layer's keys and values; where its class counts columns by itself, layer by layer, this one is told them."""

    place: Place

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """float[B, h, q, d] twice -> float[B, h, N, d] twice."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        keys.index_copy_(2, self.place.columns, key_states)
        values.index_copy_(2, self.place.columns, value_states)
        return keys, values


class StaticMemory:
    """Keys and values of B rows and N columns, and the step on them.

    Args:
        model: in evaluation mode.
        batch: B.
        capacity: N.
        adapted: whether the adapter is on.
        capture: how steps become graphs; None leaves them plain.
        region: compiles the layers; None leaves them plain.
    """

    def __init__(
        self,
        model: "AnyGenModel",
        batch: int,
        capacity: int,
        *,
        adapted: bool,
        capture: Capture | None = None,
        region: Region | None = None,
    ) -> None:
        self.model, self.batch, self.capacity, self.adapted = model, batch, capacity, adapted
        self.region, self.capture = region, capture
        self.keys: list[Hashable] = []
        """What the columns of a single row hold, if that is known."""
        device = model.device
        with model.llm.no_gradients():
            self.cache = StaticCache(config=model.llm.base.config, max_cache_len=capacity)
            self.place = Place()
            layers: list[Any] = self.cache.layers
            for layer in layers:
                layer.__class__, layer.place = PlacedLayer, self.place
            self.seen = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
            self.next = torch.zeros(batch, dtype=torch.long, device=device)
            self.filled = torch.zeros((), dtype=torch.long, device=device)
            self.columns = torch.arange(capacity, device=device)
        self.used = 0
        """`filled`, as the host knows it."""
        self.heads: Callable[..., tuple[Tensor, Tensor]] = heads
        self.placed: Callable[..., tuple[Tensor, Tensor, Tensor]] = placed
        if region is not None:
            self.heads, self.placed = compiling.compiled(heads), compiling.compiled(placed)
        self._told: dict[int, tuple[Tensor, Tensor]] = {}
        """q -> the tokens of a step, on the host and on the device."""
        self.step: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] = self._step
        if capture is not None:
            self.step = Graphed(self._step, "the LLM", capture=capture, copies=False)

    @without_gradients
    def begin(self, columns: int = 0) -> None:
        """Keeps the first columns of a single row, or none of any."""
        self.used = columns
        self.filled.fill_(columns)
        self.next.fill_(columns)
        self.seen.copy_((self.columns < columns).expand_as(self.seen))

    @without_gradients
    def copy_from(self, other: "StaticMemory") -> None:
        """Takes over all columns of a smaller one."""
        self.begin(0)
        self.used = other.used
        self.seen[:, : other.capacity].copy_(other.seen)
        self.next.copy_(other.next)
        self.filled.copy_(other.filled)
        pairs: Any = zip(self.cache.layers, other.cache.layers, strict=True)
        for own, layer in pairs:
            if not own.is_initialized:
                own.lazy_initialization(layer.keys[..., :1, :], layer.values[..., :1, :])
            own.keys[:, :, : other.capacity].copy_(layer.keys)
            own.values[:, :, : other.capacity].copy_(layer.values)
        self.keys = list(other.keys)

    def run(self, embeds: Tensor, real: Tensor, *, fresh: bool = False, stepping: bool = False) -> Tensor:
        """Puts tokens into the next columns.

        Args:
            embeds: float[B, q, D], right aligned.
            real: bool[B, q], false where a row is padded.
            fresh: whether there is neither padding nor anything before, so that no mask is needed.
            stepping: whether it is a step, whose parts may be compiled, and not a prompt of any length.

        Returns:
            float[B, q, D].
        """
        count = embeds.shape[1]
        place = self.placed if stepping else placed
        self.place.columns, places, mask = place(self.filled, self.next, self.columns, self.seen, real, embeds.dtype)
        if fresh:
            mask = None
        hidden, _ = self.model.llm.hidden_states(embeds, attention_mask=mask, position_ids=places, cache=self.cache)
        self.next += real.sum(1)
        self.filled += count
        return hidden

    def feed(self, pending: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """B lists of tokens, some of them empty -> what `_step` returns."""
        longest = max(map(len, pending))
        told = self._told.get(longest)
        if told is None:  # a replay waits for the host, so that memory is pinned once and filled ever after
            host = torch.empty(self.batch, longest, dtype=torch.long, pin_memory=self.filled.is_cuda)
            told = self._told[longest] = (host, host.to(self.filled.device))
        host, tokens = told
        for row, ids in enumerate(pending):
            for place, token in enumerate((-1,) * (longest - len(ids)) + tuple(ids)):
                host[row, place] = token
        tokens.copy_(host, non_blocking=True)
        self.used += longest
        return self.step(tokens)

    def _step(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """long[B, q], -1 for padding -> states float[B, q, D], logits float32[B, V], scores float32[B, 2 + R]."""
        embeds = self.model.signal_tokens.embed(tokens, self.model.llm.embedding)
        with self.view(), self.region(self.cache) if self.region is not None else nullcontext():
            hidden = self.run(embeds, tokens >= 0, stepping=True)
            logits, scores = self.heads(self.model, hidden[:, -1])
            return hidden, logits, scores

    def view(self) -> AbstractContextManager[None]:
        """With or without the adapter."""
        return nullcontext() if self.adapted else self.model.llm.adapter_off()


def placed(
    filled: Tensor, following: Tensor, columns: Tensor, seen: Tensor, real: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Where a step's tokens go and what they see.

    Args:
        filled: long[], columns that hold something.
        following: long[B], each row's next position.
        columns: long[N], 0 to N - 1.
        seen: bool[B, N], columns that are not padding; marked for the step.
        real: bool[B, q], false where a row is padded.
        dtype: of the mask.

    Returns:
        columns long[q], positions long[B, q], mask float[B, 1, q, N], added to scores.
    """
    own = filled + torch.arange(real.shape[1], device=real.device)
    seen.index_copy_(1, own, real)
    places = following.unsqueeze(1) + (real.long().cumsum(1) - 1).clamp(min=0)
    earlier = (columns <= own.unsqueeze(1)) & seen.unsqueeze(1)  # [B, q, N]
    # a padded token sees itself, as nothing to see would make it NaN on some devices
    visible = (earlier | (columns == own.unsqueeze(1))).unsqueeze(1)
    # added to the scores as it is; of a mask of truth values every layer would make this anew
    return own, places, torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


class StaticRows:
    """Rows in a `StaticMemory`; as `DynamicRows`.

    Args:
        memories: where from.
        batch: B.
        longest: T.
        room: columns that the answers are likely to take.
        adapted: whether the adapter is on.
        kept: of a conversation, for a single row: its last turn may still be there.
        keys: of the row's columns.
    """

    def __init__(
        self,
        memories: "StaticMemories",
        batch: int,
        longest: int,
        room: int,
        *,
        adapted: bool,
        kept: Kept | None = None,
        keys: Sequence[Hashable] = (),
    ) -> None:
        self.memories, self.model, self.adapted = memories, memories.model, adapted
        self._reusable, self._given = kept is not None, list(keys)
        self.memory = memories.take(batch, longest + room, adapted=adapted, keys=self._given if self._reusable else ())
        self.alive = list(range(batch))
        self.next: list[int] = []
        self._logits = self._scores = torch.zeros(0)
        self.asynchronous = self.model.device.type == "cuda"

    @without_gradients
    def read(self, prompts: Sequence[Sequence[int]], media: "Mapping[str, MediaInput] | None") -> None:
        """As `Rows.read`."""
        memory, keys = self.memory, self._given
        start = common_prefix(memory.keys, keys) if self._reusable else 0
        memory.keys = []
        memory.begin(start)
        ids, real = (tensor.to(self.model.device) for tensor in pad(prompts, 0, left=True))
        self.next = [len(prompt) for prompt in prompts]
        embeds = self.model.embed(ids, media)[:, start:]
        fresh = start == 0 and all(len(prompt) == ids.shape[1] for prompt in prompts)
        with memory.view():
            hidden = memory.run(embeds, real[:, start:].bool(), fresh=fresh)
            self._logits, self._scores = heads(self.model, hidden[:, -1])
        memory.used += embeds.shape[1]
        memory.keys = keys

    @without_gradients
    def feed(self, pending: Sequence[Sequence[int]]) -> Tensor:
        """As `Rows.feed`; rows that are done are fed padding."""
        longest = max(map(len, pending))
        if self.memory.used + longest > self.memory.capacity:
            self.memory = self.memories.grown(self.memory, longest)
        memory = self.memory
        all_rows: list[Sequence[int]] = [()] * memory.batch
        for row, tokens in zip(self.alive, pending, strict=True):
            all_rows[row] = tokens
        known, memory.keys = memory.keys, []
        hidden, self._logits, self._scores = memory.feed(all_rows)
        if self._reusable:
            memory.keys = [*known, *pending[0]]
        self.next = [place + len(told) for place, told in zip(self.next, pending, strict=True)]
        return hidden if len(self.alive) == memory.batch else hidden[self.alive]

    def scores(self) -> list[list[float]]:
        """As `Rows.scores`."""
        told = self._scores.tolist()
        return [told[row] for row in self.alive]

    def logits(self, row: int) -> Tensor:
        """As `Rows.logits`."""
        return self._logits[self.alive[row]]

    def keep(self, rows: Sequence[int]) -> None:
        """As `Rows.keep`."""
        self.alive = [self.alive[row] for row in rows]
        self.next = [self.next[row] for row in rows]

    def leave(self, kept: Kept | None) -> None:
        """As `Rows.leave`; the memory is free for the next prompt."""
        self.memories.give(self.memory)


class StaticMemories:
    """The memories of a model, kept between prompts.

    Args:
        model: whose LLM is on one device, with attention to all columns in every layer.
        capture: as of `StaticMemory`.
        region: as of `StaticMemory`.
    """

    def __init__(
        self, model: "AnyGenModel", *, capture: Capture | None = cuda_capture, region: Region | None = None
    ) -> None:
        self.model, self.capture, self.region = model, capture, region
        self._idle: list[StaticMemory] = []
        self._changes = model.llm.changes

    @staticmethod
    def reason_against(model: "AnyGenModel") -> str | None:
        """Why a model's LLM cannot go this way; None if it can."""
        base: Any = model.llm.base
        places = set(map(str, getattr(base, "hf_device_map", {}).values()))
        if len(places) > 1 or "disk" in places:
            return "the LLM is spread over several devices"
        if base.config.get_text_config()._attn_implementation != "sdpa":
            return f"its attention is '{base.config.get_text_config()._attn_implementation}', not 'sdpa'"
        if model.llm.prefix_length:
            return "its adapter is a prefix"
        cache = StaticCache(config=base.config, max_cache_len=8)
        if not all(type(layer) is StaticLayer for layer in cache.layers):
            return "its layers do not all see the whole text"
        return None

    def take(self, batch: int, columns: int, *, adapted: bool, keys: Sequence[Hashable] = ()) -> StaticMemory:
        """A memory for B rows of at least so many columns; the one that holds most of `keys`, if one does."""
        if self._changes != self.model.llm.changes:
            self.clear()
            self._changes = self.model.llm.changes
        fitting = [m for m in self._idle if (m.batch, m.adapted) == (batch, adapted) and m.capacity >= columns]
        if fitting:
            best = max(fitting, key=lambda memory: (common_prefix(memory.keys, keys), -memory.capacity))
            self._idle.remove(best)
            return best
        shorter = [m for m in self._idle if (m.batch, m.adapted) == (batch, adapted)]
        known = max(shorter, key=lambda memory: common_prefix(memory.keys, keys), default=None)
        made = self._new(batch, columns, adapted)
        if known is not None and common_prefix(known.keys, keys):
            self._idle.remove(known)
            made.copy_from(known)
        return made

    def grown(self, memory: StaticMemory, columns: int) -> StaticMemory:
        """A larger one in place of a memory that is full."""
        larger = self._new(memory.batch, max(memory.used + columns, 2 * memory.capacity), memory.adapted)
        larger.copy_from(memory)
        return larger

    def give(self, memory: StaticMemory) -> None:
        """Takes a memory back; the one whose last use is longest ago is freed for it."""
        self._idle = [*self._idle, memory][-MOST:]

    def clear(self) -> None:
        """Frees all that are idle."""
        self._idle.clear()

    def _new(self, batch: int, columns: int, adapted: bool) -> StaticMemory:
        capacity = -(-columns // BUCKET) * BUCKET
        return StaticMemory(self.model, batch, capacity, adapted=adapted, capture=self.capture, region=self.region)
