import pytest
import torch
import torch.nn.functional as F

from anygen.errors import ConfigError
from anygen.losses import AlignmentConfig, caption_alignment_loss, condition_loss, lm_loss, token_loss


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 5, 4)


def test_the_lm_loss_is_the_shifted_cross_entropy_of_transformers() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, labels = torch.randn(2, 6, 9), torch.randint(0, 9, (2, 6))
    labels[0, :3] = -100
    torch.testing.assert_close(lm_loss(logits, labels), ForCausalLMLoss(logits, labels, vocab_size=9))


def test_without_labels_the_lm_loss_is_zero_and_differentiable() -> None:
    logits = torch.randn(2, 6, 9, requires_grad=True)
    loss = lm_loss(logits, torch.full((2, 6), -100))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (AlignmentConfig(), lambda u, v: F.mse_loss(u, v)),
        (AlignmentConfig(mse=0, l2_norm=1), lambda u, v: ((u - v) ** 2).sum(-1).sqrt().mean()),
        (AlignmentConfig(mse=0, cosine=1), lambda u, v: 1 - F.cosine_similarity(u, v, dim=-1).mean()),
        (
            AlignmentConfig(mse=2, l2_norm=0.5),
            lambda u, v: 2 * F.mse_loss(u, v) + 0.5 * (u - v).norm(dim=-1).mean(),
        ),
    ],
    ids=["mse", "l2_norm", "cosine", "combined"],
)
def test_each_distance_is_its_formula(config: AlignmentConfig, wanted) -> None:  # noqa: ANN001
    u, v = pair()
    torch.testing.assert_close(caption_alignment_loss(u, v, config), wanted(u, v))


@pytest.mark.parametrize("config", [AlignmentConfig(), AlignmentConfig(l2_norm=1, cosine=1)])
def test_equal_conditions_have_no_distance_and_a_finite_gradient(config: AlignmentConfig) -> None:
    u, _ = pair()
    loss = caption_alignment_loss(u, u.detach(), config)
    loss.backward()
    assert loss.item() < 1e-5 and u.grad is not None and u.grad.isfinite().all()


def test_a_metric_measures_what_its_reader_sees() -> None:
    u, v = pair()
    blind = torch.eye(4)[:, :2]  # sees two of four directions
    torch.testing.assert_close(caption_alignment_loss(u, v, metric=blind), F.mse_loss(u[..., :2], v[..., :2]))
    torch.testing.assert_close(caption_alignment_loss(u, v, metric=torch.eye(4)), caption_alignment_loss(u, v))


def test_a_condition_of_several_tensors_sums_them() -> None:
    u, v = pair()
    both = condition_loss({"a": u, "b": 2 * u}, {"a": v, "b": v})
    torch.testing.assert_close(both, F.mse_loss(u, v) + F.mse_loss(2 * u, v))


def test_what_does_not_fit_is_refused() -> None:
    u, v = pair()
    with pytest.raises(ConfigError, match=r"the projector made \(3, 5, 4\), the target is \(3, 4, 4\)"):
        caption_alignment_loss(u, v[:, :4])
    with pytest.raises(ConfigError, match=r"the projector makes \['a'\], the targets are \['b'\]"):
        condition_loss({"a": u}, {"b": v})
    with pytest.raises(ConfigError, match="at least one of mse, l2_norm, cosine is > 0"):
        AlignmentConfig(mse=0)


def test_a_weighted_token_counts_as_if_it_stood_there_more_often() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5), torch.tensor([0, 4, 2])
    weighted = token_loss(logits, targets, torch.tensor([1.0, 3.0, 1.0]))
    repeated = token_loss(logits[[0, 1, 1, 1, 2]], targets[[0, 1, 1, 1, 2]])
    torch.testing.assert_close(weighted, repeated)
