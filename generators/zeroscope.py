"""Zeroscope (ModelScope's text-to-video) from diffusers' components, conditioned on prompt embeddings.

Source: Wang et al. 2023 (arXiv:2308.06571), whose UNet adds temporal convolutions and attention to Stable Diffusion's.
The sampling loop equals `TextToVideoSDPipeline` given `prompt_embeds` and `negative_prompt_embeds`, and does not need
that class, which diffusers keeps as deprecated (tests/generators/test_zeroscope.py holds it to that).
Differs: frames are decoded a few at a time, which bounds the memory and changes nothing, as the VAE sees each frame
alone. The UNet may hold an image UNet's layers and leave temporal ones out (`anygen.generators.clip_unet`). What
differs besides stands in `anygen.generators.latent`.

Shapes: B batch, F frames, L condition tokens, C condition width, c latent channels, h w latent sides, H W frame sides.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from anygen.errors import ConfigError
from anygen.features import Condition
from anygen.generators.clip_unet import has_own_layout, load_clip_unet, save_temporal, whole
from anygen.generators.latent import LatentDiffusionGenerator, SamplingDefaults, TextConditioner, save_part
from anygen.stepwise import Steps

__all__ = ["ClipDefaults", "TextConditioner", "ZeroscopeGenerator"]

FRAMES_AT_ONCE = 8
"""Frames decoded together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipDefaults(SamplingDefaults):
    """What `generate` uses where its caller says nothing; stored as `sampling.json`."""

    guidance_scale: float = 9.0
    """Weight of the conditional direction; 1 switches guidance off."""
    frames: int = 16
    """Length of a clip."""
    fps: float = 8.0
    """Frames a second that the UNet learned motion at."""

    def __post_init__(self) -> None:
        SamplingDefaults.__post_init__(self)
        if self.frames < 1 or not self.fps > 0:
            raise ConfigError(f"a clip has at least 1 frame and a positive fps, not {self.frames} and {self.fps:g}")


class ZeroscopeGenerator(LatentDiffusionGenerator):
    """A latent-diffusion video generator: an `AutoencoderKL` for the frames and a `UNet3DConditionModel`."""

    modality: ClassVar[str] = "video"
    folder_name: ClassVar[str] = "Zeroscope"
    unet_class: ClassVar[str] = "UNet3DConditionModel"
    pipeline_index: ClassVar[Mapping[str, Any]] = {"_class_name": "TextToVideoSDPipeline"}
    defaults_class: ClassVar[type[SamplingDefaults]] = ClipDefaults
    defaults: ClipDefaults

    @classmethod
    def load_unet(cls, directory: Path, dtype: torch.dtype, spatial: Path | None) -> Any:
        """The UNet: diffusers' as it stands, or one composed of an image UNet and temporal layers.

        Raises:
            CheckpointError: a weight is missing, left over or of another shape.
        """
        config = directory / "config.json"
        if spatial is None and not (config.exists() and has_own_layout(json.loads(config.read_text(encoding="utf-8")))):
            return super().load_unet(directory, dtype, spatial)
        return load_clip_unet(directory, dtype, spatial)

    def save_unet(self, directory: Path, *, spatial: bool) -> None:
        """Writes the UNet with all layers that diffusers' class has, or, without `spatial`, its temporal ones alone."""
        if spatial:
            save_part(whole(self.unet) if has_own_layout(self.unet.config) else self.unet, directory)
        else:
            save_temporal(self.unet, directory)

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
        frames: int | None = None,
        seconds: float | None = None,
    ) -> Steps[Tensor]:
        """`prompt_embeds` float[B, L, C] and B seeds -> latents float[B, c, F, h, w], step by step.

        Args: as of `generate`, and `height` and `width` in pixels; `frames`, or `seconds`, which is rounded to whole
        frames.
        """
        if frames is not None and seconds is not None:
            raise ConfigError("the length of a clip is told in frames or in seconds, not in both")
        if seconds is not None:
            frames = max(1, round(seconds * self.defaults.fps))
        count = self.defaults.frames if frames is None else frames
        if count < 1:
            raise ConfigError(f"a clip has at least 1 frame, got {count}")

        def noise() -> Tensor:
            return self._noise(seeds, (self.unet.config.in_channels, count, *self._latent_sides(height, width)))

        return (yield from self.denoise(condition, noise, seeds, steps, guidance_scale))

    def media(self, latents: Tensor, **options: Any) -> list[Any]:
        """Latents float[B, c, F, h, w] -> B videos."""
        from anygen.media import Video

        # A clip at a time, as bytes: the pixels of many clips in float32 would outweigh the UNet.
        clips = [(self.decode(clip[None])[0] * 255).round().to(torch.uint8) for clip in latents]
        return [Video(clip.permute(0, 2, 3, 1).cpu().numpy(), self.defaults.fps) for clip in clips]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents float[B, c, F, h, w] -> pixels float[B, F, 3, H, W] in [0, 1]."""
        frames = (latents.to(self.vae.dtype) / self.vae.config.scaling_factor).transpose(1, 2)  # [B, F, c, h, w]
        parts = frames.flatten(0, 1).split(FRAMES_AT_ONCE)
        pixels = torch.cat([self.vae.decode(part, return_dict=False)[0].float() for part in parts])  # [B * F, 3, H, W]
        return (pixels / 2 + 0.5).clamp(0, 1).unflatten(0, frames.shape[:2])

    def denoising_loss(self, condition: Condition, media: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the UNet's prediction at random times.

        Args:
            condition: matches `condition_spec`; gradients flow into it, and nowhere else if the parts are frozen.
            media: pixels float[B, F, 3, H, W] in [-1, 1], or a list of B videos of one length and size.
            generator: for the posterior sample, the times and the noise.

        Raises:
            ConfigError: the videos differ in length or size.
        """
        if not isinstance(media, Tensor):
            if len(shapes := {clip.frames.shape for clip in media}) > 1:
                raise ConfigError(f"the videos of a batch are of one shape, got {sorted(shapes)}")
            clips = [torch.tensor(clip.frames).permute(0, 3, 1, 2) for clip in media]  # uint8[F, 3, H, W]
            media = torch.stack(clips).float() / 127.5 - 1
        latents = self.encode(media.flatten(0, 1), generator).unflatten(0, media.shape[:2])  # [B, F, c, h, w]
        return self.latent_loss(condition, latents.transpose(1, 2).contiguous(), generator)
