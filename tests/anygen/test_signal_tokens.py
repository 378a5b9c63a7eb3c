from collections.abc import Callable

import pytest
import torch
from torch import nn

from anygen.errors import ConfigError
from anygen.llm import LLM
from anygen.signal_tokens import SignalTokens, SignalTokensConfig


def signals(tied: bool = True) -> SignalTokens:
    return SignalTokens(SignalTokensConfig(counts={"image": 3, "audio": 2}), vocab_size=10, width=4, tied=tied)


def test_rows_stand_in_the_order_of_the_configuration_behind_the_vocabulary() -> None:
    tokens = signals()
    assert tokens.strings == [
        "<|words|>",
        "<|media|>",
        "<|image_0|>",
        "<|image_1|>",
        "<|image_2|>",
        "<|audio_0|>",
        "<|audio_1|>",
    ]
    assert [tokens.id(string) for string in tokens.strings] == list(range(10, 17))
    assert tokens.runs == {"image": range(12, 15), "audio": range(15, 17)}


def test_embedding_equals_that_of_a_resized_model() -> None:
    torch.manual_seed(0)
    tokens, base = signals(), nn.Embedding(10, 4)
    nn.init.normal_(tokens.rows)
    resized = nn.Embedding.from_pretrained(torch.cat([base.weight, tokens.rows]))
    ids = torch.randint(0, 17, (3, 8))
    torch.testing.assert_close(tokens.embed(ids, base), resized(ids), rtol=0, atol=0)


def test_logits_equal_those_of_a_resized_head() -> None:
    torch.manual_seed(0)
    tied, untied = signals(), signals(tied=False)
    for parameter in [*tied.parameters(), *untied.parameters()]:
        nn.init.normal_(parameter)
    hidden = torch.randn(3, 4)
    torch.testing.assert_close(tied.logits(hidden), hidden @ tied.rows.T)
    assert untied.head_rows is not None
    torch.testing.assert_close(untied.logits(hidden), hidden @ untied.head_rows.T)


def test_rows_are_embedded_at_the_scale_at_which_gemma_embeds() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    tokens, base = signals(), Gemma3TextScaledWordEmbedding(10, 4, 0, embed_scale=2.0)
    nn.init.normal_(tokens.rows)
    resized = torch.cat([base.weight, tokens.rows]) * 2.0
    ids = torch.tensor([[1, 12, 16]])
    torch.testing.assert_close(tokens.embed(ids, base), resized[ids])


def test_only_rows_that_are_used_get_a_gradient() -> None:
    tokens, base = signals(), nn.Embedding(10, 4).requires_grad_(False)
    tokens.embed(torch.tensor([[1, 12, 16, 2]]), base).sum().backward()
    assert tokens.rows.grad is not None
    assert tokens.rows.grad.abs().sum(1).nonzero().flatten().tolist() == [2, 6]


def test_rows_start_at_the_mean_of_the_llms(tiny_llm: Callable[..., LLM]) -> None:
    weight = tiny_llm().embedding.weight
    assert isinstance(weight, torch.Tensor)
    tokens = SignalTokens(SignalTokensConfig(counts={"image": 4}), vocab_size=len(weight), width=32)
    tokens.initialize(weight, generator=torch.Generator().manual_seed(0), noise=0.0)
    torch.testing.assert_close(tokens.rows, weight.mean(0).expand(6, -1))
    tokens.initialize(weight, generator=torch.Generator().manual_seed(0))
    first = tokens.rows.detach().clone()
    tokens.initialize(weight, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tokens.rows, first, rtol=0, atol=0)
    assert len(first.unique(dim=0)) == 6


@pytest.mark.parametrize(
    ("drawable", "allowed"), [(None, ["<|image_0|>", "<|audio_0|>"]), (["audio"], ["<|audio_0|>"]), ([], [])]
)
def test_only_the_first_token_of_a_run_may_be_sampled(drawable: list[str] | None, allowed: list[str]) -> None:
    tokens = signals()
    barred = tokens.forbidden(drawable).tolist()
    assert [string for string, bar in zip(tokens.strings, barred, strict=True) if not bar] == allowed


def test_runs_are_found_in_reading_order() -> None:
    ids = torch.tensor([[1, 12, 13, 14, 12, 13, 14], [15, 16, 1, 1, 12, 13, 14]])
    assert signals().run_starts(ids, "image").tolist() == [[0, 1], [0, 4], [1, 4]]
    assert signals().run_starts(ids, "audio").tolist() == [[1, 0]]


@pytest.mark.parametrize("ids", [[1, 1, 12, 13], [12, 14, 13, 1]])
def test_a_half_run_is_refused(ids: list[int]) -> None:
    with pytest.raises(ConfigError, match="a run of 'image' is not whole: its 3 tokens must stand together"):
        signals().run_starts(torch.tensor([ids]), "image")


def test_a_vocabulary_that_has_our_names_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"already holds <\|image_0\|>, <\|audio_1\|>; rename"):
        signals().check_vocabulary({"a": 0, "<|audio_1|>": 1, "<|image_0|>": 2})


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ConfigError, match="a run of 'image' has at least 1 signal token, got 0"):
        SignalTokensConfig(counts={"image": 0})
    with pytest.raises(ConfigError, match="'words' is the name of a route"):
        SignalTokensConfig(counts={"words": 1})
    with pytest.raises(ConfigError, match=r"no signal token '<\|video_0\|>'; known: <\|words\|>, "):
        signals().id("<|video_0|>")
