"""A model of real classes at tiny width, for the tests of whatever the LLM is part of; and the embedded default."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from anygen.llm import LLM
    from anygen.model import AnyGenModel
    from anygen.model_config import AnyGenConfig
    from anygen.pipeline import AnyGenPipeline

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
