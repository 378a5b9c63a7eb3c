"""What every latent-diffusion generator does whatever its conditions are: noise, guided sampling, the training target.

Source: Rombach et al. 2022 (arXiv:2112.10752); classifier-free guidance, Ho & Salimans 2022 (arXiv:2207.12598), in an
interval of the noise levels, Kynkäänniemi et al. 2024 (arXiv:2404.07724).
Differs: each sample's noise is drawn from its own seed, so that a sample does not depend on its batch.
Shapes: B batch; latents are float[B, c, ...].
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.errors import ConfigError
from anygen.features import Condition
from anygen.generators.base import Generator
from anygen.generators.placing import Placed, Placement, save_memory
from anygen.generators.quick import Quick, check_compile
from anygen.stepwise import StepCallback, Steps, drained

Predictor = Callable[[Tensor, Tensor], Tensor]
"""(latents, time or times) -> what the UNet predicts."""


def snr_weights(alphas_cumprod: Tensor, steps: Tensor, gamma: float | None, prediction_type: str) -> Tensor:
    """min-SNR weights of a batch of steps; ones if `gamma` is None.

    Source: Hang et al. (arXiv:2303.09556): min(SNR, gamma) in clean-sample space, hence divided by SNR for epsilon
    and by SNR + 1 for v.

    Returns:
        float32[B].
    """
    if gamma is None:
        return torch.ones(len(steps), device=steps.device)
    signal = alphas_cumprod.to(steps.device).float()[steps]
    snr = signal / (1 - signal)
    clipped = snr.clamp(max=gamma)
    return {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[prediction_type]


class DenoisingGenerator(Generator):
    """A generator with a VAE, a UNet and a noise schedule of diffusers."""

    overlaps = True
    vae: Any
    unet: Any
    scheduler: Any
    """Copied by `guided_sampling`, so that calls do not share state."""
    defaults: Any
    """With `steps` and `guidance_scale`, for calls that state none, and `guidance_interval`."""

    quick: Quick | None = None
    """The fast way, if `quicken` was called."""

    def models(self) -> dict[str, Any]:
        """Name -> model of all that generating calls."""
        models = {"UNet": self.unet, "VAE": self.vae.decoder, "vocoder": getattr(self, "vocoder", None)}
        return {name: model for name, model in models.items() if model is not None}

    def quicken(self, *, graphs: bool, compile: bool | str = False) -> Self:
        """As `Generator.quicken`."""
        if self.quick is not None:
            self.quick.undo()
        on_gpu = self.device.type == "cuda"
        kind = check_compile(compile)
        self.quick = Quick(self.models(), graphs=graphs and on_gpu, compile=kind, layout=on_gpu and kind is not None)
        return self

    min_snr: float | None = None
    """gamma of the min-SNR weights of `denoising_loss`; None weighs all times alike."""

    placed: Placed | None = None
    """Where the models come and go, if `place` was called."""

    def place(self, device: torch.device | str, placement: str) -> Self:
        """As `Generator.place`; the models are on the CPU."""
        models = {"UNet": self.unet, "VAE": self.vae, "vocoder": getattr(self, "vocoder", None)}
        given = {name: model for name, model in models.items() if model is not None}
        self.placed = Placed(given, torch.device(device), cast(Placement, placement))
        return self

    def release(self) -> None:
        """As `Generator.release`."""
        if self.placed is not None:
            self.placed.release()

    def save_memory(self, savers: Collection[str]) -> None:
        """As `Generator.save_memory`."""
        save_memory(savers, vae=self.vae, denoiser=self.unet)

    @property
    def device(self) -> torch.device:
        """Where the UNet works."""
        return self.unet.device if self.placed is None else self.placed.device

    @torch.inference_mode()
    def generate(
        self,
        condition: Condition,
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: StepCallback | None = None,
        **options: Any,
    ) -> list[Any]:
        """B conditions and B seeds -> B media values.

        Args:
            condition: matches `condition_spec`.
            seeds: one a sample, of its initial noise.
            steps: denoising steps.
            guidance_scale: 1 or less switches guidance off, and halves the work.
            on_step: called with (steps done, steps in all).
            **options: the modality's own, those of `sampling`.

        Raises:
            ConfigError: the condition or an option does not fit, or the seeds are not one a sample.
        """
        made = self.generate_stepwise(condition, seeds=seeds, steps=steps, guidance_scale=guidance_scale, **options)
        return drained(made, on_step)

    @torch.inference_mode()
    def generate_stepwise(
        self,
        condition: Condition,
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> Steps[list[Any]]:
        """As `generate`, step by step, in the thread of whoever asks for the next one."""
        latents = yield from self.sampling(condition, seeds, steps, guidance_scale, **options)
        return self.media(latents, **options)

    @torch.inference_mode()
    def sample(
        self,
        condition: Condition,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: StepCallback | None = None,
        **options: Any,
    ) -> Tensor:
        """As `generate`, but returns the latents, float[B, c, ...]."""
        return drained(self.sampling(condition, seeds, steps, guidance_scale, **options), on_step)

    @abstractmethod
    def sampling(self, *args: Any, **options: Any) -> Steps[Tensor]:
        """The loop that `sample` drains: (condition, seeds, steps, guidance_scale) and the modality's options."""

    @abstractmethod
    def media(self, latents: Tensor, **options: Any) -> list[Any]:
        """Latents float[B, c, ...] -> B media values; options as those of `sampling`."""

    def guided_sampling(
        self,
        predictor: Callable[[bool], Predictor],
        noise: Callable[[], Tensor],
        samples: int,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Steps[Tensor]:
        """The sampling loop, step by step; returns float[B, c, ...].

        Args:
            predictor: told whether the batch is guided, and then doubled with the unconditional half first, gives the
                function that predicts for it.
            noise: draws float[B, c, ...] of unit variance; called once all else is known to fit.
            samples: B, the conditions.
            seeds: those that `noise` draws from, to be counted.
            steps: denoising steps.
            guidance_scale: 1 or less switches guidance off, and halves the work.

        Raises:
            ConfigError: there are no steps, or the seeds are not one a sample.
        """
        if len(seeds) != samples:
            raise ConfigError(f"{samples} conditions need {samples} seeds, got {len(seeds)}")
        steps = int(self.defaults.steps) if steps is None else steps
        guidance = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        if steps < 1:
            raise ConfigError(f"steps must be at least 1, got {steps}")
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        latents = noise() * scheduler.init_noise_sigma
        (begin, end), count = self.defaults.guidance_interval, len(scheduler.timesteps)
        guides = [guidance > 1 and begin <= step / count < end for step in range(count)]
        predictors = {guided: predictor(guided) for guided in set(guides)}
        for step, (time, guided) in enumerate(zip(scheduler.timesteps, guides, strict=True)):
            given = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, time)
            predicted = predictors[guided](given, time)
            if guided:
                without, with_text = predicted.chunk(2)
                predicted = without + guidance * (with_text - without)
            latents = scheduler.step(predicted, time, latents, return_dict=False)[0]
            yield step + 1, steps
        return latents

    def prediction_loss(self, predict: Predictor, latents: Tensor, generator: torch.Generator | None) -> Tensor:
        """Mean squared error of predictions for float[B, c, ...] at random times, weighted if `min_snr` is set.

        Args:
            predict: the UNet with its conditions, into which gradients flow.
            latents: scaled as the UNet wants them.
            generator: for the noise and the times.
        """
        noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        last = self.scheduler.config.num_train_timesteps
        times = torch.randint(last, (len(latents),), generator=generator, device=latents.device)
        predicted = predict(self.add_noise(latents, noise, times), times)
        errors = F.mse_loss(predicted.float(), self.target(latents, noise, times).float(), reduction="none")
        if self.min_snr is None:
            return errors.mean()
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        weights = snr_weights(self.scheduler.alphas_cumprod, times, self.min_snr, kind)
        return (errors.flatten(1).mean(1) * weights).mean()

    def encode(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What the VAE reads, float[B, C, H, W] -> a sample of its latents, scaled: float[B, c, h, w]."""
        with torch.no_grad():
            posterior = self.vae.encode(values.to(self.device, self.vae.dtype)).latent_dist
            return posterior.sample(generator) * self.vae.config.scaling_factor

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The forward process at integer `times`: float[B, c, ...]."""
        signal, sigma = self._signal_and_noise(times, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the UNet is trained to predict there: the noise, or the velocity (Salimans & Ho, arXiv:2202.00512)."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            signal, sigma = self._signal_and_noise(times, latents)
            return signal * noise - sigma * latents
        raise ConfigError(f"prediction type '{kind}' has no training target here; known: epsilon, v_prediction")

    def _signal_and_noise(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.scheduler.alphas_cumprod.to(like.device)[times].to(like.dtype)
        kept = kept.view(-1, *[1] * (like.ndim - 1))
        return kept.sqrt(), (1 - kept).sqrt()

    def _noise(self, seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """float[B, *shape], each sample from its own generator; drawn on the CPU, the same on every device."""
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(self.device, self.unet.dtype)
