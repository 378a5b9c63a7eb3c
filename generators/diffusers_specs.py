"""Pipelines of diffusers that are declared: what each is conditioned on, and its published defaults.

| name | pipeline | conditions of the published weights |
|---|---|---|
| `diffusers/stable_diffusion` | Stable Diffusion 1.5 and 2 | prompt 77×768 and 77×1024 |
| `diffusers/sdxl` | Stable Diffusion XL | prompt 77×2048, pooled 1280 |
| `diffusers/sd3` | Stable Diffusion 3 and 3.5 | prompt 333×4096, pooled 2048 |
| `diffusers/flux` | FLUX.1 | prompt 512×4096, pooled 768 |
| `diffusers/wan` | Wan 2.1 and 2.2, text to video | prompt 512×4096, zeros behind the text |
| `diffusers/ltx` | LTX-Video | prompt 128×4096 with a mask |
| `diffusers/audioldm` | AudioLDM | pooled CLAP 512 |
| `diffusers/stable_audio` | Stable Audio Open | T5 states 128×768 with a mask |

Source: the defaults are those of each pipeline's documentation in diffusers 0.42.
Shapes: B batch, L condition tokens, C condition width, c latent channels, h w latent sides.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anygen.generators.diffusers_pipeline import ConditionTensor, DiffusersGenerator, PipelineDefaults, PipelineSpec

EMBEDS, POOLED = "prompt_embeds", "pooled_prompt_embeds"
_NEGATIVE = "negative_prompt_embeds"
_NEGATIVE_POOLED = "negative_pooled_prompt_embeds"


def _unet(pipeline: Any, noisy: Tensor, times: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    return pipeline.unet(noisy, times, encoder_hidden_states=condition[EMBEDS]).sample


def _sdxl(pipeline: Any, noisy: Tensor, times: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    height, width = (side * pipeline.vae_scale_factor for side in noisy.shape[-2:])
    # the original size, the corner of the crop, the target size: a whole picture of its own size
    sizes = torch.tensor([[height, width, 0, 0, height, width]], device=noisy.device).expand(len(noisy), -1)
    added = {"text_embeds": condition[POOLED], "time_ids": sizes.to(noisy.dtype)}
    return pipeline.unet(noisy, times, encoder_hidden_states=condition[EMBEDS], added_cond_kwargs=added).sample


def _sd3(pipeline: Any, noisy: Tensor, times: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    return pipeline.transformer(
        hidden_states=noisy,
        timestep=times,
        encoder_hidden_states=condition[EMBEDS],
        pooled_projections=condition[POOLED],
    ).sample


class DiffusersStableDiffusion(DiffusersGenerator):
    """Stable Diffusion 1.5 and 2. `stable_diffusion` is the same without the pipeline, and trains as well."""

    spec = PipelineSpec(
        pipeline="StableDiffusionPipeline",
        modality="image",
        condition=(ConditionTensor(name=EMBEDS, output=0, negative=_NEGATIVE),),
        defaults=PipelineDefaults(steps=50, guidance_scale=7.5),
        without=("safety_checker", "feature_extractor", "image_encoder"),
        predict=_unet,
    )


class DiffusersSDXL(DiffusersGenerator):
    """Stable Diffusion XL: two text encoders side by side, and the second one's pooled vector."""

    spec = PipelineSpec(
        pipeline="StableDiffusionXLPipeline",
        modality="image",
        condition=(
            ConditionTensor(name=EMBEDS, output=0, negative=_NEGATIVE, negative_output=1),
            ConditionTensor(name=POOLED, output=2, negative=_NEGATIVE_POOLED, negative_output=3),
        ),
        defaults=PipelineDefaults(steps=50, guidance_scale=5.0),
        text_parts=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        without=("feature_extractor", "image_encoder"),
        predict=_sdxl,
    )


class DiffusersSD3(DiffusersGenerator):
    """Stable Diffusion 3 and 3.5, a rectified flow: CLIP's states, then T5's, and two pooled vectors."""

    spec = PipelineSpec(
        pipeline="StableDiffusion3Pipeline",
        modality="image",
        condition=(
            ConditionTensor(name=EMBEDS, output=0, negative=_NEGATIVE, negative_output=1),
            ConditionTensor(name=POOLED, output=2, negative=_NEGATIVE_POOLED, negative_output=3),
        ),
        defaults=PipelineDefaults(steps=28, guidance_scale=7.0, max_sequence_length=256),
        text_parts=tuple(f"{part}{number}" for number in ("", "_2", "_3") for part in ("text_encoder", "tokenizer")),
        without=("feature_extractor", "image_encoder"),
        predict=_sd3,
    )


class DiffusersFlux(DiffusersGenerator):
    """FLUX.1, a rectified flow that is told the guidance's weight: no unconditional half is computed."""

    spec = PipelineSpec(
        pipeline="FluxPipeline",
        modality="image",
        condition=(ConditionTensor(name=EMBEDS, output=0), ConditionTensor(name=POOLED, output=1)),
        defaults=PipelineDefaults(steps=28, guidance_scale=3.5, max_sequence_length=512),
        text_parts=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        without=("feature_extractor", "image_encoder"),
    )


class DiffusersWan(DiffusersGenerator):
    """Wan 2.1 and 2.2, text to video. Its encoder leaves zeros behind the text, and no part of it asks for a mask."""

    spec = PipelineSpec(
        pipeline="WanPipeline",
        modality="video",
        condition=(ConditionTensor(name=EMBEDS, output=0, negative=_NEGATIVE),),
        defaults=PipelineDefaults(
            steps=50, guidance_scale=5.0, height=480, width=832, frames=81, fps=16.0, max_sequence_length=512
        ),
        length="num_frames",
        frame_step=4,
    )


class DiffusersLTX(DiffusersGenerator):
    """LTX-Video. Its transformer is told which rows are text."""

    spec = PipelineSpec(
        pipeline="LTXPipeline",
        modality="video",
        condition=(
            ConditionTensor(
                name=EMBEDS,
                output=0,
                mask="prompt_attention_mask",
                mask_output=1,
                negative=_NEGATIVE,
                negative_mask="negative_prompt_attention_mask",
            ),
        ),
        defaults=PipelineDefaults(
            steps=50, guidance_scale=3.0, height=512, width=704, frames=161, fps=25.0, max_sequence_length=128
        ),
        length="num_frames",
        frame_step=8,
        frame_rate="frame_rate",
    )


class DiffusersAudioLDM(DiffusersGenerator):
    """AudioLDM: one normalised vector of CLAP a caption."""

    spec = PipelineSpec(
        pipeline="AudioLDMPipeline",
        modality="audio",
        condition=(ConditionTensor(name=EMBEDS, output=0, negative=_NEGATIVE),),
        defaults=PipelineDefaults(steps=10, guidance_scale=2.5, seconds=5.12),
        encoder="_encode_prompt",
        dtype_of="text_encoder",
        length="audio_length_in_s",
    )


def _t5_states(pipeline: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    """What Stable Audio takes as `prompt_embeds`, float[B, L, C], and the mask; its own encoder projects them first."""
    words = pipeline.tokenizer(
        captions,
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).to(pipeline.device)
    return pipeline.text_encoder(words.input_ids, attention_mask=words.attention_mask)[0], words.attention_mask


class DiffusersStableAudio(DiffusersGenerator):
    """Stable Audio Open, stereo. Guidance goes away from zeros, which the pipeline makes itself."""

    spec = PipelineSpec(
        pipeline="StableAudioPipeline",
        modality="audio",
        condition=(ConditionTensor(name=EMBEDS, output=0, mask="attention_mask", mask_output=1),),
        defaults=PipelineDefaults(steps=100, guidance_scale=7.0, seconds=10.0),
        encoder=_t5_states,
        length="audio_end_in_s",
    )
