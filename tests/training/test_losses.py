import pytest
import torch
import torch.nn.functional as F

from anygen.errors import ConfigError
from anygen.training.losses import (
    contrastive_loss,
    diffusion_loss,
    diffusion_target,
    snr_weights,
)

ALPHAS = torch.linspace(0.999, 0.01, 10)


def views() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 8), torch.randn(6, 8)


def test_the_contrastive_loss_equals_clips() -> None:
    left, right = views()
    logits = 7 * F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T
    wanted = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    torch.testing.assert_close(contrastive_loss(left, right, 7.0), wanted)
    torch.testing.assert_close(contrastive_loss(9 * left, right, 7.0), wanted)  # the length does not count


def test_labels_that_all_differ_change_nothing() -> None:
    left, right = views()
    torch.testing.assert_close(contrastive_loss(left, right, 7.0, torch.arange(6)), contrastive_loss(left, right, 7.0))


def test_equal_labels_share_the_probability() -> None:
    left, right = views()
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    logits = 7 * F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T
    wanted = torch.zeros(())
    for way in (logits, logits.T):
        for i in range(6):
            positives = [j for j in range(6) if labels[j] == labels[i]]
            wanted = wanted - way.log_softmax(1)[i, positives].mean() / 12
    torch.testing.assert_close(contrastive_loss(left, right, 7.0, labels), wanted)


def test_diffusion_targets_are_those_of_diffusers() -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=10)
    clean, noise, steps = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 3, 6, 9])
    made = diffusion_target(clean, noise, scheduler.alphas_cumprod, steps, "v_prediction")
    torch.testing.assert_close(made, scheduler.get_velocity(clean, noise, steps))  # type: ignore[arg-type]
    assert diffusion_target(clean, noise, ALPHAS, steps, "epsilon") is noise
    assert diffusion_target(clean, noise, ALPHAS, steps, "sample") is clean
    with pytest.raises(ConfigError, match="unknown prediction type 'flow'; known: epsilon, v_prediction, sample"):
        diffusion_target(clean, noise, ALPHAS, steps, "flow")  # type: ignore[arg-type]


def test_min_snr_weighs_the_error_in_the_clean_sample_alike_for_every_prediction() -> None:
    """A denoiser that errs by d in the clean sample errs by d times a known factor in epsilon and in v."""
    steps, error = torch.arange(10), torch.randn(10, 3)
    signal = ALPHAS[:, None]
    snr = signal / (1 - signal)
    losses = {
        "sample": diffusion_loss(error, torch.zeros_like(error), snr_weights(ALPHAS, steps, 5.0, "sample")),
        "epsilon": diffusion_loss(
            error * snr.sqrt(), torch.zeros_like(error), snr_weights(ALPHAS, steps, 5.0, "epsilon")
        ),
        "v_prediction": diffusion_loss(
            error * (snr + 1).sqrt(), torch.zeros_like(error), snr_weights(ALPHAS, steps, 5.0, "v_prediction")
        ),
    }
    torch.testing.assert_close(losses["epsilon"], losses["sample"])
    torch.testing.assert_close(losses["v_prediction"], losses["sample"])
    assert snr_weights(ALPHAS, steps, None, "epsilon").unique().tolist() == [1.0]
    assert float(snr_weights(ALPHAS, steps, 5.0, "epsilon").max()) == 1.0


def test_the_diffusion_loss_without_weights_is_the_mean_squared_error() -> None:
    a, b = views()
    torch.testing.assert_close(diffusion_loss(a, b), F.mse_loss(a, b))
    torch.testing.assert_close(diffusion_loss(a, b, torch.ones(6)), F.mse_loss(a, b))
