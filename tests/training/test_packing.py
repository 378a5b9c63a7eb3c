"""Packing of conversations into rows."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from anygen.training.packing import PackedBatches, block_mask, pack, rows_of, segments_of


def test_packing_puts_what_fits_where_it_fits_best() -> None:
    assert pack([5, 3, 2, 4, 1], 2, 8) == [[0, 1], [3, 2, 4]]
    assert pack([9, 8], 1, 8) == [[1]]  # too long for any, and no room left
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 90, (400,), generator=generator).tolist()
    bins = pack(lengths, 60, 320)
    used = [sum(lengths[item] for item in content) for content in bins]
    assert max(used) <= 320 and sum(used) / (60 * 320) > 0.97
    packed = [item for content in bins for item in content]
    assert len(packed) == len(set(packed))


class Numbered:
    """Example n has between 1 and 12 tokens, all of them n."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"ids": [number] * (number * 7 % 12 + 1)}


def numbers(rows: list[list[dict[str, Any]]]) -> dict[str, Any]:
    return {"rows": [[example["ids"][0] for example in row] for row in rows]}


@pytest.mark.parametrize("lanes", [0, 2])
def test_a_batch_is_the_same_whoever_makes_it_and_no_example_comes_twice(lanes: int) -> None:
    def supply() -> PackedBatches:
        return PackedBatches(Numbered(), numbers, batches=12, rows=3, width=20, chunk=2, lanes=lanes, seed=1)

    one = supply()
    made = [one[n]["rows"] for n in range(len(one))]
    assert [supply()[n]["rows"] for n in range(12)] == made
    seen = [number for batch in made for row in batch for number in row]
    assert all(len(batch) == 3 for batch in made) and len(seen) == len(set(seen))
    assert sum(number * 7 % 12 + 1 for number in seen) > 0.9 * 12 * 3 * 20


def test_a_token_sees_its_own_conversation_up_to_itself() -> None:
    ids = [[[7, 7, 7], [8, 8]], [[9]]]
    segments, places = segments_of(ids, 6)
    assert rows_of(ids, 6, -1).tolist() == [[7, 7, 7, 8, 8, -1], [9, -1, -1, -1, -1, -1]]
    assert segments.tolist() == [[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]]
    assert places.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 0, 0, 0]]
    mask = block_mask(segments)
    assert mask.shape == (2, 1, 6, 6)
    sees = [(row, column) for row, column in mask[0, 0].nonzero().tolist() if row < 5]
    assert sees == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 3), (4, 3), (4, 4)]
    assert bool(mask.any(-1).all())  # no row of the softmax is empty, not even in the padding
    assert all(a <= b for a, b in pairwise(segments[0, :5].tolist()))
