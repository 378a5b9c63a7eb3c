"""Preferences: the loss is DPO's, over what an answer chooses, and media become likelier where they are preferred."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from anygen.errors import ConfigError
from anygen.messages import Message
from anygen.model import AnyGenModel
from anygen.training import preference_tuning
from anygen.training.chat_rows import preference
from anygen.training.data_rows import read
from anygen.training.preference_tuning import PairCollator, PreferenceModel, PreferenceTuningRecipe
from anygen.training.stage import make_ready
from anygen.training.stage_data import learn
from anygen.training.trainable import PeftSettings, own_words

pytest.importorskip("trl")


def recipe_of(user_model: Path, user_data: Path, **changes: Any) -> PreferenceTuningRecipe:
    values: dict[str, Any] = dict(
        model=str(user_model),
        data=str(user_data / "wanted.jsonl"),
        cache=str(user_data / "cache"),
        peft=PeftSettings(kind="lora", rank=2),
        steps=8,
        batch_size=3,
        learning_rate=2e-2,
        held_out=0,
        report_to=(),
    )
    return PreferenceTuningRecipe(**(values | changes))


def log_probability(model: AnyGenModel, talk: list[Message]) -> torch.Tensor:
    """Of the last answer, by the plain formula over the whole logits."""
    learned = learn(model.prompts, talk, own_words=False, all_turns=False)
    hidden = model(torch.tensor([learned.ids])).hidden_states
    log_probs = model.logits(hidden)[0].log_softmax(-1)
    chosen = [(place, label) for place, label in enumerate(learned.labels) if label >= 0]
    return torch.stack([log_probs[place - 1, label] for place, label in chosen]).sum()


def test_an_answer_s_probability_is_that_of_what_it_chooses(user_model: Path, user_data: Path) -> None:
    model = AnyGenModel.from_pretrained(user_model)
    pairs = read(str(user_data / "wanted.jsonl"), preference)
    batch = PairCollator(model, pairs, {})([{"pair": number} for number in range(3)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        output = PreferenceModel(model)(batch["input_ids"], batch["attention_mask"], labels)
        wanted = [log_probability(model, [*p.prompt, p.chosen]) for p in pairs]
        wanted += [log_probability(model, [*p.prompt, p.rejected]) for p in pairs]
    torch.testing.assert_close(output.log_probs.sum(1), torch.stack(wanted), rtol=1e-4, atol=1e-4)
    assert (output.entropy[output.log_probs != 0] > 0).all()
    run = model.signal_tokens.runs["video"]
    counted = labels[labels >= 0].tolist()
    assert counted.count(run[0]) == 3 and run[1] not in counted, "the rest of a run is forced"


def test_the_loss_is_dpo_s_and_what_is_preferred_gains(user_model: Path, user_data: Path, tmp_path: Path) -> None:
    before = AnyGenModel.from_pretrained(user_model)
    pairs = read(str(user_data / "wanted.jsonl"), preference)
    figures = preference_tuning.train(recipe_of(user_model, user_data), tmp_path)
    after = AnyGenModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        gains = [
            [
                log_probability(after, [*pair.prompt, answer]) - log_probability(before, [*pair.prompt, answer])
                for answer in (pair.chosen, pair.rejected)
            ]
            for pair in pairs
        ]
    margins = torch.stack([chosen - rejected for chosen, rejected in gains])
    assert (margins > 1).all() and figures["preferred"] == 1.0
    assert figures["loss"] < 0.6931, "log 2 is where it begins"
    assert float(-F.logsigmoid(0.1 * margins).mean()) < figures["loss"]


def test_the_first_step_s_loss_and_gradient_are_the_formula_s(
    user_model: Path, user_data: Path, tmp_path: Path
) -> None:
    from anygen.training.loop import RunLog
    from anygen.training.stage_trainer import Log

    recipe = recipe_of(user_model, user_data, beta=0.3)
    ready = make_ready(recipe, tmp_path, lambda config: preference_tuning.prepare(recipe, config), ["llm"])
    trainer = preference_tuning.dpo_trainer(recipe, tmp_path, ready, (log := RunLog(tmp_path, "t")), Log(log))
    for name, parameter in ready.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(3)])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in ready.model.named_parameters() if p.grad is not None}
    ready.model.zero_grad()
    reference = AnyGenModel.from_pretrained(user_model)
    pairs = read(str(user_data / "wanted.jsonl"), preference)
    margins = []
    for pair in pairs:
        ratios = []
        for answer in (pair.chosen, pair.rejected):
            talk = [*pair.prompt, answer]
            with torch.no_grad():
                was = log_probability(reference, talk)
            ratios.append(log_probability(ready.model, talk) - was)
        margins.append(ratios[0] - ratios[1])
    wanted = -F.logsigmoid(0.3 * torch.stack(margins)).mean()
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    assert len(ours) > 4
    for name, parameter in ready.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_run_that_is_stopped_goes_on_bit_for_bit_and_is_written_whole(
    user_model: Path, user_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anygen.errors import CheckpointError, OutputError
    from anygen.training.trainer import WholeCheckpoints

    def run(out: Path, **changes: Any) -> dict[str, torch.Tensor]:
        preference_tuning.train(recipe_of(user_model, user_data, save_every=2, resume=True, **changes), out)
        return {name: p.detach() for name, p in AnyGenModel.from_pretrained(out / "model").named_parameters()}

    wanted = run(tmp_path / "whole")
    publish = WholeCheckpoints._publish

    def stopped(self: Any, written: Path, place: Path) -> None:
        publish(self, written, place)
        if place.name == "checkpoint-4":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WholeCheckpoints, "_publish", stopped)
        run(tmp_path / "cut")
    with pytest.raises(CheckpointError, match=r"of another run: beta was 0.1, is 0.2; begin anew with resume=false"):
        run(tmp_path / "cut", beta=0.2)
    torch.manual_seed(9)
    made = run(tmp_path / "cut")
    assert made.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(made[name], value, rtol=0, atol=0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WholeCheckpoints, "_publish", full)
    with pytest.raises(OutputError, match="the checkpoint of step 2 cannot be written .* the disk is full"):
        run(tmp_path / "full")
    assert not [path for path in (tmp_path / "full" / "checkpoints").rglob("*") if path.is_file()]


def test_pairs_that_teach_nothing_are_bad_rows(user_model: Path, user_data: Path, tmp_path: Path) -> None:
    """Where words are the untouched LLM's, an answer in other words is the same choice."""
    say = {"role": "user", "content": "Is it?"}
    no, yes = ([{"role": "assistant", "content": words}] for words in ("no", "yes it is"))
    rows = [{"prompt": [say], "chosen": yes, "rejected": no}]
    (tmp_path / "words.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = recipe_of(user_model, user_data, data=str(tmp_path / "words.jsonl"))
    with pytest.raises(ConfigError, match="1 of 1 rows do not fit .*: the answers differ in words alone"):
        preference_tuning.train(recipe, tmp_path / "out")
    ready = make_ready(recipe, tmp_path, lambda config: preference_tuning.prepare(recipe, config), ["llm"])
    with pytest.raises(ConfigError, match="differ in words alone"):
        preference_tuning.choosing(ready.train, ready.model, 0.0)
    ready.model.settings = replace(ready.model.settings, routes=False)
    ready.model.prompts = ready.model.build_prompts()
    assert preference_tuning.choosing(ready.train, ready.model, 0.0) == ready.train, "there its words are its own"


def test_words_are_preferred_where_the_llm_s_own_weights_train(
    user_model: Path, user_data: Path, tmp_path: Path
) -> None:
    """As they are said: by the LLM without its adapter, in the base view, and their route by the adapted one."""
    ask = {"role": "user", "content": "Is it?"}
    film, *answers = (
        [{"role": "assistant", "content": said}]
        for said in ([{"type": "video", "caption": "a dog"}], "no", "yes it is", "perhaps", "maybe it is")
    )
    rows = [{"prompt": [ask], "chosen": a, "rejected": b} for a, b in (answers[:2], (film, answers[2]), answers[2:])]
    (tmp_path / "words.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = recipe_of(user_model, user_data, data=str(tmp_path / "words.jsonl"), unfreeze=("llm.*",))
    ready = make_ready(recipe, tmp_path, lambda config: preference_tuning.prepare(recipe, config), ["llm"])
    assert own_words(ready.model) and len(preference_tuning.choosing(ready.train, ready.model, 0.0)) == 3
    model = ready.model.eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    pairs = read(str(tmp_path / "words.jsonl"), preference)
    batch = PairCollator(model, pairs, {}, own_words=True)([{"pair": number} for number in range(3)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    wanted = []
    with torch.no_grad():
        output = PreferenceModel(model)(batch["input_ids"], batch["attention_mask"], labels, words=batch["words"])
        for talk in [[*p.prompt, p.chosen] for p in pairs] + [[*p.prompt, p.rejected] for p in pairs]:
            wanted.append(log_probability(model, talk))
            if learned := learn(model.prompts, talk, own_words=True, all_turns=False).base_ids:
                with model.llm.adapter_off():
                    given = len(model.prompts.prompt(talk[:-1]).base_ids)
                    log_probs = model.llm.base(torch.tensor([learned])).logits[0].log_softmax(-1)
                said = torch.tensor(learned[given:])
                wanted[-1] = wanted[-1] + log_probs[given - 1 : -1].gather(1, said[:, None]).sum()
    torch.testing.assert_close(output.log_probs.sum(1), torch.stack(wanted), rtol=1e-4, atol=1e-4)
    figures = preference_tuning.train(recipe, tmp_path / "out")
    assert figures["preferred"] == 1.0 and figures["loss"] < 0.6931


def test_bad_values_are_told(user_model: Path, user_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="beta is greater than 0, got 0"):
        recipe_of(user_model, user_data, beta=0.0)
    with pytest.raises(ConfigError, match="unfreeze: preference tuning reads image from the cache, as features"):
        preference_tuning.train(recipe_of(user_model, user_data, unfreeze=("encoders.image.*",)), tmp_path)
    with pytest.raises(ConfigError, match=r"nothing that trains \(input_projectors.image\) takes part in"):
        preference_tuning.train(recipe_of(user_model, user_data, trains=("input_projectors.image",)), tmp_path)
    assert preference_tuning.train(recipe_of(user_model, user_data, steps=0), tmp_path) == {"steps": 0.0}
    assert (tmp_path / "model").is_dir(), "as of every stage"
    with pytest.raises(ConfigError, match="12 of 12 rows do not fit .*: it has no 'prompt'; wanted: .*rejected"):
        preference_tuning.train(recipe_of(user_model, user_data, data=str(user_data / "chats.jsonl")), tmp_path)
