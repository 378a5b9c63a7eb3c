"""Prompts that go through the LLM together: their keys and values, what of them each row may see, the next logits.

`DynamicRows` keeps what transformers' `DynamicCache` grows, as any model allows. `static_rows.py` has the fast way.
`Kept` is what a conversation leaves for its next turn: of the new prompt only what follows the longest common prefix is
read. The tokens are the same as without; in bfloat16 sums may round otherwise.

Shapes: B rows of the batch, T columns, V vocabulary, R new tokens, D LLM width.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from anygen.model import AnyGenModel, MediaInput, positions
from anygen.prompts import Prompt, pad

if TYPE_CHECKING:
    from transformers import DynamicCache

T = TypeVar("T")
SCORES = 2
"""Columns of the scores before those of the new tokens: the likeliest word's logit and its id."""


def without_gradients(method: Callable[..., T]) -> Callable[..., T]:
    """A method of something with a `model`, in the mode in which its LLM answers."""

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> T:
        with self.model.llm.no_gradients():
            return method(self, *args, **kwargs)

    return wrapped


class Rows(Protocol):
    """What the decoder asks of a batch."""

    next: list[int]
    """The position of each row's next token."""
    asynchronous: bool
    """Whether `feed` returns before its work is done, so that the host has time for something else."""

    def read(self, prompts: Sequence[Sequence[int]], media: Mapping[str, MediaInput] | None) -> None:
        """Reads the prompts, left padded so that all end in the last column."""
        ...

    def feed(self, pending: Sequence[Sequence[int]]) -> Tensor:
        """Gives each row its tokens, one or a whole run -> float[B, longest, D], right aligned."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with `rows` alone."""
        ...

    def scores(self) -> list[list[float]]:
        """B x (2 + R): the logit and the id of the likeliest word, then the new tokens' logits."""
        ...

    def logits(self, row: int) -> Tensor:
        """float32[V], of the LLM's own words."""
        ...

    def leave(self, kept: "Kept | None") -> None:
        """Done: what was read stays for the next turn, if there is to be one."""
        ...


def heads(model: AnyGenModel, last: Tensor) -> tuple[Tensor, Tensor]:
    """float[B, D], the states that the next tokens are chosen from -> logits float32[B, V], scores float32[B, 2 + R].

    Ids are exact in float32 up to 2^24, so that the host has to wait for one tensor alone.
    """
    logits = model.llm.logits(last).float()
    best = logits.max(1)
    new = model.llm.scale_logits(model.signal_tokens.logits(last))
    return logits, torch.cat([best.values[:, None], best.indices[:, None].float(), new], dim=1)


class DynamicRows:
    """Rows whose cache grows; those that are done go.

    Args:
        model: in evaluation mode.
        adapted: whether the adapter is on.
        kept: of the conversation's last turn, for a single row.
        keys: of the row's columns, see `column_keys`.
    """

    asynchronous = False

    def __init__(
        self,
        model: AnyGenModel,
        *,
        adapted: bool,
        kept: "Kept | None" = None,
        keys: Sequence[Hashable] = (),
    ) -> None:
        self.model, self.adapted = model, adapted
        before = model.llm.prefix_length if adapted else 0
        self.cache, self.keys = kept.take(adapted, keys, before=before) if kept is not None else (None, [])
        self._reusable, self._given = kept is not None, list(keys)
        self.next: list[int] = []
        self.mask = self._logits = self._scores = torch.zeros(0)

    @without_gradients
    def read(self, prompts: Sequence[Sequence[int]], media: Mapping[str, MediaInput] | None) -> None:
        """As `Rows.read`; columns that the cache holds already are not read again."""
        ids, self.mask = (tensor.to(self.model.device) for tensor in pad(prompts, 0, left=True))
        self.next = [len(prompt) for prompt in prompts]
        start, self.keys = len(self.keys), list(self._given)
        self._run(self.model.embed(ids, media)[:, start:], positions(self.mask)[:, start:])

    @without_gradients
    def feed(self, pending: Sequence[Sequence[int]]) -> Tensor:
        """As `Rows.feed`."""
        ids, real = (tensor.to(self.model.device) for tensor in pad(pending, 0, left=True))
        self.mask = torch.cat([self.mask, real], dim=1)
        start = torch.tensor(self.next, device=self.model.device)
        self.next = [place + len(tokens) for place, tokens in zip(self.next, pending, strict=True)]
        if self._reusable:
            self.keys += pending[0]
        return self._run(self.model.embed(ids), start.unsqueeze(1) + positions(real))

    def _run(self, embeds: Tensor, places: Tensor) -> Tensor:
        with nullcontext() if self.adapted else self.model.llm.adapter_off():
            hidden, self.cache = self.model.llm.hidden_states(
                embeds, attention_mask=self.mask, position_ids=places, cache=self.cache, use_cache=True
            )
        self._logits, self._scores = heads(self.model, hidden[:, -1])
        return hidden

    def scores(self) -> list[list[float]]:
        """As `Rows.scores`."""
        return self._scores.tolist()

    def logits(self, row: int) -> Tensor:
        """As `Rows.logits`."""
        return self._logits[row]

    @without_gradients
    def keep(self, rows: Sequence[int]) -> None:
        """As `Rows.keep`."""
        if len(rows) == len(self.mask):
            return
        index = torch.tensor(rows, device=self.mask.device)
        cache: DynamicCache = self.cache  # type: ignore[assignment]
        cache.batch_select_indices(index)
        self.mask, self._logits, self._scores = self.mask[index], self._logits[index], self._scores[index]
        self.next = [self.next[row] for row in rows]

    def leave(self, kept: "Kept | None") -> None:
        """As `Rows.leave`."""
        if kept is not None and self._reusable:
            kept.put(self.adapted, self.keys, self.cache)


class Kept:
    """What the LLM has read of a conversation, in both views, for its next turn."""

    def __init__(self) -> None:
        self._views: dict[bool, tuple[list[Hashable], Any]] = {}

    def take(self, adapted: bool, keys: Sequence[Hashable], *, before: int = 0) -> tuple[Any, list[Hashable]]:
        """The cache, cut to what it has in common with `keys`, and the keys of that; None and nothing if it has none.

        It is taken out, so that an answer that is broken off leaves nothing half read. `before` columns of the cache
        are a prefix adapter's.
        """
        known, cache = self._views.pop(adapted, ([], None))
        common = common_prefix(known, keys)
        if not common or not _may_be_cut(cache):
            return None, []
        if surplus := cache.get_seq_length() - before - common:
            cache.crop(-surplus)
        return cache, known[:common]

    def put(self, adapted: bool, keys: list[Hashable], cache: Any) -> None:
        """Keeps a view's columns."""
        self._views[adapted] = (keys, cache)

    def clear(self) -> None:
        """Frees it all."""
        self._views.clear()


def common_prefix(known: Sequence[Hashable], wanted: Sequence[Hashable]) -> int:
    """Columns that are the same in both; always one less than are wanted, as the last one's state is needed."""
    most = min(len(known), len(wanted) - 1)
    return next((place for place in range(most) if known[place] != wanted[place]), max(0, most))


def _may_be_cut(cache: Any) -> bool:
    """Whether every layer holds all columns: a sliding window has lost some."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in cache.layers)


def column_keys(model: AnyGenModel, prompt: Prompt) -> list[Hashable]:
    """What stands in each column of the adapter view: an id, or for a slot the medium and its place in that.

    A medium that is not there (its features were given) is equal to nothing.
    """
    counts = {model.prompts.slot_id(modality): count for modality, count in model.settings.slots.items()}
    keys: list[Hashable] = []
    parts, left, medium = iter(prompt.media), 0, object()
    for token in prompt.ids:
        if token >= 0:
            keys.append(token)
            continue
        if not left:
            left = counts[token]
            found: Any = next(parts).media
            medium = object() if found is None else found
        left -= 1
        keys.append((token, left, medium))
    return keys
