"""What the LLM's own weights learn of words: as it says them, without its adapter and in the base view."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anygen import AnyGenPipeline
from anygen.errors import ConfigError
from anygen.messages import MediaPart, Message, TextPart
from anygen.model import AnyGenModel
from anygen.training import instruction_tuning
from anygen.training.chat_rows import Shown
from anygen.training.instruction_tuning import InstructionTuningRecipe
from anygen.training.stage import make_ready
from anygen.training.stage_data import Collator, arguments, learn
from anygen.training.trainable import PeftSettings, own_words


def says(text: str, role: str = "assistant") -> Message:
    return Message(role, (TextPart(text),))  # type: ignore[arg-type]


def asks(text: str) -> Message:
    return says(text, "user")


def recipe_of(model: Path, data: Path, **changes: Any) -> InstructionTuningRecipe:
    given: dict[str, Any] = dict(data=str(data / "chats.jsonl"), text_data=str(data / "talk.jsonl"), text_share=0.5)
    given |= dict(model=str(model), cache=str(data / "cache"), unfreeze=("llm.*",), held_out=0, report_to=())
    given |= dict(trains=("signal_tokens", "output_projectors"))
    return InstructionTuningRecipe(**(given | changes))


def test_words_are_learned_where_they_are_said(tiny_model: Callable[..., AnyGenModel]) -> None:
    """The ids are those that the base LLM's own chat template has for the conversation."""
    talk = [asks("Hi."), says("Hello."), asks("And?"), says("Bye.")]
    prompts = tiny_model().prompts
    tokenizer: Any = prompts.tokenizer
    learned = learn(prompts, talk, own_words=True)
    turns = [{"role": m.role, "content": m.text} for m in talk]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert learned.base_ids == ids[: len(learned.base_ids)] and len(ids) - len(learned.base_ids) <= 1  # a line's end
    said = tokenizer.decode([label for label in learned.base_labels if label >= 0])
    assert said.count(tokenizer.eos_token) == 2 and said.replace(tokenizer.eos_token, "") == "Hello.Bye."
    route = prompts.signal_tokens.words_id
    assert [label for label in learned.labels if label >= 0] == [route, route]
    assert not learn(prompts, talk, own_words=False).base_ids
    assert sum(label >= 0 for label in learn(prompts, talk, own_words=True, all_turns=False).base_labels) < len(said)

    shown = MediaPart("image", Shown("a dog"))  # type: ignore[arg-type]
    media = [*talk, asks("Draw it."), Message("assistant", (TextPart("Here."), shown))]
    learned = learn(prompts, media, own_words=True)
    assert learned.base_ids == learn(prompts, talk, own_words=True).base_ids, "what follows is no words"
    assert not learn(prompts, media[-2:], own_words=True).base_ids


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_loss_is_that_of_transformers_and_the_adapter_takes_no_part(
    user_model: Path, user_data: Path, tmp_path: Path, checkpointed: bool
) -> None:
    lora = PeftSettings(kind="lora", rank=2)
    recipe = recipe_of(user_model, user_data, peft=lora, trains=("llm",), activation_checkpointing=checkpointed)
    ready = make_ready(recipe, tmp_path, lambda config: instruction_tuning.prepare(recipe, config), ["llm"])
    model = ready.model.train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    items = [{"learned": ready.make(one.talk(None))} for one in (*ready.text[:2], *ready.train[:1])]  # type: ignore[arg-type]
    batch = Collator(ready.features, ready.conditions, own_words=own_words(ready.model))(items)
    words, labels = batch["words"], batch["labels"]
    assert len(words["labels"]) == 2
    loss = model(**arguments(batch)).lm_loss
    with model.llm.adapter_off():
        theirs = model.llm.base(**words).loss
    alone = model(**{name: value for name, value in arguments(batch).items() if name != "words"}).lm_loss
    counts = [int((some[:, 1:] >= 0).sum()) for some in (words["labels"], labels)]
    torch.testing.assert_close(loss, (counts[0] * theirs + counts[1] * alone) / sum(counts))

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss - counts[1] / sum(counts) * alone, list(parameters.values()))
    wanted = torch.autograd.grad(counts[0] / sum(counts) * theirs, list(parameters.values()), allow_unused=True)
    scale = max(float(g.abs().max()) for g in gradients)
    assert scale > 0
    for name, own, reference in zip(parameters, gradients, wanted, strict=True):
        reference = torch.zeros_like(own) if reference is None else reference
        torch.testing.assert_close(own, reference, rtol=1e-3, atol=1e-5 * scale, msg=name)


def test_a_batch_without_words_runs_the_llm_as_often_and_loses_nothing(user_model: Path, user_data: Path) -> None:
    recipe = recipe_of(user_model, user_data)
    ready = make_ready(recipe, user_data, lambda config: instruction_tuning.prepare(recipe, config), ["llm"])
    items = [{"learned": ready.make(one.talk(None))} for one in ready.train[:2]]  # type: ignore[arg-type]
    batch = Collator(ready.features, ready.conditions, own_words=True)(items)
    assert batch["words"]["labels"].tolist() == [[-100]]
    plain = Collator(ready.features, ready.conditions)(items)
    assert "words" not in plain
    model: AnyGenModel = ready.model.eval()
    assert torch.equal(model(**arguments(batch)).lm_loss, model(**arguments(plain)).lm_loss)
    with pytest.raises(ConfigError, match="words are learned beside labels: give both"):
        model(**{name: value for name, value in arguments(batch).items() if name != "labels"})


def test_what_was_learned_is_said(user_model: Path, user_data: Path, tmp_path: Path) -> None:
    """From the file of conversations to the pipeline's answer."""
    adapted: dict[str, Any] = dict(peft=PeftSettings(kind="lora", rank=2), trains=("llm", "signal_tokens"))
    recipe = recipe_of(user_model, user_data, **adapted, text_share=0.9, steps=120, batch_size=6, learning_rate=1e-2)
    instruction_tuning.train(recipe, tmp_path)
    pipe = AnyGenPipeline.from_pretrained(tmp_path / "model")
    assert [pipe(f"Say {number}.").text for number in range(6)] == [f"{n}!" for n in range(6)]
