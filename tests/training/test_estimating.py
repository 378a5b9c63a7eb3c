"""What a stage will take: parameters to the last one, activations and operations near what a step really takes."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from anygen.errors import ConfigError
from anygen.training import decoder_alignment, encoder_alignment, estimating, instruction_tuning, preference_tuning
from anygen.training.decoder_alignment import DecoderAlignmentRecipe
from anygen.training.encoder_alignment import EncoderAlignmentRecipe
from anygen.training.estimating import activations, estimate, step_operations
from anygen.training.instruction_tuning import InstructionTuningRecipe
from anygen.training.preference_tuning import PreferenceTuningRecipe
from anygen.training.recipes import dry_run
from anygen.training.stage import StageRecipe, make_ready
from anygen.training.stage_data import Collator, arguments
from anygen.training.trainable import PeftSettings

LORA = PeftSettings(kind="lora", rank=4)


def recipes(user_model: Path, user_data: Path) -> dict[str, tuple[Any, Any]]:
    common: dict[str, Any] = dict(model=str(user_model), cache=str(user_data / "cache"), batch_size=4, held_out=0)
    chats = str(user_data / "chats.jsonl")
    frozen = dict(trains=("signal_tokens", "input_projectors", "output_projectors"))
    return {
        "encoder": (
            encoder_alignment,
            EncoderAlignmentRecipe(data={"image": str(user_data / "pairs.jsonl")}, **common),
        ),
        "decoder": (
            decoder_alignment,
            DecoderAlignmentRecipe(captions={"video": str(user_data / "captions.txt")}, **common),
        ),
        "lora": (instruction_tuning, InstructionTuningRecipe(data=chats, peft=LORA, **common)),
        "one stage": (instruction_tuning, InstructionTuningRecipe(data=chats, unfreeze=("llm.*",), **frozen, **common)),
        "preference": (
            preference_tuning,
            PreferenceTuningRecipe(data=str(user_data / "wanted.jsonl"), peft=LORA, **common),
        ),
    }


def ready_of(module: Any, recipe: StageRecipe, out: Path) -> Any:
    return make_ready(recipe, out, lambda config: module.prepare(recipe, config), module.trains(recipe))


@pytest.mark.parametrize("name", ["encoder", "decoder", "lora", "one stage", "preference"])
def test_parameters_and_rows_are_told_exactly(name: str, user_model: Path, user_data: Path, tmp_path: Path) -> None:
    module, recipe = recipes(user_model, user_data)[name]
    told = estimate(recipe, lambda config: module.prepare(recipe, config), module.trains(recipe))
    ready = ready_of(module, recipe, tmp_path)
    assert told.parameters == ready.model.trainable_parameters()
    assert told.rows == len(ready.train) and told.steps == 1000
    weights = sum(p.numel() * p.element_size() for p in ready.model.parameters())
    trained = sum(p.numel() for p in ready.model.parameters() if p.requires_grad)
    assert told.memory["weights"] == weights and told.memory["optimizer"] == 8 * trained
    assert told.bytes == sum(told.memory.values()) and told.seconds > 0
    assert told.to_cache["captions"] == len({pair for one in ready.train for pair in one.captions})


@pytest.mark.parametrize("name", ["encoder", "lora", "one stage"])
def test_activations_and_operations_are_near_what_a_step_takes(
    name: str, user_model: Path, user_data: Path, tmp_path: Path
) -> None:
    module, recipe = recipes(user_model, user_data)[name]
    ready = ready_of(module, recipe, tmp_path)
    model = ready.model.train()
    items = [{"learned": ready.make(one.talk(random.Random(0)))} for one in ready.train[:4]]
    batch = arguments(Collator(ready.features, ready.conditions)(items))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(**batch).loss.backward()
    tokens = batch["input_ids"].numel()
    learned = int((batch["labels"] >= 0).sum())
    logits = 2 * 4 * learned * (model.llm.vocab_size + len(model.signal_tokens))
    assert activations(model, tokens) == pytest.approx(sum(kept.values()) - logits, rel=0.35)
    assert step_operations(model, tokens, learned) == pytest.approx(counter.get_total_flops(), rel=0.35)


def test_a_dry_run_tells_and_writes_nothing(
    user_model: Path,
    user_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr("anygen.llm.LLM.from_pretrained", refuse)
    (tmp_path / "r.yaml").write_text(
        f"kind: encoder_alignment\nout: {tmp_path / 'out'}\nmodel: {user_model}\n"
        f"data: {{image: {user_data / 'pairs.jsonl'}}}\nsteps: 3\n"
    )
    (tmp_path / "mini.yaml").write_text("kind: autoencoder\nout: o\nicons: i\n")
    (tmp_path / "next.yaml").write_text(
        f"kind: encoder_alignment\nout: o\nmodel: {tmp_path / 'out' / 'model'}\ndata: {{image: x}}\n"
    )
    (tmp_path / "list.yaml").write_text("- r.yaml\n- mini.yaml\n- next.yaml\n")
    dry_run(tmp_path / "list.yaml")
    told = capsys.readouterr().out
    assert "input_projectors" in told and "r: 12 conversations of" in told and "3 steps" in told
    assert "computed into caches first: 12 media" in told and "memory on cpu: about" in told
    assert "mini: the recipe is right; there is no estimate for its kind" in told
    assert "next: the recipe is right; its data and parts are checked when r has made its model" in told
    with pytest.raises(ConfigError, match="learning_rates: nothing that trains is named 'llm'"):
        dry_run(tmp_path / "r.yaml", ["learning_rates={llm: 1.0}"])
    assert not (tmp_path / "out").exists()


def test_contexts_that_are_read_once_cost_once(
    user_model: Path, user_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimating, "speed", lambda *_: 1e9)  # a busy machine's is another at each call
    module, recipe = recipes(user_model, user_data)["decoder"]
    ready = ready_of(module, recipe, tmp_path)
    forms = len(decoder_alignment.requests("video"))
    assert forms - 1 <= estimating.contexts_of(ready.model, ready.train) <= forms

    def seconds(steps: int) -> float:
        changed = replace(recipe, steps=steps)
        return estimate(changed, lambda config: module.prepare(changed, config), module.trains(changed)).seconds

    few, many = seconds(2_000), seconds(20_000)
    assert few < many < 10 * few


def test_fewer_bits_and_fewer_kept_activations_take_less(user_model: Path, user_data: Path, tmp_path: Path) -> None:
    module, recipe = recipes(user_model, user_data)["lora"]
    model = ready_of(module, recipe, tmp_path).model
    assert activations(model, 100, checkpointing=True) < activations(model, 100)
    assert estimating._time(30) == "30 s" and estimating._time(600) == "10 min" and estimating._time(9000) == "2.5 h"
