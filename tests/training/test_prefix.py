"""One caption for the runs of all modalities gives the states and gradients of the plain way, in every family."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from anygen.errors import ConfigError
from anygen.llm import LLM
from anygen.model import AnyGenModel
from anygen.model_config import AnyGenConfig
from anygen.prompts import pad
from anygen.training.losses import prefix_alignment
from anygen.training.prefix import (
    CaptionAlignment,
    CaptionBatches,
    Way,
    fastest_way,
    is_constant,
    length_batches,
    signal_states,
    tree_mask,
)

CAPTIONS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]
SMALL: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
WIDE = SMALL | dict(intermediate_size=48, num_key_value_heads=2, head_dim=8, max_position_embeddings=128)
FAMILIES: dict[str, tuple[dict[str, Any], Way]] = {
    "qwen3": (WIDE, "joint"),
    "mistral": (WIDE | {"sliding_window": 64}, "joint"),
    "gemma2": (WIDE | {"sliding_window": 64, "query_pre_attn_scalar": 8}, "joint"),
    "gemma3_text": (WIDE | {"sliding_window": 64, "query_pre_attn_scalar": 8}, "joint"),
    "granite": (WIDE | {"logits_scaling": 2.0}, "joint"),
    "phi": (WIDE, "joint"),
    "gpt_neox": (SMALL | {"intermediate_size": 48}, "joint"),
    "gpt2": (dict(n_embd=32, n_layer=2, n_head=4, initializer_range=0.3), "joint"),
    "opt": (dict(SMALL, ffn_dim=48, word_embed_proj_dim=32), "joint"),
    "bloom": (dict(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3), "branches"),
}


def targets(count: int = 3) -> dict[str, dict[str, Tensor]]:
    """Conditions of the tiny model's two output modalities."""
    torch.manual_seed(1)
    return {
        "image": {"prompt_embeds": torch.randn(count, 5, 8)},
        "audio": {"generated_prompt_embeds": torch.randn(count, 2, 4), "prompt_embeds": torch.randn(count, 3, 6)},
    }


def plain_loss(model: AnyGenModel, aims: Mapping[str, Mapping[str, Tensor]], captions: Any = CAPTIONS) -> Tensor:
    """Each run behind its own copy of the caption, in one padded pass with full autograd."""
    losses = []
    for modality, target in aims.items():
        ids, mask = pad([caption + list(model.signal_tokens.runs[modality]) for caption in captions], 0)
        loss = model(input_ids=ids, attention_mask=mask, conditions={modality: target}).alignment_loss
        losses.append(loss)
    return torch.stack(losses).mean()


def gradients(model: AnyGenModel, loss: Tensor) -> dict[str, Tensor]:
    """Of everything that trains."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(made: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Relative norm difference below 1e-4, of each parameter."""
    assert set(made) == set(wanted)
    for name, gradient in wanted.items():
        assert (made[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_prefix_needs_no_gradient(
    tiny_model: Callable[..., AnyGenModel], left: bool, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, aims = tiny_model(), targets()
    model.llm.base.set_attn_implementation(attention)
    wanted = plain_loss(model, aims)
    plain = gradients(model, wanted)
    graphs = []
    original = LLM.hidden_states
    monkeypatch.setattr(
        LLM, "hidden_states", lambda *a, **k: graphs.append(torch.is_grad_enabled()) or original(*a, **k)
    )
    fastest_way(model.llm, 1)
    graphs.clear()
    loss, conditions = prefix_alignment(model, *pad(CAPTIONS, 0, left=left), aims)
    assert graphs == [False, True]  # the caption once, without autograd; all runs once
    torch.testing.assert_close(loss, wanted)
    assert set(conditions) == {"image", "audio"}
    assert_equal_gradients(gradients(model, loss), plain)


def test_in_double_precision_the_gradient_is_the_same_to_rounding(tiny_model: Callable[..., AnyGenModel]) -> None:
    model, aims = tiny_model().double(), targets()
    plain = gradients(model, plain_loss(model, aims))
    made = gradients(model, prefix_alignment(model, *pad(CAPTIONS, 0), aims)[0])
    for name, gradient in plain.items():  # losses are in single precision
        assert (made[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-9, name


def test_an_adapter_that_trains_gets_its_gradient_through_the_caption(tiny_model: Callable[..., AnyGenModel]) -> None:
    model, aims = tiny_model(adapter=True), targets()
    model.llm.requires_grad_(False)
    frozen = gradients(model, plain_loss(model, aims))
    assert_equal_gradients(gradients(model, prefix_alignment(model, *pad(CAPTIONS, 0), aims)[0]), frozen)
    for name, parameter in model.llm.named_parameters():
        parameter.requires_grad_("lora_" in name)
    assert not is_constant(model, torch.tensor([[5]]))
    plain = gradients(model, plain_loss(model, aims))
    assert any("lora_" in name for name in plain)
    assert_equal_gradients(gradients(model, prefix_alignment(model, *pad(CAPTIONS, 0), aims)[0]), plain)
    assert not CaptionAlignment(model).constant


def test_signal_rows_in_a_prefix_train_unless_they_count_as_constants(tiny_model: Callable[..., AnyGenModel]) -> None:
    model, aims = tiny_model(), targets()
    row = model.signal_tokens.media_id - model.signal_tokens.vocab_size
    captions = [[*caption, model.signal_tokens.media_id] for caption in CAPTIONS]
    plain = gradients(model, plain_loss(model, aims, captions))
    made = gradients(model, prefix_alignment(model, *pad(captions, 0), aims)[0])
    assert_equal_gradients(made, plain)
    assert plain["signal_tokens.rows"][row].norm() > 0
    fixed = gradients(model, prefix_alignment(model, *pad(captions, 0), aims, constant=True)[0])
    assert fixed["signal_tokens.rows"][row].norm() == 0
    others = [n for n in range(len(model.signal_tokens)) if n != row]
    torch.testing.assert_close(fixed["signal_tokens.rows"][others], plain["signal_tokens.rows"][others])


def test_media_in_a_prefix_reach_their_projector(tiny_model: Callable[..., AnyGenModel]) -> None:
    model = tiny_model()
    media = {"image": torch.randn(1, 1, 6)}
    slot = model.prompts.slot_id("image")
    ids, mask = pad([[5, slot, slot, 6]], 0)
    assert not is_constant(model, ids, media)
    run = list(model.signal_tokens.runs["audio"])
    whole, seen = pad([[5, slot, slot, 6, *run]], 0)
    aims = {"audio": targets(1)["audio"]}
    plain = gradients(model, model(whole, seen, media=media, conditions=aims).alignment_loss)
    assert_equal_gradients(gradients(model, prefix_alignment(model, ids, mask, aims, media)[0]), plain)
    model.input_projectors.requires_grad_(False)
    assert is_constant(model, ids, media)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_plain_states_and_gradients(
    family: str, tiny_config: AnyGenConfig, tiny_tokenizer: Any
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings, way = FAMILIES[family]
    torch.manual_seed(0)
    ends = dict(vocab_size=len(tiny_tokenizer), eos_token_id=2, bos_token_id=None, pad_token_id=0)
    config = AutoConfig.for_model(family, **(ends | settings))
    model = AnyGenModel(tiny_config, LLM(AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer))
    model.initialize(seed=0).eval()
    assert fastest_way(model.llm, 12) == way
    aims = targets()
    wanted = plain_loss(model, aims)
    plain = gradients(model, wanted)
    for left in (False, True):
        loss, _ = prefix_alignment(model, *pad(CAPTIONS, 0, left=left), aims)
        torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
        assert_equal_gradients(gradients(model, loss), plain)


@pytest.mark.parametrize("way", ["joint", "branches", "plain"])
def test_the_ways_agree(tiny_model: Callable[..., AnyGenModel], way: Way) -> None:
    model = tiny_model()
    ids, mask = pad(CAPTIONS, 0)
    made = signal_states(model, ids, mask, ["audio", "image"], way=way)
    for modality, states in made.items():
        for row, caption in enumerate(CAPTIONS):
            run = list(model.signal_tokens.runs[modality])
            alone = model(torch.tensor([caption + run])).hidden_states[0, len(caption) :]
            torch.testing.assert_close(states[row], alone, rtol=1e-4, atol=1e-5)


def test_beyond_a_sliding_window_the_plain_way_is_taken(tiny_config: AnyGenConfig, tiny_tokenizer: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mistral", vocab_size=len(tiny_tokenizer), **(WIDE | {"sliding_window": 12}))
    torch.manual_seed(0)
    model = AnyGenModel(tiny_config, LLM(AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer))
    model.initialize(seed=0).eval()
    assert (fastest_way(model.llm, 12), fastest_way(model.llm, 13)) == ("joint", "plain")
    aims, captions = targets(), [list(range(5, 25)), *CAPTIONS[:2]]
    made = prefix_alignment(model, *pad(captions, 0), aims)[0]
    torch.testing.assert_close(made, plain_loss(model, aims, captions))


def test_a_mask_shows_each_run_its_caption_and_itself() -> None:
    mask = tree_mask(torch.tensor([2, 1]), 2, [1, 2], torch.float32)
    assert mask.shape == (2, 1, 3, 5) and mask.stride(2) % 16 == 0
    assert (mask[0, 0] == 0).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    assert (mask[1, 0] == 0).int().tolist() == [[1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]


def test_the_check_leaves_training_modes_and_gradients_alone(tiny_model: Callable[..., AnyGenModel]) -> None:
    model = tiny_model()
    model.train()
    decoder: Any = model.llm.base.get_decoder()
    decoder.layers[0].eval()
    fastest_way(model.llm, 1)
    assert decoder.layers[1].training and not decoder.layers[0].training


def test_batches_hold_every_item_once_and_like_lengths() -> None:
    lengths = [(7 * n) % 50 + 1 for n in range(103)]
    batches = length_batches(lengths, 8, seed=3)
    assert sorted(item for batch in batches for item in batch) == list(range(103))
    assert sorted(map(len, batches)) == [7, *[8] * 12]
    assert max(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) <= 8
    assert batches == length_batches(lengths, 8, seed=3) != length_batches(lengths, 8, seed=4)
    widest = [max(lengths[i] for i in batch) for batch in batches]
    assert widest != sorted(widest)
    loose = length_batches(lengths, 8, seed=3, window=1)
    assert max(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in loose) > 20


def test_batches_of_like_length_have_the_gradient_of_the_padded_batch(tiny_model: Callable[..., AnyGenModel]) -> None:
    """All four measures at once: an epoch in buckets through the module, against one padded pass."""
    model, count = tiny_model(), 8
    captions, aims = [list(range(5, 6 + (3 * n) % 11)) for n in range(count)], targets(count)
    plain = gradients(model, plain_loss(model, aims, captions))
    model.zero_grad()
    objective = CaptionAlignment(model)
    batches = CaptionBatches(captions, aims, batch_size=2, seed=0)
    for number in range(len(batches)):
        (objective(**batches.collate([batches[number]]))["loss"] / len(batches)).backward()
    made = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_equal_gradients(made, plain)
    assert {tuple(batches[n]["input_ids"].shape) for n in range(len(batches))} <= {(2, 8), (2, 16)}


def test_what_does_not_fit_is_told(tiny_model: Callable[..., AnyGenModel]) -> None:
    model = tiny_model()
    ids, mask = pad(CAPTIONS, 0)
    with pytest.raises(ConfigError, match="the model does not make smell; it makes image, audio"):
        signal_states(model, ids, mask, ["image", "smell"])
    with pytest.raises(ConfigError, match="of no modality are wanted; the model makes image, audio"):
        signal_states(model, ids, mask, [])
    with pytest.raises(ConfigError, match="caption 2 of 3 has no tokens"):
        CaptionBatches([[5], [], [6]], {}, batch_size=2, seed=0)
    with pytest.raises(ConfigError, match="3 captions, but 2 targets 'prompt_embeds' of image"):
        CaptionBatches(CAPTIONS, {"image": {"prompt_embeds": torch.zeros(2, 5, 8)}}, batch_size=2, seed=0)
    with pytest.raises(ConfigError, match="at least 1, got 0 and 64"):
        length_batches([1], 0, seed=0)
