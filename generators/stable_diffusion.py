"""Stable Diffusion from diffusers' components, conditioned on prompt embeddings.

Source: Rombach et al. 2022 (arXiv:2112.10752). The sampling loop equals `StableDiffusionPipeline` given `prompt_embeds`
and `negative_prompt_embeds` (tests/generators/test_stable_diffusion.py holds it to that). What differs stands in
`anygen.generators.latent`.

Shapes: B batch, L condition tokens, C condition width, c latent channels, h w latent sides, H W picture sides.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from anygen.features import Condition
from anygen.generators.latent import EMBEDS, LatentDiffusionGenerator, SamplingDefaults, TextConditioner, to_uint8
from anygen.stepwise import Steps

__all__ = ["EMBEDS", "SamplingDefaults", "StableDiffusionGenerator", "TextConditioner", "to_uint8"]


class StableDiffusionGenerator(LatentDiffusionGenerator):
    """A latent-diffusion image generator: an `AutoencoderKL` and a `UNet2DConditionModel`."""

    modality: ClassVar[str] = "image"
    folder_name: ClassVar[str] = "Stable Diffusion"
    unet_class: ClassVar[str] = "UNet2DConditionModel"
    pipeline_index: ClassVar[Mapping[str, Any]] = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }

    @torch.inference_mode()
    def sampling(
        self,
        condition: Condition,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> Steps[Tensor]:
        """`prompt_embeds` float[B, L, C] and B seeds -> latents float[B, c, h, w], step by step.

        Args: as of `generate`, and `height` and `width` in pixels.
        """

        def noise() -> Tensor:
            return self._noise(seeds, (self.unet.config.in_channels, *self._latent_sides(height, width)))

        return (yield from self.denoise(condition, noise, seeds, steps, guidance_scale))

    def media(self, latents: Tensor, **options: Any) -> list[Any]:
        """Latents float[B, c, h, w] -> B images."""
        from anygen.media import Image

        return [Image.from_any(picture) for picture in to_uint8(self.decode(latents))]

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
        return self.latent_loss(condition, self.encode(media, generator), generator)
