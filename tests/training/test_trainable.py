"""What trains is what is named, at the rate that is named, whatever adapter carries it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anygen.errors import ConfigError
from anygen.model import AnyGenModel
from anygen.training import instruction_tuning, trainable
from anygen.training.instruction_tuning import InstructionTuningRecipe
from anygen.training.trainable import PeftSettings, Selection, adapt, clean, groups, own_weights, select

Make = Callable[..., AnyGenModel]


def trained(model: AnyGenModel) -> set[str]:
    return {clean(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_parts_and_modalities_of_parts_train_by_their_names(tiny_model: Make) -> None:
    model = tiny_model(adapter=True)
    select(model, Selection(("input_projectors", "output_projectors.audio")))
    assert {name.rsplit(".", 3)[0].split(".")[0] for name in trained(model)} == {
        "input_projectors",
        "output_projectors",
    }
    assert not any(".image." in name for name in trained(model) if name.startswith("output"))
    select(model, Selection(("llm",)))
    assert trained(model) and all("lora_" in name for name in trained(model)) and own_weights(model) == set()
    select(model, Selection((), ("llm.*.layers.1.mlp.*",)))
    assert all(".layers.1.mlp." in name for name in trained(model)) and own_weights(model) == {"llm"}


def test_the_rows_of_one_modality_move_alone(tiny_model: Make) -> None:
    model = tiny_model()
    hooks = select(model, Selection(("signal_tokens.audio",)))
    before = model.signal_tokens.rows.detach().clone()
    optimizer = torch.optim.AdamW(groups(model, 0.1, {}, weight_decay=0.5))
    ids = torch.arange(model.signal_tokens.vocab_size, model.signal_tokens.vocab_size + len(before))[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    moved = (model.signal_tokens.rows != before).any(1).nonzero().flatten().tolist()
    assert moved == [token - model.signal_tokens.vocab_size for token in model.signal_tokens.runs["audio"]]
    assert len(hooks) == 1, "rows do not decay either"


def test_each_part_has_its_rate_and_the_longest_name_counts(tiny_model: Make) -> None:
    model = tiny_model(adapter=True)
    select(model, Selection(("llm", "output_projectors", "signal_tokens")))
    rates = {"llm": 1e-4, "output_projectors": 1e-3, "output_projectors.audio": 5e-3}
    found = groups(model, 1e-2, rates, weight_decay=0.1)
    rate_of = {id(p): group["lr"] for group in found for p in group["params"]}
    decay_of = {id(p): group["weight_decay"] for group in found for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = next((k for k in sorted(rates, key=len, reverse=True) if clean(name).startswith(k)), None)
            assert rate_of[id(parameter)] == (rates[key] if key else 1e-2)
            assert decay_of[id(parameter)] == (0.0 if parameter.ndim < 2 or "signal_tokens" in name else 0.1)
    with pytest.raises(ConfigError, match="nothing that trains is named 'input_projectors'; what trains: llm, output"):
        groups(model, 1e-2, {"input_projectors": 1.0}, 0.0)


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "ia3": {"targets": ("k_proj", "v_proj", "down_proj"), "options": {"feedforward_modules": ["down_proj"]}},
    "prefix": {"rank": 3},
    "LN_TUNING": {"targets": ("input_layernorm", "post_attention_layernorm")},
    "VERA": {"targets": ("q_proj",), "options": {"r": 2}},
}


@pytest.mark.parametrize("kind", [*KINDS, "rows"])
def test_every_kind_of_adapter_trains_and_is_loaded_again(
    kind: str, user_model: Path, user_data: Path, tmp_path: Path
) -> None:
    recipe = InstructionTuningRecipe(
        model=str(user_model),
        data=str(user_data / "chats.jsonl"),
        cache=str(user_data / "cache"),
        peft=PeftSettings(**({"kind": kind, "rank": 2} | KINDS.get(kind, {}))),
        steps=6,
        batch_size=4,
        learning_rate=3e-2,
        held_out=0,
        report_to=(),
    )
    instruction_tuning.train(recipe, tmp_path)
    assert (tmp_path / "model" / "adapter").exists() == (kind != "rows")
    model, before = (AnyGenModel.from_pretrained(folder) for folder in (tmp_path / "model", user_model))
    ids = torch.tensor([[5, 9, 30, 7, 12]])
    with torch.no_grad():
        new, old = model(ids).hidden_states, before(ids).hidden_states
        assert torch.equal(new, old) == (kind == "rows"), "words alone change by the adapter"
        with model.llm.adapter_off():
            torch.testing.assert_close(model(ids).hidden_states, old)
    assert not torch.equal(model.signal_tokens.rows, before.signal_tokens.rows)


def test_weights_of_the_llm_and_of_encoders_that_train_are_written_anew(
    user_model: Path, user_data: Path, tmp_path: Path
) -> None:
    recipe = InstructionTuningRecipe(
        model=str(user_model),
        data=str(user_data / "chats.jsonl"),
        cache=str(user_data / "cache"),
        trains=("input_projectors", "output_projectors", "signal_tokens"),
        unfreeze=("llm.*.layers.1.*", "encoders.image.*.blocks.0.*"),
        learning_rates={"llm": 1e-3, "encoders.image": 1e-3},
        steps=4,
        batch_size=4,
        held_out=0,
        report_to=(),
    )
    instruction_tuning.train(recipe, tmp_path)
    model, before = (AnyGenModel.from_pretrained(folder) for folder in (tmp_path / "model", user_model))
    assert model.settings.llm.path == "llm-trained" and not (tmp_path / "model" / "llm").exists()
    changed = {
        name
        for (name, new), (_, old) in zip(model.named_parameters(), before.named_parameters(), strict=True)
        if not torch.equal(new, old)
    }
    frozen = {"llm": ".layers.1.", "encoders": ".blocks.0."}
    for part, mark in frozen.items():
        names = {name for name in changed if name.startswith(part)}
        assert names and all(mark in name for name in names), part


@pytest.mark.parametrize(
    ("selection", "told"),
    [
        (Selection(("input_projector",)), "there is no part 'input_projector', did you mean 'input_projectors'"),
        (Selection(("llm",)), "trains names llm, which has no adapter; start one"),
        (Selection(("input_projectors.video",)), "the model has no input_projectors.video; it has image"),
        (Selection(("signal_tokens.video",)), "the model has no signal_tokens.video; it has image, audio"),
        (Selection((), ("llm.model.layerz.*",)), r"no weight's name fits 'llm.model.layerz.\*'; a name near it is"),
        (Selection(()), "nothing would train: trains and unfreeze name nothing"),
    ],
)
def test_names_that_are_not_there_are_told(selection: Selection, told: str, tiny_model: Make) -> None:
    with pytest.raises(ConfigError, match=told):
        select(tiny_model(), selection)


def test_adapters_that_do_not_fit_are_told(tiny_model: Make) -> None:
    model = tiny_model(adapter=True)
    with pytest.raises(ConfigError, match="has an adapter already; peft.kind: keep trains that one"):
        adapt(model.llm, PeftSettings(kind="lora"))
    adapt(model.llm, PeftSettings(kind="lora", renew=True, rank=3))
    assert {p.shape[0] for n, p in model.llm.named_parameters() if "lora_A" in n} == {3}
    with pytest.raises(ConfigError, match="peft: lora does not fit this LLM"):
        adapt(tiny_model().llm, PeftSettings(kind="lora", targets=("no_such_layer",)))
    with pytest.raises(ConfigError, match="peft: lora cannot be made"):
        trainable.peft_config(PeftSettings(kind="lora", options={"no_such_field": 1}))
    with pytest.raises(ConfigError, match="unknown kind 'adaption_prompt'"):
        PeftSettings(kind="adaption_prompt")
    assert PeftSettings(kind="qlora").quantization == "4bit"


def test_an_adapter_trains_on_an_llm_in_four_bits(user_model: Path, user_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    recipe = InstructionTuningRecipe(
        model=str(user_model),
        data=str(user_data / "chats.jsonl"),
        cache=str(user_data / "cache"),
        peft=PeftSettings(kind="qlora", rank=2),
        steps=6,
        batch_size=4,
        learning_rate=1e-2,
        held_out=0.2,
        report_to=(),
    )
    figures = instruction_tuning.train(recipe, tmp_path)
    assert figures["held_out"] < figures["held_out_before"]
    model = AnyGenModel.from_pretrained(tmp_path / "model")
    assert not model.llm.quantized and any("lora_" in name for name, _ in model.named_parameters())
