from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from anygen.errors import ConfigError
from anygen.model import AnyGenModel
from anygen.prompts import pad
from anygen.training.losses import (
    contrastive_loss,
    diffusion_loss,
    diffusion_target,
    prefix_alignment,
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


@pytest.mark.parametrize("left", [False, True])
def test_the_prefix_needs_no_gradient(tiny_model: Callable[..., AnyGenModel], left: bool) -> None:
    model = tiny_model()
    captions = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]
    targets = {
        "image": {"prompt_embeds": torch.randn(3, 5, 8)},
        "audio": {"generated_prompt_embeds": torch.randn(3, 2, 4), "prompt_embeds": torch.randn(3, 3, 6)},
    }
    plain = []
    for modality, target in targets.items():  # the plain way: each run behind its caption, one pass, full autograd
        run = list(model.signal_tokens.runs[modality])
        ids, mask = pad([caption + run for caption in captions], 0)
        plain.append(model(input_ids=ids, attention_mask=mask, conditions={modality: target}).alignment_loss)
    wanted = torch.stack(plain).mean()
    wanted.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss, conditions = prefix_alignment(model, *pad(captions, 0, left=left), targets)
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    assert set(conditions) == {"image", "audio"}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(gradients)
    for name, parameter in model.named_parameters():
        if name in gradients and parameter.grad is not None:
            error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
            assert error < 1e-5, name


def test_a_prefix_that_trains_is_refused(tiny_model: Callable[..., AnyGenModel]) -> None:
    target: Any = {"image": {"prompt_embeds": torch.randn(1, 5, 8)}}
    model = tiny_model(adapter=True)
    with pytest.raises(ConfigError, match="needs a frozen LLM: its adapter is trainable"):
        prefix_alignment(model, *pad([[5, 6]], 0), target)
    model = tiny_model()
    with pytest.raises(ConfigError, match="needs a prefix of plain words: it holds signal tokens"):
        prefix_alignment(model, *pad([[5, model.signal_tokens.media_id]], 0), target)
