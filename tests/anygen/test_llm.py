from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from anygen.component import read_safetensors
from anygen.errors import CheckpointError, ConfigError
from anygen.llm import LLM

SIZES: dict[str, Any] = dict(
    vocab_size=60,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Llama", {}),
    "untied": ("Qwen2", {"tie_word_embeddings": False}),
    "soft cap": ("Gemma2", {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}),
    "scaled embedding": ("Gemma3Text", {"query_pre_attn_scalar": 8}),
    "logits_scaling": ("Granite", {"logits_scaling": 4.0}),
    "logit_scale": ("Cohere", {"logit_scale": 0.25}),
}


def family(name: str) -> Any:
    import transformers

    prefix, changes = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**(SIZES | changes))
    cls = prefix.removesuffix("Text") if prefix == "Gemma3Text" else prefix
    return getattr(transformers, f"{cls}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_the_models_own_whatever_its_family_does_to_them(name: str, tiny_tokenizer: Any) -> None:
    model = family(name)
    llm = LLM(model, tiny_tokenizer)
    ids = torch.randint(3, 60, (2, 7))
    hidden, _ = llm.hidden_states(llm.embedding(ids), attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        torch.testing.assert_close(llm.logits(hidden), model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [300, 160])
def test_a_replaced_vocabulary_is_read_on_both_sides(tied: bool, rows: int, tiny_llm: Callable[..., LLM]) -> None:
    llm = tiny_llm(tie_word_embeddings=tied)
    embedding, head = torch.randn(rows, 32), torch.randn(rows, 32)
    llm.replace_vocabulary(embedding, None if tied else head)
    assert llm.vocab_size == rows == llm.base.config.vocab_size and llm.tied == tied
    assert not any(parameter.requires_grad for parameter in llm.parameters())
    hidden = torch.randn(2, 32)
    torch.testing.assert_close(llm.embedding(torch.tensor([rows - 1])), embedding[-1:])
    torch.testing.assert_close(llm.logits(hidden), hidden @ (embedding if tied else head).T)


def test_a_vocabulary_that_does_not_fit_is_refused(tiny_llm: Callable[..., LLM]) -> None:
    from peft import LoraConfig

    llm = tiny_llm(tie_word_embeddings=False)
    with pytest.raises(
        CheckpointError, match=r"replaced vocabulary does not fit: missing lm_head; embed_tokens is \(9,"
    ):
        llm.replace_vocabulary(torch.zeros(9, 8))
    with pytest.raises(CheckpointError, match="the replaced vocabulary does not fit: unexpected lm_head"):
        tiny_llm().replace_vocabulary(torch.zeros(9, 32), torch.zeros(9, 32))
    llm.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(
        ConfigError, match="the vocabulary cannot be replaced once the LLM has an adapter; do it before"
    ):
        llm.replace_vocabulary(torch.zeros(9, 32), torch.zeros(9, 32))


def test_a_tokenizer_from_elsewhere_brings_its_own_ends(
    tiny_llm: Callable[..., LLM], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import GenerationConfig

    tiny_llm().save_base(tmp_path / "llm")
    tiny_tokenizer.save_pretrained(tmp_path / "words")
    assert LLM.from_pretrained(tmp_path / "llm", tokenizer=tmp_path / "words").eos_ids == [2]
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(tmp_path / "words")
    assert LLM.from_pretrained(tmp_path / "llm", tokenizer=tmp_path / "words").eos_ids == [2, 7]


def test_a_gpt2_has_its_decoder_under_another_name(tiny_tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    llm = LLM(model, tiny_tokenizer)
    ids = torch.randint(3, 60, (2, 7))
    hidden, _ = llm.hidden_states(llm.embedding(ids), attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(llm.logits(hidden), model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_not_known_is_refused(tiny_tokenizer: Any) -> None:
    model = family("plain")
    model.lm_head.register_forward_hook(lambda *args: args[2] * 2 if model.secret else args[2])
    model.secret = False
    model.register_forward_pre_hook(lambda *_: setattr(model, "secret", True))
    model.register_forward_hook(lambda *_: setattr(model, "secret", False))
    with pytest.raises(ConfigError, match="LlamaForCausalLM makes its logits in a way that anygen does not know"):
        LLM(model, tiny_tokenizer)


def test_a_recurrent_model_is_refused(tiny_tokenizer: Any) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ConfigError, match="MambaForCausalLM keeps a recurrent state; anygen needs an attention"):
        LLM(model, tiny_tokenizer)


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def adapted(llm: LLM) -> LLM:
    llm.add_adapter(lora())
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return llm


def states(llm: LLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return llm.hidden_states(llm.embedding(ids), attention_mask=torch.ones_like(ids))[0]


def test_with_the_adapter_off_it_is_the_untouched_model(tiny_llm: Callable[..., LLM]) -> None:
    ids = torch.tensor([[5, 6, 7]])
    plain = states(tiny_llm(), ids)
    llm = adapted(tiny_llm())
    for parameter in llm.parameters():
        parameter.requires_grad_(False)
    with llm.adapter_off():
        torch.testing.assert_close(states(llm, ids), plain, rtol=0, atol=0)
    assert not torch.allclose(states(llm, ids), plain, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in llm.parameters())  # as before


def test_only_the_adapter_is_trainable(tiny_llm: Callable[..., LLM]) -> None:
    llm = tiny_llm()
    assert not any(parameter.requires_grad for parameter in llm.parameters())
    llm.add_adapter(lora())
    trainable = {name for name, parameter in llm.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)


def test_an_adapter_round_trips_through_disk(tiny_llm: Callable[..., LLM], tmp_path: Path) -> None:
    import json

    llm, ids = adapted(tiny_llm()), torch.tensor([[5, 6, 7]])
    llm.save_adapter(tmp_path, base_name="tiny-llm")
    again = tiny_llm()
    again.load_adapter(tmp_path)
    assert any(parameter.requires_grad for name, parameter in again.named_parameters() if "lora_" in name)
    torch.testing.assert_close(states(again, ids), states(llm, ids), rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-llm"


def test_an_adapter_that_lacks_keys_is_refused(tiny_llm: Callable[..., LLM], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    adapted(tiny_llm()).save_adapter(tmp_path)
    state = read_safetensors(tmp_path, "adapter_model")
    lost = sorted(state)[0]
    state["stray"] = state.pop(lost)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"does not fit: missing {lost}; unexpected stray"):
        tiny_llm().load_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no adapter: adapter_config\.json is missing"):
        tiny_llm().load_adapter(tmp_path / "nowhere")


def test_a_second_adapter_is_refused(tiny_llm: Callable[..., LLM]) -> None:
    with pytest.raises(ConfigError, match="has an adapter already"):
        adapted(tiny_llm()).add_adapter(lora())


def test_it_loads_what_it_wrote_in_the_type_that_was_written(
    tiny_llm: Callable[..., LLM], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    llm, ids = tiny_llm(), torch.tensor([[5, 6, 7]])
    llm.save_base(tmp_path)
    capfd.readouterr()
    again = LLM.from_pretrained(tmp_path)
    assert capfd.readouterr().err == ""  # no progress bar where there is no terminal
    torch.testing.assert_close(states(again, ids), states(llm, ids), rtol=0, atol=0)
    assert (again.dtype, again.tied, again.vocab_size, again.width) == (torch.float32, True, len(llm.tokenizer), 32)
    assert again.eos_ids == [llm.tokenizer.eos_token_id]
    assert LLM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
