import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anygen.errors import ConfigError
from anygen.features import Features
from anygen.projectors.input import (
    LinearProjector,
    LinearProjectorConfig,
    MemoryProjector,
    MemoryProjectorConfig,
    MLPProjector,
    MLPProjectorConfig,
)


def features(batch: int = 2, tokens: int = 5, width: int = 6) -> Features:
    return Features(torch.randn(batch, tokens, width), torch.ones(batch, tokens, dtype=torch.bool))


def mlp(depth: int, **options: int | bool) -> MLPProjector:
    torch.manual_seed(0)
    return MLPProjector(MLPProjectorConfig(depth=depth, **options), feature_dim=6, llm_dim=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_token_sees_another(depth: int) -> None:
    project, given, order = mlp(depth), features(), torch.tensor([4, 2, 0, 1, 3])
    shuffled = project(Features(given.values[:, order], given.mask))
    torch.testing.assert_close(shuffled.values, project(given).values[:, order])


def test_an_mlp_equals_llavas_mlp2x_gelu() -> None:
    project, given = mlp(2), features()
    llava = nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 4))
    llava.load_state_dict(project.proj.state_dict())  # the published names: 0.weight, 2.weight
    torch.testing.assert_close(project(given).values, llava(given.values))


def test_an_mlp_of_depth_1_is_the_linear_projector() -> None:
    deep, given = mlp(1, tokens=3), features()
    flat = LinearProjector(LinearProjectorConfig(tokens=3), feature_dim=6, llm_dim=4)
    flat.proj.load_state_dict(deep.proj[0].state_dict())
    torch.testing.assert_close(deep(given).values, flat(given).values)


def test_the_tokens_of_a_feature_stand_together_and_share_its_mask() -> None:
    project = LinearProjector(LinearProjectorConfig(tokens=2), feature_dim=6, llm_dim=4)
    given = Features(torch.randn(1, 3, 6), torch.tensor([[True, False, True]]))
    made = project(given)
    alone: Tensor = project.proj(given.values[0, 1])
    torch.testing.assert_close(made.values[0, 2:4], alone.view(2, 4))
    assert made.mask.tolist() == [[True, True, False, False, True, True]]


def test_a_layer_norm_takes_the_features_size_away() -> None:
    project, given = mlp(2, layer_norm=True), features()
    louder = Features(given.values * 100, given.mask)
    torch.testing.assert_close(project(louder).values, project(given).values, rtol=1e-3, atol=1e-4)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 token of each feature, got tokens=0"):
        MLPProjectorConfig(tokens=0)
    with pytest.raises(ConfigError, match="at least 1 layer, got depth=0"):
        MLPProjectorConfig(depth=0)


def memory(**options: Any) -> MemoryProjector:
    torch.manual_seed(0)
    return MemoryProjector(MemoryProjectorConfig(memories=7, width=5, **options), feature_dim=6, llm_dim=4)


def test_what_is_recalled_is_the_softmax_weighted_mean_of_the_memory() -> None:
    project, keys = memory(scale=20.0), nn.functional.normalize(torch.randn(7, 6), dim=-1)
    project.remember(keys, torch.randn(50, 6))
    feature = nn.functional.normalize(torch.randn(6), dim=0)
    weights = [math.exp(20 * float(key @ feature)) for key in keys]
    wanted = sum(weight * key for weight, key in zip(weights, keys, strict=True)) / sum(weights)
    torch.testing.assert_close(project.recall(feature), wanted)


def test_a_feature_near_a_memory_recalls_it_whatever_lies_between_the_modalities() -> None:
    """The gap adds the same to every likeness."""
    torch.manual_seed(0)
    gap, keys = torch.eye(16)[0] * 3, torch.randn(7, 16) * torch.tensor([0.0] + [1.0] * 15)
    keys = nn.functional.normalize(keys, dim=-1)
    project = MemoryProjector(MemoryProjectorConfig(memories=7, width=5, scale=100), feature_dim=16, llm_dim=4)
    project.remember(keys, keys + gap)
    torch.testing.assert_close(project.recall(keys + gap), keys, rtol=0, atol=1e-3)


def test_a_memory_projector_sees_features_and_memories_at_zero_mean_and_unit_spread() -> None:
    project, keys, seen = memory(), torch.randn(7, 6), torch.randn(500, 6) * 3 + 5
    project.remember(keys, seen)
    given: list[Tensor] = []
    project.proj.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    project(Features(seen[:, None], torch.ones(500, 1, dtype=torch.bool)))
    (both,) = given
    torch.testing.assert_close(both[..., :6].mean((0, 1)), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(both[..., :6].std((0, 1)), torch.ones(6))
    recalled = (project.recall(seen) - keys.mean(0)) / keys.std(0, correction=0)
    torch.testing.assert_close(both[:, 0, 6:], recalled)


def test_a_memory_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the memory has the shape \(7, 6\), got keys \(8, 6\)"):
        memory().remember(torch.zeros(8, 6), torch.zeros(2, 6))
    with pytest.raises(ConfigError, match="at least 1 memory and makes at least 1 token"):
        MemoryProjectorConfig(memories=0)
    with pytest.raises(ConfigError, match="scale of the recall must be positive, got 0"):
        memory(scale=0)
