"""Preference tuning on a user's pairs of answers, of which one is preferred: which media it holds, and its words.

    kind: preference_tuning
    out: runs/preference
    model: anygen-mini
    data: preferences.jsonl

`trl.DPOTrainer` does it; here is what it is told of a model with media: token ids with slots and signal tokens, and
log-probabilities over words and new tokens together. Of an answer its route, its words, the first token of each run
and its end count, as they are what is chosen when it is generated; the rest of a run is forced. Words that the LLM
says without its adapter count where its own weights train. What the model was before is the reference, whose
log-probabilities are computed once.

Source: DPO (arXiv:2305.18290).
Shapes: B pairs, so that a batch has 2B rows, the preferred answers first; T tokens, V + R classes.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from anygen.errors import ConfigError
from anygen.losses import IGNORED
from anygen.messages import Message
from anygen.model import AnyGenModel
from anygen.model_config import AnyGenConfig
from anygen.prompts import pad
from anygen.training.caches import TensorCache
from anygen.training.chat_rows import Preference, check_fit, preference
from anygen.training.data_rows import Rows, Source, read
from anygen.training.instruction_tuning import sources
from anygen.training.loop import RunLog, is_main, wait
from anygen.training.stage import Prepared, Ready, StageRecipe, make_ready, sifted, trained_encoders
from anygen.training.stage_data import Item, Learned, as_features, base_rows, item, learn, to
from anygen.training.stage_run import begin_log, save, tell_parameters
from anygen.training.stage_trainer import (
    Log,
    callbacks,
    check_reached,
    conduct,
    identity,
    optimizer,
    training_arguments,
)
from anygen.training.trainable import PARTS, own_words
from anygen.training.trainer import WholeCheckpoints, on_one_gpu

PAIRS = ".pairs"
"""Folder of a run, while it lasts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceTuningRecipe(StageRecipe):
    """Pairs of answers."""

    data: Source | tuple[Source, ...]
    """Rows `{"prompt": [messages], "chosen": [message], "rejected": [message]}`, see `chat_rows`."""
    beta: float = 0.1
    """How near the model stays to what it was."""
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    """TRL's name of the loss."""
    label_smoothing: float = 0.0
    """Share of the pairs that are thought to be the wrong way round; of `robust` and `sigmoid`."""
    learning_rate: float = 5e-5

    def __post_init__(self) -> None:
        StageRecipe.__post_init__(self)
        if self.beta <= 0:
            raise ConfigError(f"beta is greater than 0, got {self.beta:g}")


def prepare(recipe: PreferenceTuningRecipe, config: AnyGenConfig) -> Prepared:
    """Reads and checks the pairs; an item's conversation is the prompt with the longer answer.

    Raises:
        ConfigError: too many rows do not fit, or an encoder is to train.
    """
    if trained := trained_encoders(recipe.unfreeze, config):
        raise ConfigError(
            f"unfreeze: preference tuning reads {', '.join(trained)} from the cache, as features; the other stages "
            "can train encoders"
        )

    def made(rows: Rows, number: int) -> Item:
        pair = preference(rows, number)
        talks = [[*pair.prompt, answer] for answer in (pair.chosen, pair.rejected)]
        for talk in talks:
            check_fit(talk, config)
        longer = max(talks, key=lambda talk: len(talk[-1].text))
        one = item(rows, number, lambda _: longer, pair.prompt)
        return _Pair(**{name: getattr(one, name) for name in Item.__slots__}, pair=pair)

    return Prepared([one for source in sources(recipe.data) for one in read(source, made, recipe.bad_rows)], rows=2)


@dataclass(frozen=True, slots=True)
class _Pair(Item):
    pair: Preference = Preference([], Message("assistant", ()), Message("assistant", ()))


class _Config(PretrainedConfig):
    model_type = "anygen"


@dataclass
class Scores(ModelOutput):
    """What `PreferenceModel` says of the next tokens, zero where nothing was chosen."""

    log_probs: Tensor | None = None
    """float32[2B, T - 1]."""
    entropy: Tensor | None = None
    """float32[2B, T - 1]."""
    mean_logits: Tensor | None = None
    """float32[2B, T - 1]."""
    is_top1: Tensor | None = None
    """bool[2B, T - 1]."""


class PreferenceModel(PreTrainedModel):
    """An `AnyGenModel` as `trl.DPOTrainer` takes models: log-probabilities of given tokens come out."""

    config_class = _Config
    supports_gradient_checkpointing = True

    def __init__(self, model: AnyGenModel) -> None:
        super().__init__(_Config())
        self.inner = model
        self.guarded = True
        self.generation_config = GenerationConfig()

    def __setattr__(self, name: str, value: Any) -> None:
        # TRL puts a pass there that wants one matrix as the head; ours gives what that would. Accelerate's comes later.
        if name != "forward" or not self.guarded:
            super().__setattr__(name, value)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        media: Any = None,
        words: Any = None,
        **_: Any,
    ) -> Scores:
        """Scores a batch.

        Args:
            input_ids: long[2B, T], slots negative.
            attention_mask: long[2B, T].
            labels: long[2B, T], -100 where nothing was chosen.
            media: as for `AnyGenModel.forward`.
            words: as for `AnyGenModel.forward`, and `places`, bool[2B, T], where in `input_ids` they stand.
        """
        media, words = (to(given, input_ids.device) for given in (media, words))  # a trainer moves tensors alone
        hidden = self.inner(input_ids, attention_mask, media=media).hidden_states
        wanted = labels[:, 1:] != IGNORED
        if words is None:
            return _scores(self.inner.logits(hidden[:, :-1][wanted]), labels[:, 1:][wanted], wanted)
        said = words["places"][:, 1:]
        wanted &= ~said
        adapted = _scores(self.inner.logits(hidden[:, :-1][wanted]), labels[:, 1:][wanted], wanted)
        plain = _scores(*self.inner.word_logits(words), said)
        return Scores(**{name: value + plain[name] for name, value in adapted.items()})  # zero at the other's places


def _scores(logits: Tensor, targets: Tensor, wanted: Tensor) -> Scores:
    """float[N, V + R] and long[N] of the places bool[2B, T - 1]."""
    log_probs = logits.float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        top = logits.argmax(-1) == targets
    chosen = log_probs.gather(-1, targets[:, None])[:, 0]
    return Scores(
        log_probs=_placed(chosen, wanted),
        entropy=_placed(entropy, wanted),
        mean_logits=_placed(logits.detach().float().mean(-1), wanted),
        is_top1=_placed(top, wanted),
    )


def _placed(values: Tensor, wanted: Tensor) -> Tensor:
    """[N] -> [2B, T - 1], zero elsewhere; gradients flow."""
    return torch.zeros(wanted.shape, dtype=values.dtype, device=values.device).masked_scatter(wanted, values)


class PairCollator:
    """Rows of the dataset -> a batch of `DPOTrainer`.

    Args:
        model: whose tokens these are.
        pairs: all of them, by number.
        features: input modality -> cache.
        own_words: as for `stage_data.Collator`.
    """

    def __init__(
        self,
        model: AnyGenModel,
        pairs: Sequence[Preference],
        features: dict[str, TensorCache],
        *,
        own_words: bool = False,
    ) -> None:
        self.model, self.pairs, self.features, self.own_words = model, pairs, features, own_words

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """B rows with a `pair` each -> `input_ids`, `attention_mask` and `completion_mask`, long[2B, T], `media`,
        `words`, and what was computed of the reference, float32[B]."""
        pairs = [self.pairs[row["pair"]] for row in rows]
        talks = [[*p.prompt, p.chosen] for p in pairs] + [[*p.prompt, p.rejected] for p in pairs]
        learned = [learn(self.model.prompts, talk, own_words=self.own_words, all_turns=False) for talk in talks]
        ids, mask = pad([one.ids for one in learned], 0)
        labels, _ = pad([one.labels for one in learned], IGNORED)
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        chosen = labels != IGNORED
        if self.own_words:
            places = torch.zeros_like(chosen)
            for row, one in enumerate(learned):  # they end the row, in the ids that they have in the base view
                said = sum(label != IGNORED for label in one.base_labels)
                places[row, len(one.ids) - said : len(one.ids)] = True
            batch["words"] = base_rows(learned) | {"places": places}
            chosen |= places
        batch["completion_mask"] = chosen.long()
        read_media: dict[str, list[str]] = {}
        for one in learned:
            for part in one.read:
                read_media.setdefault(part.modality, []).append(cast(Any, part.media).key)
        if read_media:
            batch["media"] = {name: as_features(self.features[name].rows(keys)) for name, keys in read_media.items()}
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch


def choosing(items: Sequence[Item], model: AnyGenModel, allowed: float) -> list[Item]:
    """Pairs whose answers differ in what is chosen.

    Raises:
        ConfigError: those left out are more than the share `allowed` of a file.
    """

    spoken = own_words(model)

    def fault(item: Item) -> str | None:
        pair = cast(_Pair, item).pair
        chosen, rejected = (
            learn(model.prompts, [*pair.prompt, answer], own_words=spoken, all_turns=False)
            for answer in (pair.chosen, pair.rejected)
        )
        if _told(chosen) == _told(rejected):
            return (
                "the answers differ in words alone, which the LLM that stands still chooses; let them differ in media"
            )
        return None

    return sifted(items, fault, allowed)


def _told(learned: Learned) -> list[int]:
    return [label for label in (*learned.labels, *learned.base_labels) if label != IGNORED]


def dpo_trainer(recipe: PreferenceTuningRecipe, out: Path, ready: Ready, log: RunLog, told: Log) -> Any:
    """TRL's trainer of what is ready, with checkpoints as of every stage.

    Raises:
        ConfigError: TRL is not installed.
    """
    try:
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer
    except ImportError as error:
        raise ConfigError(f"preference tuning needs TRL: pip install 'anygen-mm[train]' ({error})") from None

    class Trainer(WholeCheckpoints, DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # the collator tokenises

        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = ["pair", "ref_chosen_logps", "ref_rejected_logps"]

        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                self.optimizer = optimizer(wrapped.inner, recipe)  # here, since sharding replaces parameters
            return self.optimizer

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(model, inputs, *args, **kwargs)
            check_reached(found[0] if isinstance(found, tuple) else found, wrapped.inner, "pairs")
            return found

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """anygen has its own."""

    model = ready.model
    pairs = [cast(_Pair, one).pair for one in (*ready.train, *ready.held_out)]
    numbers = list(range(len(pairs)))
    steps = recipe.count(len(ready.train))
    arguments = training_arguments(recipe, out, steps, ready)
    arguments |= {"train_sampling_strategy": "random", "prediction_loss_only": True}
    wrapped = PreferenceModel(model)
    config = on_one_gpu(
        DPOConfig(
            **arguments,
            beta=recipe.beta,
            loss_type=[recipe.loss],
            label_smoothing=recipe.label_smoothing,
            precompute_ref_log_probs=True,
            max_length=None,
            gradient_checkpointing=False,
        )
    )
    train_data = on_disk(out / PAIRS / "train", numbers[: len(ready.train)])
    trainer = Trainer(
        model=wrapped,
        args=config,
        train_dataset=train_data,
        eval_dataset=on_disk(out / PAIRS / "held-out", numbers[len(ready.train) :]) if ready.held_out else None,
        processing_class=model.llm.tokenizer,
        data_collator=PairCollator(model, pairs, ready.features, own_words=own_words(model)),
        callbacks=callbacks(recipe, out, ready, told),
        identity=identity(recipe),
        run_log=log,
    )
    wrapped.guarded = False
    return trainer


def on_disk(folder: Path, numbers: list[int]) -> Any:
    """The pairs' numbers as a dataset that all processes share; TRL keeps beside it what the model thought of them."""
    from datasets import Dataset

    if is_main():
        Dataset.from_dict({"pair": numbers}).save_to_disk(folder)
    wait()
    return Dataset.load_from_disk(folder)


def trains(recipe: PreferenceTuningRecipe) -> list[str]:
    """What trains unless the recipe says otherwise: what decides which tokens come."""
    return [part for part in PARTS[:2] if part != "llm" or recipe.peft.kind != "rows"]


def train(recipe: PreferenceTuningRecipe, out: Path) -> dict[str, float]:
    """Runs the recipe and writes `out/model`.

    Returns:
        As `stage_run.run`, and `preferred`, the share of the held-out pairs (without any, of the last batches) whose
        preferred answer gained on the other.

    Raises:
        ConfigError: as `stage_run.run` and `prepare`, or TRL is not installed.
    """
    log = begin_log(recipe, out)
    ready = make_ready(recipe, out, lambda config: prepare(recipe, config), trains(recipe))
    good = {id(one) for one in choosing([*ready.train, *ready.held_out], ready.model, recipe.bad_rows)}
    ready.train, ready.held_out = ([one for one in some if id(one) in good] for some in (ready.train, ready.held_out))
    tell_parameters(ready.model, log)
    told = Log(log)
    figures = {"steps": 0.0}
    if recipe.count(len(ready.train)):
        trainer = dpo_trainer(recipe, out, ready, log, told)
        last = trainer.last_checkpoint() if recipe.resume else None
        figures = conduct(trainer, recipe, ready, told, None if last is None else str(last))
    for name in ("eval_rewards/accuracies", "rewards/accuracies"):
        if name in told.last:
            figures["preferred"] = told.last[name]
            break
    for hook in ready.hooks:
        hook.remove()
    save(recipe, out, ready.model)
    if is_main():
        shutil.rmtree(out / PAIRS, ignore_errors=True)
    log.write(final=True, **figures)
    return figures
