"""Pipelines of diffusers with real classes and random weights, small enough for a test."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

CAPTIONS = ["a red apple", "two dogs", "rain on a tin roof and a dog"]
Make = Callable[[str], Any]


@pytest.fixture(scope="session")
def tiny_pipeline() -> Make:
    """Makes a pipeline of a declared generator, by its name after `diffusers/`; complete, in evaluation mode.

    `stable_diffusion_2` is the second version of `stable_diffusion`.
    """
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "stable_diffusion": _stable_diffusion,
        "stable_diffusion_2": _stable_diffusion_2,
        "sdxl": _sdxl,
        "sd3": _sd3,
        "flux": _flux,
        "wan": _wan,
        "ltx": _ltx,
        "audioldm": _audioldm,
        "stable_audio": _stable_audio,
    }

    def make(name: str) -> Any:
        from anygen.registry import lookup

        torch.manual_seed(0)
        spec = lookup("generator", f"diffusers/{name.removesuffix('_2')}").spec
        parts = makers[name]()
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
                for parameter in part.parameters():
                    if parameter.ndim > 1 and not parameter.any():  # gates, which would hide what lies behind them
                        torch.nn.init.normal_(parameter, std=0.2)
        pipeline = spec.pipeline_class()(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


def _tokenizer(context: int = 10) -> Any:
    from anygen.training.tokenizer import train_tokenizer

    return train_tokenizer(CAPTIONS, vocab_size=300, context=context)


def _clip(tokenizer: Any, *, projection: int | None = None, width: int = 16) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=10,
        projection_dim=projection or 16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def _t5(tokenizer: Any, width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    pad = tokenizer.pad_token_id
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=pad
    )
    return T5EncoderModel(config)


def _autoencoder(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    settings: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
        "scaling_factor": 0.7,
    }
    return AutoencoderKL(**settings | changes)


def _unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**settings | changes)


def _ddim(**changes: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, **changes)


def _flow(**changes: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**changes)


def _stable_diffusion() -> dict[str, Any]:
    tokenizer = _tokenizer()
    absent = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    return {
        "vae": _autoencoder(),
        "unet": _unet(),
        "scheduler": _ddim(),
        "text_encoder": _clip(tokenizer),
        "tokenizer": tokenizer,
        "requires_safety_checker": False,
    } | absent


def _stable_diffusion_2() -> dict[str, Any]:
    """A wider text encoder, and velocity."""
    parts = _stable_diffusion()
    return parts | {
        "unet": _unet(cross_attention_dim=24, use_linear_projection=True),
        "text_encoder": _clip(parts["tokenizer"], width=24),
        "scheduler": _ddim(prediction_type="v_prediction"),
    }


def _sdxl() -> dict[str, Any]:
    tokenizer = _tokenizer()
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    }
    return {
        "vae": _autoencoder(),
        "unet": _unet(cross_attention_dim=32, **added),
        "scheduler": _ddim(),
        "text_encoder": _clip(tokenizer),
        "text_encoder_2": _clip(tokenizer, projection=16),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
    }


def _sd3() -> dict[str, Any]:
    from diffusers import SD3Transformer2DModel

    tokenizer = _tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
    )
    return {
        "vae": _autoencoder(shift_factor=0.06),
        "transformer": transformer,
        "scheduler": _flow(shift=3.0),
        "text_encoder": _clip(tokenizer, projection=16),
        "text_encoder_2": _clip(tokenizer, projection=16),
        "text_encoder_3": _t5(tokenizer),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "tokenizer_3": tokenizer,
    }


def _flux() -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel

    tokenizer = _tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return {
        "vae": _autoencoder(shift_factor=0.06),
        "transformer": transformer,
        "scheduler": _flow(),
        "text_encoder": _clip(tokenizer),
        "text_encoder_2": _t5(tokenizer),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
    }


def _wan() -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    tokenizer = _tokenizer()
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return {
        "vae": AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        "transformer": transformer,
        "scheduler": _flow(shift=3.0),
        "text_encoder": _t5(tokenizer),
        "tokenizer": tokenizer,
    }


def _ltx() -> dict[str, Any]:
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

    tokenizer = _tokenizer()
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=32,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        patch_size_t=1,
    )
    return {
        "vae": vae,
        "transformer": transformer,
        "scheduler": _flow(),
        "text_encoder": _t5(tokenizer),
        "tokenizer": tokenizer,
    }


def _audioldm() -> dict[str, Any]:
    from transformers import ClapTextConfig, ClapTextModelWithProjection, SpeechT5HifiGan, SpeechT5HifiGanConfig

    tokenizer = _tokenizer()
    text = ClapTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=40,
        projection_dim=12,
    )
    unet = _unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=12,
        class_embeddings_concat=True,
    )
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=8,
            sampling_rate=16000,
            upsample_initial_channel=8,
            upsample_rates=[20, 8],
            upsample_kernel_sizes=[40, 16],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            initializer_range=0.3,
            normalize_before=False,
        )
    )
    return {
        "vae": _autoencoder(in_channels=1, out_channels=1),
        "unet": unet,
        "scheduler": _ddim(),
        "vocoder": vocoder,
        "text_encoder": ClapTextModelWithProjection(text),
        "tokenizer": tokenizer,
    }


def _stable_audio() -> dict[str, Any]:
    from diffusers import AutoencoderOobleck, EDMDPMSolverMultistepScheduler, StableAudioDiTModel
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    tokenizer = _tokenizer()
    transformer = StableAudioDiTModel(
        sample_size=400,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=8000,
    )
    return {
        "vae": vae,
        "transformer": transformer,
        "scheduler": EDMDPMSolverMultistepScheduler(
            prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
        "projection_model": StableAudioProjectionModel(
            text_encoder_dim=8, conditioning_dim=4, min_value=0, max_value=9
        ),
        "text_encoder": _t5(tokenizer, 8),
        "tokenizer": tokenizer,
    }
