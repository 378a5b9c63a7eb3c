import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anygen.errors import ConfigError
from anygen.features import Features
from anygen.projectors.input import (
    FeatureShift,
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
    sizes = {"memories": 7, "words": 7 * options.get("tokens", 1), "width": 5}
    return MemoryProjector(MemoryProjectorConfig(**(sizes | options)), feature_dim=6, llm_dim=4)


def units(count: int, width: int) -> Tensor:
    return nn.functional.normalize(torch.randn(count, width), dim=-1)


def test_what_is_recalled_is_the_softmax_of_the_scaled_likenesses() -> None:
    project, keys = memory(scale=20.0), units(7, 6)
    project.remember(keys, torch.randn(50, 6), torch.randn(7, 1, 4))
    feature = units(1, 6)[0]
    weights = torch.tensor([math.exp(20 * float(key @ feature)) for key in keys])
    torch.testing.assert_close(project.likeness(feature), weights / weights.sum())


@pytest.mark.parametrize("tokens", [1, 3])
def test_an_untrained_memory_tells_the_mean_of_what_is_recalled(tokens: int) -> None:
    project, keys, told = memory(scale=20.0, tokens=tokens), units(7, 6), torch.randn(7, tokens, 4)
    project.remember(keys, torch.randn(50, 6), told)
    given = features()
    weights = project.likeness(given.values)  # [2, 5, 7]
    made = project(given).values.view(2, 5, tokens, 4)
    torch.testing.assert_close(made, torch.einsum("btk,knd->btnd", weights, told), rtol=1e-4, atol=1e-5)


def test_words_that_names_share_are_kept_once() -> None:
    red, apple, pear = torch.randn(3, 4)
    told = torch.stack([torch.stack(name) for name in ([red, apple], [red, pear], [apple, apple])])
    project = MemoryProjector(MemoryProjectorConfig(memories=3, words=3, tokens=2), feature_dim=6, llm_dim=4)
    keys = units(3, 6)
    project.remember(keys, torch.randn(50, 6), told)
    torch.testing.assert_close(project.words[project.spelling], told)
    with pytest.raises(ConfigError, match="the memory has 3 words, 6 different tokens are told"):
        project.remember(keys, torch.randn(50, 6), torch.randn(3, 2, 4))


def test_a_feature_near_a_memory_recalls_it_whatever_lies_between_the_modalities() -> None:
    """The gap adds the same to every likeness."""
    torch.manual_seed(0)
    gap, keys = torch.eye(16)[0] * 3, torch.randn(7, 16) * torch.tensor([0.0] + [1.0] * 15)
    keys = nn.functional.normalize(keys, dim=-1)
    config = MemoryProjectorConfig(memories=7, words=7, width=5, scale=100)
    project = MemoryProjector(config, feature_dim=16, llm_dim=4)
    project.remember(keys, keys + gap, torch.randn(7, 1, 4))
    torch.testing.assert_close(project.likeness(keys + gap), torch.eye(7), rtol=0, atol=1e-3)


def test_a_memory_projector_sees_features_and_memories_at_zero_mean_and_unit_spread() -> None:
    project, keys, seen = memory(), torch.randn(7, 6), torch.randn(500, 6) * 3 + 5
    project.remember(keys, seen, torch.randn(7, 1, 4))
    given: list[Tensor] = []
    project.proj.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    project(Features(seen[:, None], torch.ones(500, 1, dtype=torch.bool)))
    (both,) = given
    torch.testing.assert_close(both[..., :6].mean((0, 1)), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(both[..., :6].std((0, 1)), torch.ones(6))
    recalled = (project.likeness(seen) @ keys - keys.mean(0)) / keys.std(0, correction=0)
    torch.testing.assert_close(both[:, 0, 6:], recalled)


def test_a_memory_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the memory has the shape \(7, 6\), got keys \(8, 6\)"):
        memory().remember(torch.zeros(8, 6), torch.zeros(2, 6), torch.zeros(8, 1, 4))
    with pytest.raises(ConfigError, match="at least 1 memory and 1 word, and makes at least 1 token of each feature"):
        MemoryProjectorConfig(memories=0, words=3)
    with pytest.raises(ConfigError, match="got memories=3, words=0, tokens=1"):
        MemoryProjectorConfig(memories=3, words=0)
    with pytest.raises(ConfigError, match="scale of the recall must be positive, got 0"):
        memory(scale=0)


def test_a_shift_closes_the_gap_between_two_modalities() -> None:
    shift, texts = FeatureShift(6), torch.randn(40, 6)
    own, other = texts + torch.tensor([1.0, 2, 3, 4, 5, 6]), texts - 2
    shift.bridge((own - texts).mean(0), (other - texts).mean(0))
    made = shift(Features(own[:, None], torch.ones(40, 1, dtype=torch.bool)))
    torch.testing.assert_close(made.values[:, 0], other)
    assert made.mask.all()
