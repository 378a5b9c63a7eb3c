"""A model of real classes at tiny width, for the tests of whatever the LLM is part of; and the embedded default."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from anygen.generators.audioldm2 import AudioLDM2Generator, SoundText
    from anygen.generators.zeroscope import ZeroscopeGenerator
    from anygen.llm import LLM
    from anygen.model import AnyGenModel
    from anygen.model_config import AnyGenConfig
    from anygen.pipeline import AnyGenPipeline

SOUND_CAPTIONS = ("a trumpet playing a fast rising melody", "a dog")
"""What the tokenizer of `tiny_audioldm2` is trained on."""
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are helpful<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE of a few hundred tokens with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Draw a red apple. What is this? Here is the user, the assistant."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def tiny_llm(tiny_tokenizer: "PreTrainedTokenizerFast") -> "Callable[..., LLM]":
    """Makes a random Llama of width 32 in float32; arguments change its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from anygen.llm import LLM

    def make(**changes: Any) -> LLM:
        torch.manual_seed(0)
        settings = dict(
            vocab_size=len(tiny_tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.3,  # so that greedy answers differ between prompts
            eos_token_id=tiny_tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tiny_tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))  # type: ignore[arg-type]
        return LLM(model.eval(), tiny_tokenizer)

    return make


@pytest.fixture
def tiny_config() -> "AnyGenConfig":
    """Reads and makes images (3 signal tokens), makes sounds with two condition tensors (2 signal tokens)."""
    from anygen.model_config import (
        AnyGenConfig,
        InputConfig,
        ModalityConfig,
        OutputConfig,
        PartConfig,
        SourceConfig,
        SourcedPartConfig,
    )

    return AnyGenConfig(
        name="tiny",
        llm=SourceConfig(repo="tiny-llm"),
        modalities={
            "image": ModalityConfig(
                input=InputConfig(
                    encoder=SourcedPartConfig(name="imagebind", source=SourceConfig(path="encoders/imagebind")),
                    feature_dim=6,
                    slots=2,
                    projector=PartConfig(name="mlp", options={"tokens": 2}),
                ),
                output=OutputConfig(
                    signal_tokens=3,
                    condition={"prompt_embeds": (5, 8)},
                    generator=SourcedPartConfig(name="stable_diffusion", source=SourceConfig(path="generators/image")),
                    projector=PartConfig(
                        name="text_fc",
                        options={"width": 16, "heads": 2, "ffn": 16, "encoder_layers": 1, "decoder_layers": 1},
                    ),
                ),
            ),
            "audio": ModalityConfig(
                output=OutputConfig(
                    signal_tokens=2,
                    condition={"generated_prompt_embeds": (2, 4), "prompt_embeds": (3, 6)},
                    generator=SourcedPartConfig(name="audioldm2", source=SourceConfig(path="generators/audio")),
                    projector=PartConfig(name="mlp", options={"width": 16}),
                ),
            ),
        },
    )


@pytest.fixture
def tiny_model(tiny_llm: "Callable[..., LLM]", tiny_config: "AnyGenConfig") -> "Callable[..., AnyGenModel]":
    """Makes the model of `tiny_config`; with `adapter=True` a LoRA of non-zero effect. In evaluation mode."""
    import torch

    from anygen.model import AnyGenModel

    def make(*, adapter: bool = False, **changes: Any) -> AnyGenModel:
        from peft import LoraConfig

        llm = tiny_llm(**changes)
        model = AnyGenModel(tiny_config, llm).initialize(seed=0)
        if adapter:
            llm.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
            for name, parameter in llm.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.5)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny_zeroscope() -> "Callable[..., ZeroscopeGenerator]":
    """Makes a random Zeroscope, whose clips have three frames of 16×16 pixels; `prediction_type` is its UNet's."""

    def make(*, prediction_type: str = "v_prediction") -> "ZeroscopeGenerator":
        import torch
        from diffusers import AutoencoderKL, UNet3DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        from anygen.generators.zeroscope import ClipDefaults, TextConditioner, ZeroscopeGenerator
        from anygen.training.diffusion import build_scheduler
        from anygen.training.tokenizer import train_tokenizer

        torch.manual_seed(0)
        vae: Any = AutoencoderKL(
            **{
                "block_out_channels": (8, 16),
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
            },
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.7,
        )
        unet: Any = UNet3DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        for name, parameter in unet.named_parameters():
            if "conv4" in name:  # zero in a fresh UNet, and the temporal convolutions with it
                torch.nn.init.normal_(parameter, std=0.3)
        tokenizer = train_tokenizer(["a red apple", "two dogs"], vocab_size=300, context=6)
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=6,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        text = TextConditioner(CLIPTextModel(config).eval(), tokenizer)
        with torch.no_grad():
            unconditional = text(text.tokenize([""]))[0].clone()
        scheduler = build_scheduler()
        return ZeroscopeGenerator(
            vae=vae,
            unet=unet,
            scheduler=type(scheduler).from_config(scheduler.config, prediction_type=prediction_type),
            unconditional=unconditional,
            text=text,
            defaults=ClipDefaults(steps=3, guidance_scale=4.0, frames=3, fps=6.0),
        )

    return make


@pytest.fixture(scope="session")
def tiny_audioldm2() -> "Callable[..., AudioLDM2Generator]":
    """Makes a random AudioLDM2, whose sounds have 0.1 s at 16 kHz; with CLAP on request."""

    def make(*, prediction_type: str = "v_prediction", clap: bool = False) -> "AudioLDM2Generator":
        import torch
        from diffusers import AudioLDM2UNet2DConditionModel, AutoencoderKL
        from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

        from anygen.generators.audioldm2 import AudioLDM2Generator, SoundDefaults, empty_condition
        from anygen.training.diffusion import build_scheduler

        text = _sound_text(clap=clap)
        torch.manual_seed(0)
        vae_blocks: dict[str, Any] = {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
        vae: Any = AutoencoderKL(
            in_channels=1, out_channels=1, latent_channels=4, norm_num_groups=4, scaling_factor=0.7, **vae_blocks
        )
        unet_blocks: dict[str, Any] = {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": ((None, 8, 12),) * 2,
        }
        unet: Any = AudioLDM2UNet2DConditionModel(
            in_channels=4, out_channels=4, layers_per_block=1, attention_head_dim=4, norm_num_groups=4, **unet_blocks
        )
        vocoder = SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=16,
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
        scheduler = build_scheduler()
        scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)
        return AudioLDM2Generator(
            vae=vae,
            unet=unet,
            vocoder=vocoder,
            scheduler=scheduler,
            unconditional=empty_condition(text),
            text=text,
            defaults=SoundDefaults(steps=3, guidance_scale=4.0, seconds=0.1),
        )

    return make


def _sound_text(*, clap: bool = False) -> "SoundText":
    """T5 and GPT-2 of one layer, 24 tokens; CLAP on request."""
    import torch
    from diffusers.pipelines.audioldm2 import AudioLDM2ProjectionModel
    from transformers import ClapConfig, ClapModel, GPT2Config, GPT2LMHeadModel, T5Config, T5EncoderModel

    from anygen.generators.audioldm2 import SoundText
    from anygen.training.tokenizer import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(SOUND_CAPTIONS, vocab_size=300, context=24)
    sequence = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=12,
            d_kv=6,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    language_model = GPT2LMHeadModel(GPT2Config(vocab_size=1, n_positions=64, n_embd=8, n_layer=1, n_head=2))
    listener = None
    if clap:
        text_config = dict(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=40,
            pad_token_id=1,
            projection_dim=10,
        )
        audio_config = dict(
            spec_size=8,
            window_size=4,
            num_mel_bins=8,
            patch_size=2,
            patch_stride=2,
            patch_embeds_hidden_size=8,
            depths=[1],
            num_attention_heads=[2],
            num_hidden_layers=1,
            hidden_size=8,
            projection_dim=10,
        )
        listener = ClapModel(ClapConfig(text_config=text_config, audio_config=audio_config, projection_dim=10))
    return SoundText(
        sequence=sequence,
        tokenizer=tokenizer,
        projection=AudioLDM2ProjectionModel(10 if clap else 12, 12, 8),
        language_model=language_model,
        context=24,
        clap=listener,
        clap_tokenizer=tokenizer if clap else None,
    ).eval()


@pytest.fixture(scope="session")
def emulate() -> type:
    """CUDA graphs without a GPU: what a graph replays is computed again on the graph's own tensors."""
    from torch.utils._pytree import tree_flatten

    class Emulated:
        """A capture as `anygen.graphs` wants it. Like CUDA's it changes nothing; like a graph's a replay reads its
        inputs, and writes its results, where they lay when it was captured.

        Args:
            state: the tensors that the captured work changes in place.
        """

        def __init__(self, state: "Callable[[], Iterable[Tensor]]" = tuple) -> None:
            self.state, self.captures, self.replays = state, 0, 0

        def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
            self.captures += 1
            before = [(tensor, tensor.clone()) for tensor in self.state()]
            made = work()
            for tensor, value in before:
                tensor.copy_(value)
            kept = tree_flatten(made)[0]
            for tensor in kept:
                tensor.fill_(-7)  # a graph's results are not there before it is replayed

            def replay() -> None:
                self.replays += 1
                for own, new in zip(kept, tree_flatten(work())[0], strict=True):
                    own.copy_(new)

            return replay, made

    return Emulated


@pytest.fixture(scope="session")
def embedded_default() -> Path:
    """The directory of the model that ships inside the package."""
    directory = Path(__file__).resolve().parent.parent / "anygen" / "assets" / "mini"
    if not (directory / "manifest.json").is_file():
        pytest.skip("this checkout lacks the weights of the embedded default (anygen/assets/mini)")
    return directory


@pytest.fixture(scope="session")
def default_pipeline(embedded_default: Path) -> "AnyGenPipeline":
    """The embedded default on the CPU, loaded once for all tests; not to be changed."""
    from anygen.pipeline import AnyGenPipeline

    return AnyGenPipeline.from_pretrained(device="cpu")


@pytest.fixture
def quick_default(default_pipeline: "AnyGenPipeline", monkeypatch: pytest.MonkeyPatch) -> "AnyGenPipeline":
    """The same with few steps by default, and what `AnyGenPipeline.from_pretrained()` gives inside the test."""
    from anygen.pipeline import AnyGenPipeline

    load = AnyGenPipeline.from_pretrained

    def from_pretrained(*arguments: Any, **options: Any) -> AnyGenPipeline:
        return load(*arguments, **options) if arguments or options else default_pipeline

    generator: Any = default_pipeline.generator("image")
    monkeypatch.setattr(generator, "defaults", replace(generator.defaults, steps=2))
    monkeypatch.setattr(AnyGenPipeline, "from_pretrained", from_pretrained)
    return default_pipeline
