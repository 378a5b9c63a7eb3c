"""Conversations of any length in batches of one shape: packed into rows, each seeing itself alone.

Nothing is padded but the rows' ends, and every step runs the decoder on the very same shape, so that it can be
compiled once and replayed as one CUDA graph: at this model's size the host, not the GPU, is what a step waits for.
Shapes: R rows, W tokens of a row, D LLM width.
"""

import logging
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from anygen.llm import LLM

logger = logging.getLogger("anygen.training")


class Supply(Protocol):
    """An endless, indexable supply of examples; an example's `ids` are its tokens."""

    def __getitem__(self, number: int) -> dict[str, Any]: ...


def pack(lengths: Sequence[int], bins: int, width: int) -> list[list[int]]:
    """Best-fit decreasing: puts items into `bins` bins of `width`; items that find no place are left out.

    Returns:
        For each bin the items in it, in no particular order.
    """
    room = [(width, number) for number in range(bins)]
    content: list[list[int]] = [[] for _ in range(bins)]
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        place = bisect_left(room, (lengths[item], -1))  # the tightest bin that it fits into
        if place < len(room):
            left, number = room.pop(place)
            content[number].append(item)
            insort(room, (left - lengths[item], number))
    return content


class PackedBatches(Dataset[dict[str, Any]]):
    """Batches of R rows of W tokens, each row holding whole examples one behind the other.

    The batches of a chunk are packed together and come in a random order. A loader's workers take turns, so each works
    on its own lane of chunks and makes every example once; a batch is the same whoever makes it.

    Args:
        examples: the supply; every chunk takes its own stretch of it.
        collate: rows of examples -> batch.
        batches: how many there are.
        rows: R.
        width: W; longer examples are left out.
        chunk: batches that are packed together.
        lanes: the loader's workers, at least 1.
        seed: of the order.
    """

    def __init__(
        self,
        examples: Supply,
        collate: Callable[[list[list[dict[str, Any]]]], dict[str, Any]],
        *,
        batches: int,
        rows: int,
        width: int,
        chunk: int,
        lanes: int,
        seed: int,
    ) -> None:
        self.examples, self.collate, self.batches = examples, collate, batches
        self.rows, self.width, self.chunk = rows, width, chunk
        self.lanes, self.seed = max(1, lanes), seed
        self._kept: tuple[int, list[list[dict[str, Any]]]] = (-1, [])

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Batch `number`, collated."""
        turn, lane = divmod(number, self.lanes)
        chunk, place = divmod(turn, self.chunk)
        packed = self._chunk(chunk * self.lanes + lane)
        return self.collate(packed[place * self.rows : (place + 1) * self.rows])

    def _chunk(self, number: int) -> list[list[dict[str, Any]]]:
        if self._kept[0] != number:
            tokens = self.chunk * self.rows * self.width
            examples: list[dict[str, Any]] = []
            filled = 0
            while filled < tokens:
                example = self.examples[number * tokens + len(examples)]  # no example is shorter than a token
                examples.append(example)
                filled += len(example["ids"])
            packed = pack([len(example["ids"]) for example in examples], self.chunk * self.rows, self.width)
            random.Random(f"{self.seed}/{number}").shuffle(packed)
            self._kept = number, [[examples[item] for item in row] for row in packed]
        return self._kept[1]


def rows_of(packed: Sequence[Sequence[Sequence[int]]], width: int, fill: int) -> Tensor:
    """Lists of ids, several a row -> long[R, W], filled up with `fill`."""
    out = torch.full((len(packed), width), fill, dtype=torch.long)
    for row, parts in enumerate(packed):
        flat = [token for part in parts for token in part]
        out[row, : len(flat)] = torch.tensor(flat, dtype=torch.long)
    return out


def segments_of(packed: Sequence[Sequence[Sequence[int]]], width: int) -> tuple[Tensor, Tensor]:
    """Which conversation each token belongs to, from 1, and its position in it: long[R, W] twice; 0 in the padding."""
    numbers = [[[part + 1] * len(ids) for part, ids in enumerate(row)] for row in packed]
    places = [[range(len(ids)) for ids in row] for row in packed]
    return rows_of(numbers, width, 0), rows_of(places, width, 0)


def block_mask(segments: Tensor) -> Tensor:
    """long[R, W] -> bool[R, 1, W, W]: a token sees itself and what stands before it in its own conversation."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril()


class PackedDecoder(nn.Module):
    """The LLM's decoder over packed rows; on a GPU compiled by layer, captured once and replayed.

    Args:
        llm: in training mode; of its parameters only an adapter's train.
        bf16: mixed precision.
        compile: compiles each layer. The layers share their code, so one compilation serves all.
        graph: captures forward and backward as CUDA graphs at the first call; without effect on a CPU.
    """

    def __init__(self, llm: LLM, *, bf16: bool, compile: bool, graph: bool) -> None:
        super().__init__()
        self.llm, self.bf16, self.graph = llm, bf16, graph
        if compile:
            layers: Any = llm.base.get_decoder().layers
            for layer in layers:
                layer.compile(dynamic=False)

    def forward(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """float[R, W, D], bool[R, 1, W, W], long[R, W] -> float[R, W, D], the final states."""
        # A captured pass must not keep the casts of an earlier one.
        with torch.autocast(embeds.device.type, dtype=torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            return self.llm.hidden_states(embeds, attention_mask=mask, position_ids=positions)[0]

    def run(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """As `forward`, captured at the first call. Falls back to the plain pass, and says so, where that fails."""
        if self.graph:
            self.graph = False
            if embeds.is_cuda:
                like = torch.zeros_like(embeds).requires_grad_(embeds.requires_grad)
                samples = (like, mask.clone(), positions.clone())
                plain = self.forward
                try:
                    with torch.autocast("cuda", enabled=False):  # capturing refuses the caller's; `forward` has its own
                        torch.cuda.make_graphed_callables(self, samples, allow_unused_input=True)
                except RuntimeError as error:
                    self.forward = plain  # type: ignore[method-assign]
                    logger.warning("the decoder is not captured as a CUDA graph: %s", error)
        return self(embeds, mask, positions)
