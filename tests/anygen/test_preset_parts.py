"""The facts of published parts against models built from the published configurations, on the meta device.

A builder states what the part's own `config.json` says; what its class has as a default is left out.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.audioldm2 import modeling_audioldm2 as audioldm2
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

from anygen import preset_parts
from anygen.encoders.imagebind import ImageBindModel
from anygen.encoders.imagebind_config import ImageBindConfig
from anygen.preset_parts import PRECISIONS, EncoderPart, GeneratorPart, LanguageModel, Part
from anygen.registry import lookup

_DOWN = ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3)
_UP = (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D")


def _llama(**settings: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def _qwen() -> Any:
    settings = dict(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings))  # type: ignore[arg-type]


def _imagebind(trunk: str | None = None) -> Any:
    config = ImageBindConfig.huge()
    return ImageBindModel(config if trunk is None else config.only(trunk))


def _unet(**settings: Any) -> Any:
    return diffusers.UNet2DConditionModel(**settings)


def _audioldm_unet() -> Any:
    sides = (256, 512, 768, 1280)
    return _unet(
        in_channels=8,
        out_channels=8,
        block_out_channels=sides,
        cross_attention_dim=sides,
        down_block_types=_DOWN,
        up_block_types=_UP,
        class_embed_type="simple_projection",
        class_embeddings_concat=True,
        projection_class_embeddings_input_dim=512,
    )


def _audioldm2_unet() -> Any:
    cls: Any = diffusers.AudioLDM2UNet2DConditionModel
    return cls(
        in_channels=8,
        out_channels=8,
        block_out_channels=(128, 256, 384, 640),
        down_block_types=_DOWN,
        up_block_types=_UP,
        cross_attention_dim=((None, 768, 1024),) * 4,
    )


def _sdxl_unet() -> Any:
    return _unet(
        block_out_channels=(320, 640, 1280),
        down_block_types=_DOWN[:3],
        up_block_types=_UP[1:],
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _vae(blocks: tuple[int, ...] = (128, 256, 512, 512), **settings: Any) -> Any:
    cls: Any = diffusers.AutoencoderKL  # its annotations know tuples of one
    return cls(
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        layers_per_block=2,
        **settings,
    )


def _mel_vae() -> Any:
    return _vae((128, 256, 512), in_channels=1, out_channels=1, latent_channels=8)


def _vocoder() -> Any:
    return transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=64,
            upsample_initial_channel=1024,
            upsample_rates=[5, 4, 2, 2, 2],
            upsample_kernel_sizes=[16, 16, 8, 4, 4],
        )
    )


def _clip(width: int, layers: int, heads: int, *, projected: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return cls(config)


def _t5(width: int, inner: int, layers: int, heads: int, *, gated: bool = True, multilingual: bool = False) -> Any:
    settings = dict(
        vocab_size=256384 if multilingual else 32128,
        d_model=width,
        d_kv=64,
        d_ff=inner,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
    if multilingual:
        return transformers.UMT5EncoderModel(transformers.UMT5Config(**settings))  # type: ignore[arg-type]
    return transformers.T5EncoderModel(transformers.T5Config(**settings))  # type: ignore[arg-type]


def _clap() -> Any:
    audio = {"depths": [2, 2, 12, 2], "hidden_size": 1024, "patch_embeds_hidden_size": 128}
    return transformers.ClapModel(transformers.ClapConfig(audio_config=audio, projection_dim=512))


BUILDERS: dict[str, Callable[[], Any]] = {
    "vicuna": lambda: _llama(),
    "llama 3": lambda: _llama(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8),
    "qwen3": _qwen,
    "smollm3": lambda: transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config()),
    "imagebind": _imagebind,
    "imagebind vision": lambda: _imagebind("vision"),
    "imagebind audio": lambda: _imagebind("audio"),
    "sd 1.5 unet": lambda: _unet(cross_attention_dim=768),
    "sd 2 unet": lambda: _unet(
        cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    ),
    "sdxl unet": _sdxl_unet,
    "sd vae": _vae,
    "sd 3": lambda: diffusers.SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
    ),
    "sd 3 vae": lambda: _vae(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    "zeroscope unet": lambda: diffusers.UNet3DConditionModel(cross_attention_dim=1024),
    "wan": lambda: diffusers.WanTransformer3DModel(num_attention_heads=12, num_layers=30, ffn_dim=8960),
    "wan vae": lambda: diffusers.AutoencoderKLWan(),
    "audioldm unet": _audioldm_unet,
    "audioldm 2 unet": _audioldm2_unet,
    "mel vae": _mel_vae,
    "vocoder": _vocoder,
    "stable audio": lambda: diffusers.StableAudioDiTModel(),
    "stable audio vae": lambda: diffusers.AutoencoderOobleck(),
    "stable audio projection": lambda: StableAudioProjectionModel(768, 768, 0, 512),
    "clip l": lambda: _clip(768, 12, 12),
    "clip l projected": lambda: _clip(768, 12, 12, projected=True),
    "clip h": lambda: _clip(1024, 23, 16),
    "clip g": lambda: _clip(1280, 32, 20, projected=True),
    "t5 base": lambda: _t5(768, 3072, 12, 12, gated=False),
    "t5 large": lambda: _t5(1024, 2816, 24, 16),
    "t5 xxl": lambda: _t5(4096, 10240, 24, 64),
    "umt5 xxl": lambda: _t5(4096, 10240, 24, 64, multilingual=True),
    "clap": _clap,
    "clap text": lambda: transformers.ClapTextModelWithProjection(transformers.ClapTextConfig()),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
    "audioldm 2 projection": lambda: audioldm2.AudioLDM2ProjectionModel(512, 1024, 768),
}


@cache
def count(*names: str) -> int:
    """Parameters of some of these together."""
    with torch.device("meta"):
        return sum(parameter.numel() for name in names for parameter in BUILDERS[name]().parameters())


LLMS = {
    "VICUNA_7B_V0": "vicuna",
    "VICUNA_7B": "vicuna",
    "LLAMA_3_8B": "llama 3",
    "QWEN3_4B": "qwen3",
    "SMOLLM3_3B": "smollm3",
}
GENERATORS = {
    "STABLE_DIFFUSION_1_5": (("sd 1.5 unet", "sd vae"), ("clip l",)),
    "STABLE_DIFFUSION_2": (("sd 2 unet", "sd vae"), ("clip h",)),
    "STABLE_DIFFUSION_XL": (("sdxl unet", "sd vae"), ("clip l", "clip g")),
    "STABLE_DIFFUSION_3": (("sd 3", "sd 3 vae"), ("clip l projected", "clip g", "t5 xxl")),
    "ZEROSCOPE": (("zeroscope unet", "sd vae"), ("clip h",)),
    "WAN": (("wan", "wan vae"), ("umt5 xxl",)),
    "AUDIOLDM_L": (("audioldm unet", "mel vae", "vocoder"), ("clap text",)),
    "AUDIOLDM2": (
        ("audioldm 2 unet", "mel vae", "vocoder"),
        ("clap", "t5 large", "gpt2", "audioldm 2 projection"),
    ),
    "STABLE_AUDIO": (("stable audio", "stable audio vae", "stable audio projection"), ("t5 base",)),
}
"""Constant -> what stays to answer, and the text encoders."""


def parts(kind: type[Part]) -> dict[str, Any]:
    return {name: part for name, part in vars(preset_parts).items() if isinstance(part, kind)}


@pytest.mark.parametrize("name", LLMS)
def test_an_llm_has_the_sizes_of_its_configuration(name: str) -> None:
    part: LanguageModel = getattr(preset_parts, name)
    assert part.parameters == count(LLMS[name])
    with torch.device("meta"):
        model = BUILDERS[LLMS[name]]()
    assert (part.vocabulary, part.width) == tuple(model.get_input_embeddings().weight.shape)
    assert part.tied == model.config.tie_word_embeddings
    assert part.layers == model.config.num_hidden_layers
    assert part.key_width == model.model.layers[0].self_attn.k_proj.weight.shape[0]


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_has_the_sizes_of_its_configuration(name: str) -> None:
    part: GeneratorPart = getattr(preset_parts, name)
    stays, texts = GENERATORS[name]
    assert (part.parameters, part.text_parameters) == (count(*stays), count(*texts))
    assert part.published == count(*stays, *texts)


def test_imagebind_is_loaded_trunk_by_trunk() -> None:
    part = preset_parts.IMAGEBIND
    assert part.parameters == count("imagebind")
    assert part.trunks == {
        "image": count("imagebind vision"),
        "video": count("imagebind vision"),
        "audio": count("imagebind audio"),
    }
    assert part.feature_dim == ImageBindConfig.huge().out_dim


def test_all_parts_are_counted_here() -> None:
    assert set(parts(LanguageModel)) == set(LLMS)
    assert set(parts(GeneratorPart)) == set(GENERATORS)
    assert set(parts(EncoderPart)) == {"IMAGEBIND"}


def test_the_publishers_own_figures() -> None:
    """AudioLDM's card: 975 million; Zeroscope's UNet: 2.82 GB of float16; Wan's transformer: 5.68 GB of float32."""
    assert preset_parts.AUDIOLDM_L.published == pytest.approx(975e6, rel=1e-3)
    assert 2 * count("zeroscope unet") == pytest.approx(2.82e9, rel=2e-3)
    assert 4 * count("wan") == pytest.approx(5.68e9, rel=2e-3)


@pytest.mark.parametrize("name", [*LLMS, *GENERATORS, "IMAGEBIND"])
def test_a_part_says_where_it_is_and_under_which_licence(name: str) -> None:
    part: Part = getattr(preset_parts, name)
    assert part.repo.count("/") == 1 and part.licence
    assert (part.directory is None) == (part.how == "")
    assert part.directory is not None or part.revision is not None, "what is fetched is fetched at a revision"
    assert (" nc" in f" {part.licence.replace('-', ' ')}" or "non-commercial" in part.licence) == part.non_commercial
    if isinstance(part, EncoderPart | GeneratorPart):
        lookup("encoder" if isinstance(part, EncoderPart) else "generator", part.name)


def test_quantised_are_the_linear_layers_alone() -> None:
    small = dict(parameters=1000, width=10, vocabulary=20, layers=1, key_width=1)
    known = dict(title="", repo="a/b", revision="main", licence="", non_commercial=False, gated=False)
    untied = LanguageModel(**known, **small, tied=False)  # type: ignore[arg-type]
    tied = LanguageModel(**known, **small, tied=True)  # type: ignore[arg-type]
    # 600 linear weights and 400 of embedding and head: 600 at half a byte, a float32 for each 64 of them, 400 at two
    assert [untied.weights(p) for p in PRECISIONS] == [4000, 2000, 600 + 800, 300 + 37 + 800]
    assert [tied.weights(p) for p in PRECISIONS] == [4000, 2000, 800 + 400, 400 + 50 + 400]
    unknown = LanguageModel(**known, **(small | {"parameters": None}), tied=True)  # type: ignore[arg-type]
    assert {unknown.weights(p) for p in PRECISIONS} == {None} and unknown.published is None
