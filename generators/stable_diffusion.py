"""Stable Diffusion from diffusers' components, conditioned on prompt embeddings.

Source: Rombach et al. 2022 (arXiv:2112.10752); classifier-free guidance, Ho & Salimans 2022 (arXiv:2207.12598). The
sampling loop equals `StableDiffusionPipeline` given `prompt_embeds` and `negative_prompt_embeds`
(tests/generators/test_stable_diffusion.py holds it to that).
Differs: each sample's noise is drawn from its own seed, so that a picture does not depend on its batch; and the empty
caption's condition is stored beside the weights, so that generating needs no text encoder in memory.

Shapes: B batch, L condition tokens, C condition width, c latent channels, h w latent sides, H W picture sides.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.component import SHARD
from anygen.config import Config
from anygen.errors import CheckpointError, ConfigError
from anygen.features import Condition, ConditionSpec
from anygen.generators.base import Generator, StepCallback
from anygen.progress import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDS = "prompt_embeds"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults(Config):
    """What `generate` uses where its caller says nothing; stored as `sampling.json`."""

    steps: int = 20
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Weight of the conditional direction; 1 switches guidance off."""


class TextConditioner:
    """Captions -> prompt embeddings: the last hidden states of a CLIP text encoder, padded to its full context."""

    def __init__(self, encoder: Any, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Joins a `CLIPTextModel` and its tokenizer."""
        self.encoder, self.tokenizer = encoder, tokenizer

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """B captions -> int64[B, L], cut or padded to the encoder's context."""
        return self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.encoder.config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def __call__(self, ids: Tensor) -> Tensor:
        """int64[B, L] -> float[B, L, C]. As in Stable Diffusion, padding is attended to."""
        return self.encoder(input_ids=ids).last_hidden_state


class StableDiffusionGenerator(Generator):
    """A latent-diffusion image generator: VAE, UNet, noise schedule, and on demand the text encoder."""

    modality: ClassVar[str] = "image"

    def __init__(
        self,
        *,
        vae: Any,
        unet: Any,
        scheduler: Any,
        unconditional: Tensor,
        text: TextConditioner | Callable[[], TextConditioner],
        defaults: SamplingDefaults | None = None,
    ) -> None:
        """Joins loaded parts.

        Args:
            vae: an `AutoencoderKL`; maps pictures in [-1, 1] to latents and back.
            unet: a `UNet2DConditionModel`; predicts noise or velocity from (latents, time, prompt embeddings).
            scheduler: any diffusers scheduler; `generate` copies it, so that calls do not share state.
            unconditional: float[L, C], the empty caption's prompt embeddings.
            text: the text encoder, or a function that loads it when `encode_text` is first called.
            defaults: steps and guidance where a call states none.
        """
        self.vae, self.unet, self.scheduler = vae.eval(), unet.eval(), scheduler
        self.unconditional, self._text = unconditional, text
        self.defaults = defaults or SamplingDefaults()
        self.condition_spec = ConditionSpec(shapes={EMBEDS: tuple(unconditional.shape)})

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Reads a diffusers folder; `unconditional.safetensors` and `sampling.json` are ours and optional.

        Raises:
            CheckpointError: a part is missing or damaged.
        """
        from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
        from safetensors.torch import load_file

        directory = Path(directory)
        for part in ("vae", "unet", "scheduler"):
            if not (directory / part).is_dir():
                raise CheckpointError(f"{directory} is not a Stable Diffusion folder: it has no '{part}'")
        try:
            vae: Any = AutoencoderKL.from_pretrained(directory, subfolder="vae", torch_dtype=dtype)
            unet: Any = UNet2DConditionModel.from_pretrained(directory, subfolder="unet", torch_dtype=dtype)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory}: {error}") from error
        scheduler = DPMSolverMultistepScheduler.from_pretrained(directory, subfolder="scheduler")

        def load_text() -> TextConditioner:
            from transformers import AutoTokenizer, CLIPTextModel

            with quiet_libraries():
                encoder: Any = CLIPTextModel.from_pretrained(directory / "text_encoder", dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
            return TextConditioner(encoder.to(unet.device).eval(), tokenizer)

        text: TextConditioner | Callable[[], TextConditioner] = load_text
        if (stored := directory / "unconditional.safetensors").exists():
            unconditional = load_file(stored)[EMBEDS].to(dtype)
        else:
            text = load_text()
            with torch.no_grad():
                unconditional = text(text.tokenize([""]))[0]
        defaults = directory / "sampling.json"
        return cls(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            unconditional=unconditional,
            text=text,
            defaults=SamplingDefaults.load(defaults) if defaults.exists() else None,
        ).to(device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a folder that `StableDiffusionPipeline.from_pretrained` reads as well."""
        from safetensors.torch import save_file

        directory = Path(directory)
        self.vae.save_pretrained(directory / "vae", max_shard_size=SHARD)
        self.unet.save_pretrained(directory / "unet", max_shard_size=SHARD)
        self.scheduler.save_pretrained(directory / "scheduler")
        self.text.encoder.save_pretrained(directory / "text_encoder", max_shard_size=SHARD)
        self.text.tokenizer.save_pretrained(directory / "tokenizer")
        save_file({EMBEDS: self.unconditional.contiguous().cpu()}, directory / "unconditional.safetensors")
        self.defaults.save(directory / "sampling.json")
        for part in ("vae", "unet"):  # diffusers notes the directory that a part was loaded from
            config = directory / part / "config.json"
            known = json.loads(config.read_text(encoding="utf-8"))
            known.pop("_name_or_path", None)
            config.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        index = {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", type(self.scheduler).__name__],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", type(self.text.tokenizer).__name__],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @property
    def text(self) -> TextConditioner:
        """The text encoder, loaded on first use."""
        if not isinstance(self._text, TextConditioner):
            self._text = self._text()
        return self._text

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.device

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of a picture of the UNet's own latent size."""
        side, factor = self.unet.config.sample_size, 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = (side, side) if isinstance(side, int) else side
        return height * factor, width * factor

    def to(self, device: torch.device | str) -> Self:
        """Moves every loaded part."""
        self.vae.to(device)
        self.unet.to(device)
        self.unconditional = self.unconditional.to(device)
        if isinstance(self._text, TextConditioner):
            self._text.encoder.to(device)
        return self

    @torch.no_grad()  # not inference_mode: its tensors are targets of training
    def encode_text(self, captions: Sequence[str]) -> Condition:
        """B captions -> `prompt_embeds` float[B, L, C]."""
        ids = self.text.tokenize(captions).to(self.text.encoder.device)
        return Condition({EMBEDS: self.text(ids)})

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
        """`prompt_embeds` float[B, L, C] and B seeds -> B images.

        Args:
            condition: matches `condition_spec`.
            seeds: one a sample, of its initial noise.
            steps: denoising steps.
            guidance_scale: 1 or less switches guidance off, and halves the work.
            on_step: called with (steps done, steps in all).
            **options: `height` and `width` in pixels.

        Raises:
            ConfigError: the condition does not fit, or the seeds are not one a sample.
        """
        from anygen.media import Image

        pixels = self.decode(self.sample(condition, seeds, steps, guidance_scale, on_step, **options))
        return [Image.from_any(picture) for picture in to_uint8(pixels)]

    @torch.inference_mode()
    def sample(
        self,
        condition: Condition,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: StepCallback | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """As `generate`, but returns the latents, float[B, c, h, w]."""
        embeds = self.condition_spec.check(condition).tensors[EMBEDS].to(self.device, self.unet.dtype)
        if len(seeds) != len(embeds):
            raise ConfigError(f"{len(embeds)} conditions need {len(embeds)} seeds, got {len(seeds)}")
        steps = self.defaults.steps if steps is None else steps
        guidance = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        if steps < 1:
            raise ConfigError(f"steps must be at least 1, got {steps}")
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        latents = self._noise(seeds, height, width) * scheduler.init_noise_sigma
        if guided := guidance > 1:
            embeds = torch.cat([self.unconditional.to(embeds).expand_as(embeds), embeds])
        for step, time in enumerate(scheduler.timesteps):
            model_input = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, time)
            predicted = self.unet(model_input, time, encoder_hidden_states=embeds, return_dict=False)[0]
            if guided:
                without, with_text = predicted.chunk(2)
                predicted = without + guidance * (with_text - without)
            latents = scheduler.step(predicted, time, latents, return_dict=False)[0]
            if on_step is not None:
                on_step(step + 1, steps)
        return latents

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents float[B, c, h, w] -> pixels float[B, 3, H, W] in [0, 1]."""
        pixels = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def denoising_loss(self, condition: Condition, media: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the UNet's prediction at random times.

        Args:
            condition: matches `condition_spec`; gradients flow into it, and nowhere else if the parts are frozen.
            media: pixels float[B, 3, H, W] in [-1, 1], or a list of B images.
            generator: for the posterior sample, the times and the noise.
        """
        if not isinstance(media, Tensor):
            arrays = [torch.from_numpy(image.array).permute(2, 0, 1) for image in media]  # uint8[3, H, W]
            media = torch.stack(arrays).float() / 127.5 - 1
        with torch.no_grad():
            posterior = self.vae.encode(media.to(self.device, self.vae.dtype)).latent_dist
            latents = posterior.sample(generator) * self.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        last = self.scheduler.config.num_train_timesteps
        times = torch.randint(last, (len(latents),), generator=generator, device=latents.device)
        embeds = self.condition_spec.check(condition).tensors[EMBEDS].to(self.device, self.unet.dtype)
        predicted = self.unet(self.add_noise(latents, noise, times), times, encoder_hidden_states=embeds).sample
        return F.mse_loss(predicted.float(), self.target(latents, noise, times).float())

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The forward process at integer `times`: float[B, c, h, w]."""
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
        kept = self.scheduler.alphas_cumprod.to(like.device)[times].to(like.dtype)[:, None, None, None]
        return kept.sqrt(), (1 - kept).sqrt()

    def _noise(self, seeds: Sequence[int], height: int | None, width: int | None) -> Tensor:
        """float[B, c, h, w], each sample from its own generator; drawn on the CPU, the same on every device."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        sides = (height or self.size[0], width or self.size[1])
        if any(side % factor or side < factor for side in sides):
            raise ConfigError(f"height and width must be multiples of {factor} pixels, got {sides[0]} and {sides[1]}")
        shape = (self.unet.config.in_channels, sides[0] // factor, sides[1] // factor)
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(self.device, self.unet.dtype)


def to_uint8(pixels: Tensor) -> list[Any]:
    """float[B, 3, H, W] in [0, 1] -> B arrays uint8[H, W, 3]."""
    return list((pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
