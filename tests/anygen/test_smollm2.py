"""The conversion on a tiny GGUF file written here, and on the real package where it can be had."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from anygen.errors import HubError
from anygen.hub import resolve
from anygen.smollm2 import convert

gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf")


def bytes_as_letters() -> Iterator[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of its vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    yield from (chr(byte) for byte in shown)
    yield from (chr(256 + place) for place in range(256 - len(shown)))


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary halves (transformers) to rotary pairs (GGUF), for the rows of a query or key projection."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():  # values that bfloat16 holds exactly
        weight.data = weight.data.bfloat16().float()
    return model


@pytest.fixture(scope="module")
def converted(tiny: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    config = tiny.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_as_letters(), "ĊĊ", "ĠĠ"])
    writer.add_token_types([3, 3, 3] + [1] * 258)
    writer.add_token_merges(["Ċ Ċ", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in tiny.state_dict().items():
        if name == "lm_head.weight":
            continue
        for ours, theirs in (
            ("model.layers.", "blk."), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"), ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("post_attention_layernorm", "ffn_norm"),
            ("input_layernorm", "attn_norm"), ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2], 0)
        writer.add_tensor(name, (interleaved(tensor, heads) if heads else tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (target := folder / "converted").mkdir()
    convert(folder / "tiny.gguf", target)
    return target


def test_the_converted_model_computes_what_the_original_does(tiny: LlamaForCausalLM, converted: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(converted).dtype == torch.bfloat16
    model = LlamaForCausalLM.from_pretrained(converted, dtype=torch.float32)
    ids = torch.randint(0, 261, (2, 20), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(ids).logits, tiny(ids).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_digits_stand_alone_before_spaces_are_joined(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = "12\n\n3  4\n\na"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    # "  4" is "  ", "4"; before a letter GPT-2's pattern leaves the last space to the word: "\n", "\n", "a"
    assert tokens == ["1", "2", "ĊĊ", "3", "ĠĠ", "4", "Ċ", "Ċ", "a"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.model_max_length == 128


def test_the_weights_may_be_read_by_whoever_may_read_the_configuration(converted: Path) -> None:
    modes = {path.stat().st_mode for path in converted.iterdir()}
    assert len(modes) == 1


def test_it_is_silent(converted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    convert(converted.parent / "tiny.gguf", tmp_path)
    assert capfd.readouterr() == ("", "")


def test_the_real_model_answers() -> None:
    try:
        directory = resolve("smollm2-135m-instruct")
    except HubError as error:
        pytest.skip(f"the package cannot be had here: {error}")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert model.dtype == torch.bfloat16 and len(tokenizer) == model.config.vocab_size == 49152
