"""Adapters of every kind on the LLM: prefixes against PEFT's own pass, and what taking one off leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig

from anygen.errors import ConfigError
from anygen.llm import LLM
from anygen.model import AnyGenModel
from anygen.rows import DynamicRows, Kept
from anygen.static_rows import StaticMemories


def hidden(llm: LLM, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        places = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        return llm.hidden_states(llm.embedding(ids), attention_mask=mask, position_ids=places)[0]


@pytest.fixture
def prefixed(tiny_llm: Callable[..., LLM]) -> LLM:
    llm = tiny_llm()
    llm.add_adapter(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for parameter in llm.adapter_parameters().values():
        torch.nn.init.normal_(parameter, std=1.0)
    return llm


def test_a_prefix_gives_what_peft_itself_gives(prefixed: LLM) -> None:
    ids = torch.tensor([[5, 9, 30, 7], [0, 4, 8, 11]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    with torch.no_grad():
        theirs = cast(Any, prefixed.model)(input_ids=ids[:1], attention_mask=mask[:1]).logits
    torch.testing.assert_close(prefixed.logits(hidden(prefixed, ids, mask)[:1]), theirs, rtol=1e-4, atol=1e-4)
    alone = hidden(prefixed, ids[1:, 1:], mask[1:, 1:])
    torch.testing.assert_close(hidden(prefixed, ids, mask)[1:, 1:], alone, rtol=1e-4, atol=1e-4)


def test_a_prefix_read_in_pieces_is_the_prefix_read_at_once(prefixed: LLM) -> None:
    ids = torch.tensor([[5, 9, 30, 7, 12]])
    with torch.no_grad():
        first, cache = prefixed.hidden_states(prefixed.embedding(ids[:, :3]), use_cache=True)
        second, _ = prefixed.hidden_states(prefixed.embedding(ids[:, 3:]), cache=cache)
    torch.testing.assert_close(torch.cat([first, second], 1), hidden(prefixed, ids), rtol=1e-4, atol=1e-4)


def test_a_prefix_that_is_off_or_taken_off_is_not_there(prefixed: LLM, tiny_llm: Callable[..., LLM]) -> None:
    ids = torch.tensor([[5, 9, 30, 7]])
    plain = hidden(tiny_llm(), ids)
    assert not torch.allclose(hidden(prefixed, ids), plain)
    with prefixed.adapter_off():
        torch.testing.assert_close(hidden(prefixed, ids), plain)
    prefixed.remove_adapter()
    assert not prefixed.has_adapter and prefixed.prefix_length == 0
    torch.testing.assert_close(hidden(prefixed, ids), plain)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=["lora", "ia3", "prefix"],
)
def test_every_kind_trains_alone_round_trips_and_leaves_the_base_as_it_was(
    config: Any, tiny_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    llm, ids = tiny_llm(), torch.tensor([[5, 9, 30, 7]])
    llm.add_adapter(config)
    llm.requires_grad_(False)
    llm.thaw_adapter()
    trained = {name for name, parameter in llm.named_parameters() if parameter.requires_grad}
    assert trained and not any("embed_tokens" in name or "base_layer.weight" in name for name in trained)
    llm.save_adapter(tmp_path / "adapter")
    llm.save_base(tmp_path / "base")
    other = LLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(hidden(other, ids), hidden(tiny_llm(), ids))
    other.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(hidden(other, ids), hidden(llm, ids))
    llm.remove_adapter()
    assert not llm.has_adapter
    torch.testing.assert_close(hidden(llm, ids), hidden(tiny_llm(), ids))
    llm.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))


def test_prompt_tokens_of_other_kinds_are_refused(tiny_llm: Callable[..., LLM]) -> None:
    with pytest.raises(ConfigError, match="adds prompt tokens; use prefix tuning, or an adapter of the layers"):
        tiny_llm().add_adapter(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_a_conversation_goes_on_behind_a_prefix_as_if_it_were_read_anew(
    tiny_model: Callable[..., AnyGenModel],
) -> None:
    model = tiny_model()
    model.llm.add_adapter(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for parameter in model.llm.adapter_parameters().values():
        torch.nn.init.normal_(parameter, std=1.0)
    first, second, kept = [5, 9, 30, 7], [5, 9, 30, 8, 12, 40], Kept()
    begun = DynamicRows(model, adapted=True, kept=kept, keys=first)
    begun.read([first], None)
    begun.feed([[11]])
    begun.leave(kept)
    again = DynamicRows(model, adapted=True, kept=kept, keys=second)
    assert len(again.keys) == 3, "what both have in common is not read again"
    again.read([second], None)
    anew = DynamicRows(model, adapted=True)
    anew.read([second], None)
    torch.testing.assert_close(again.logits(0), anew.logits(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.feed([[3, 4]]), anew.feed([[3, 4]]), rtol=1e-4, atol=1e-4)
    assert StaticMemories.reason_against(model) == "its adapter is a prefix"
