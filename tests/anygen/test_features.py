import pytest
import torch

from anygen.errors import CheckpointError, ConfigError
from anygen.features import Condition, ConditionSpec, Features


def two() -> Condition:
    return Condition({"prompt_embeds": torch.arange(12.0).view(2, 3, 2), "mask": torch.tensor([[True], [False]])})


def test_a_row_is_a_condition_of_its_own_and_rows_join_again() -> None:
    condition = two()
    assert len(condition) == 2 and len(condition[1]) == 1 and len(condition[-1]) == 1
    joined = Condition.cat([condition[0], condition[1]])
    for name, value in condition.tensors.items():
        assert torch.equal(joined.tensors[name], value)
    assert torch.equal(condition[-1].tensors["prompt_embeds"], condition[1].tensors["prompt_embeds"])


def test_casting_leaves_masks_alone() -> None:
    cast = two().to(dtype=torch.float16)
    assert cast.tensors["prompt_embeds"].dtype == torch.float16
    assert cast.tensors["mask"].dtype == torch.bool


def test_conditions_of_different_kinds_do_not_join() -> None:
    with pytest.raises(CheckpointError, match="different kinds cannot be joined"):
        Condition.cat([two(), Condition({"prompt_embeds": torch.zeros(1, 3, 2)})])


def test_a_spec_names_what_it_wants_and_what_it_got() -> None:
    spec = ConditionSpec(shapes={"prompt_embeds": (3, 2), "mask": (1,)})
    assert spec.check(two()) is not None
    with pytest.raises(ConfigError, match=r"'prompt_embeds': \(3, 4\).* is wanted, got .*\(3, 2\)"):
        ConditionSpec(shapes={"prompt_embeds": (3, 4), "mask": (1,)}).check(two())
    with pytest.raises(ConfigError, match="is wanted, got"):
        ConditionSpec(shapes={"prompt_embeds": (3, 2)}).check(two())


def test_joined_features_are_padded_behind_their_tokens() -> None:
    long = Features(torch.arange(12.0).reshape(2, 3, 2), torch.tensor([[True, True, True], [True, True, False]]))
    short = Features(torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
    joined = Features.cat([long, short])
    assert joined.mask.tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    assert torch.equal(joined.values[:2], long.values)
    assert joined.values[2].tolist() == [[1, 1], [0, 0], [0, 0]]
    alone = Features.cat([long])
    assert torch.equal(alone.values, long.values) and torch.equal(alone.mask, long.mask)
