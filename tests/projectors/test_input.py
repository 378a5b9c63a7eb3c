import pytest
import torch
from torch import Tensor, nn

from anygen.errors import ConfigError
from anygen.features import Features
from anygen.projectors.input import LinearProjector, LinearProjectorConfig, MLPProjector, MLPProjectorConfig


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
