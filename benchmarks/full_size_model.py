"""A model of NExT-GPT's full size with random weights: speed and memory do not depend on what the weights are.

The LLM is made on the device; generators are written to a folder first, as they are read from one like published ones,
and the plain way reads them again at each request. `tiny` has the same classes at a width that a CPU runs in seconds.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from anygen.llm import LLM
from anygen.model import AnyGenModel
from anygen.model_config import (
    AnyGenConfig,
    InputConfig,
    ModalityConfig,
    OutputConfig,
    PartConfig,
    SourceConfig,
    SourcedPartConfig,
)

GENERATORS = {"image": "stable_diffusion", "video": "zeroscope", "audio": "audioldm2"}
SIGNALS = {"image": 4, "video": 24, "audio": 8}
DOWN = ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3)
UP = (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D")
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shapes of everything."""

    name: str
    llm: dict[str, Any]
    image: dict[str, Any]
    video: dict[str, Any]
    audio: dict[str, Any]
    vae: tuple[int, ...]
    mel_vae: tuple[int, ...]
    vocoder: dict[str, Any]
    conditions: dict[str, dict[str, tuple[int, ...]]]
    projector: dict[str, Any] = field(default_factory=dict)
    frames: int = 16
    seconds: float = 5.0
    prompt: int = 512
    """Tokens of the prefill that is measured."""
    matmul: int = 8192
    """Sides of the matrices whose product is the peak."""
    sustained: float = 0.4
    """Seconds for which it is repeated, as a card slows down that takes all its power."""
    read: int = 2**31
    """Numbers that are read to find the bandwidth."""


FULL = Size(
    name="7B, SD 2 at 512 x 512, Zeroscope 16 x 320 x 576, AudioLDM2 5 s",
    llm=dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    ),
    image=dict(
        sample_size=64,
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
    ),
    video=dict(sample_size=(40, 72), cross_attention_dim=1024, attention_head_dim=64),
    audio=dict(
        in_channels=8,
        out_channels=8,
        block_out_channels=(128, 256, 384, 640),
        down_block_types=DOWN,
        up_block_types=UP,
        cross_attention_dim=((None, 768, 1024),) * 4,
    ),
    vae=(128, 256, 512, 512),
    mel_vae=(128, 256, 512),
    vocoder=dict(
        model_in_dim=64,
        upsample_initial_channel=1024,
        upsample_rates=[5, 4, 2, 2, 2],
        upsample_kernel_sizes=[16, 16, 8, 4, 4],
    ),
    conditions={
        "image": {"prompt_embeds": (77, 1024)},
        "video": {"prompt_embeds": (77, 1024)},
        "audio": {"generated_prompt_embeds": (8, 768), "prompt_embeds": (64, 1024)},
    },
)
TINY = Size(
    name="tiny",
    llm=dict(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
    ),
    image=dict(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    video=dict(
        sample_size=(4, 8),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ),
    audio=dict(
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, 8, 12),) * 2,
    ),
    vae=(8, 16),
    mel_vae=(8, 16),
    vocoder=dict(
        model_in_dim=16,
        upsample_initial_channel=8,
        upsample_rates=[20, 8],
        upsample_kernel_sizes=[40, 16],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        normalize_before=False,
    ),
    conditions={
        "image": {"prompt_embeds": (7, 16)},
        "video": {"prompt_embeds": (7, 16)},
        "audio": {"generated_prompt_embeds": (8, 8), "prompt_embeds": (6, 12)},
    },
    projector=dict(width=16, heads=2, ffn=16, encoder_layers=1, decoder_layers=1),
    frames=3,
    seconds=0.2,
    prompt=32,
    matmul=256,
    sustained=0.01,
    read=2**18,
)


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, models are made on a device and in a type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def language_model(size: Size, device: torch.device, dtype: torch.dtype) -> LLM:
    """A random Llama with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    symbols = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    words.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", chat_template=TEMPLATE)
    with made_on(device, dtype):
        model = LlamaForCausalLM(LlamaConfig(**size.llm, eos_token_id=0, bos_token_id=None, pad_token_id=0))
    return LLM(model.eval(), tokenizer)


def write_generators(size: Size, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Folders of random generators, as anygen and diffusers read them."""
    from diffusers import (
        AudioLDM2UNet2DConditionModel,
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        UNet2DConditionModel,
        UNet3DConditionModel,
    )
    from safetensors.torch import save_file
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    def vae(blocks: tuple[int, ...], **more: Any) -> Any:
        kinds: dict[str, Any] = {
            "block_out_channels": blocks,
            "down_block_types": ("DownEncoderBlock2D",) * len(blocks),
            "up_block_types": ("UpDecoderBlock2D",) * len(blocks),
        }
        return AutoencoderKL(**kinds, layers_per_block=2, norm_num_groups=min(32, blocks[0] // 2), **more)

    unets: dict[str, Any] = {
        "image": UNet2DConditionModel,
        "video": UNet3DConditionModel,
        "audio": AudioLDM2UNet2DConditionModel,
    }
    schedule: Any = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    for modality, unet in unets.items():
        with made_on(device, dtype):
            parts = {"unet": unet(**getattr(size, modality))}
            if modality == "audio":
                channels = size.audio["in_channels"]
                parts["vae"] = vae(size.mel_vae, in_channels=1, out_channels=1, latent_channels=channels)
                parts["vocoder"] = SpeechT5HifiGan(SpeechT5HifiGanConfig(**size.vocoder))
            else:
                parts["vae"] = vae(size.vae, latent_channels=4)
        for name, part in parts.items():
            part.save_pretrained(folder / modality / name)
        DPMSolverMultistepScheduler(**schedule).save_pretrained(folder / modality / "scheduler")
        empty = {name: torch.randn(shape).to(dtype) for name, shape in size.conditions[modality].items()}
        save_file(empty, folder / modality / "unconditional.safetensors")
        told = {"video": {"frames": size.frames}, "audio": {"seconds": size.seconds}}.get(modality, {})
        (folder / modality / "sampling.json").write_text(json.dumps({"steps": 20} | told))


def configuration(size: Size, *, reads: bool) -> AnyGenConfig:
    """The model's, with outputs in `generators/` and, if it reads, inputs by ImageBind, a trunk each."""

    def part(name: str, path: str, **options: Any) -> SourcedPartConfig:
        return SourcedPartConfig(name=name, source=SourceConfig(path=path), options=options)

    modalities = {
        modality: ModalityConfig(
            input=InputConfig(
                encoder=part("imagebind", f"encoders/{modality}", modality=modality), feature_dim=1024, slots=1
            )
            if reads
            else None,
            output=OutputConfig(
                signal_tokens=SIGNALS[modality],
                condition=size.conditions[modality],
                generator=part(name, f"generators/{modality}"),
                projector=PartConfig(name="text_fc", options=size.projector),
            ),
        )
        for modality, name in GENERATORS.items()
    }
    return AnyGenConfig(name="full-size", llm=SourceConfig(path="llm"), modalities=modalities, routes=False)


def build(size: Size, folder: Path, device: torch.device, dtype: torch.dtype, *, reads: bool = False) -> AnyGenModel:
    """The model on its device, and its generators in `folder/generators`."""
    write_generators(size, folder / "generators", device, dtype)
    config = configuration(size, reads=reads)
    encoders: dict[str, Any] = {}
    config.save(folder / "anygen.json")
    if reads:
        from anygen.encoders.imagebind import ImageBindEncoder
        from anygen.encoders.imagebind_config import ImageBindConfig

        trunks = {"image": "vision", "video": "vision", "audio": "audio"}
        encoders = {
            modality: ImageBindEncoder(ImageBindConfig.huge().only(trunk), modality=modality)
            for modality, trunk in trunks.items()
        }
    llm = language_model(size, device, dtype)
    return AnyGenModel(config, llm, encoders).initialize(seed=0).to(device).eval()
