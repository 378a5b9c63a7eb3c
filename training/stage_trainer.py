"""`transformers.Trainer` for a stage: its losses, its optimizer, its logs, and what happens when it fails."""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from anygen.encoders.base import Encoder
from anygen.errors import ConfigError
from anygen.features import Condition
from anygen.generators.base import Generator
from anygen.loading import load_generator, memory
from anygen.model import AnyGenModel, AnyGenOutput
from anygen.training.adapters import CHECKPOINTS
from anygen.training.kept_states import KeptStates, constant_states
from anygen.training.loop import RunLog, world_size
from anygen.training.sharding import check_shardable, name_layers, whole
from anygen.training.stage import Ready, StageRecipe
from anygen.training.stage_data import Collator, Item, Mixed, arguments, to
from anygen.training.trainable import beginning, clean, groups, own_words
from anygen.training.trainer import ITEMS, LAZY, Numbered, SafeTrainer, on_one_gpu, with_equal_gradients

logger = logging.getLogger("anygen.training")

CURVES = "tensorboard"
"""Folder of a run."""
FREE = (
    "name",
    "cache",
    "verify_cache",
    "workers",
    "resume",
    "save_every",
    "evaluate_every",
    "report_to",
    "samples",
    "sample_every",
    "retention_every",
    "retention_probes",
)
"""Keys of a recipe that decide nothing of the result."""
UNTOLD = ("epoch", "_per_second", "_preparation_time", "_runtime", "total_flos")
"""Ends of the names of the trainer's figures that are left out of the run's own log."""


class StageTrainer(SafeTrainer):
    """Sums the losses that a recipe weighs, and reports each by itself.

    Args:
        recipe: with the weights.
        generators: output modality -> frozen generator, for the diffusion loss.
    """

    def __init__(self, *args: Any, recipe: StageRecipe, generators: Mapping[str, Generator], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe, self.generators = recipe, generators
        self.noise = torch.Generator().manual_seed(recipe.seed)
        self.states: KeptStates | None = None
        """Of the runs, where they are constants."""
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the LM, the alignment and the diffusion loss.

        Raises:
            ConfigError: as `SafeTrainer.check`, or a batch holds nothing to learn.
        """
        items = inputs.pop(ITEMS, [])
        given = to(inputs, self.args.device)
        if self.states is not None:
            output = self.states.output(given)
        else:
            output = model(**arguments(given))
        parts = {"lm_loss": output.lm_loss, "alignment_loss": output.alignment_loss}
        if output.lm_loss is not None:
            output.lm_loss = self.recipe.lm_weight * output.lm_loss
        if all(loss is None for loss in parts.values()):
            raise ConfigError(f"nothing is learned in the batch of {self._told(items)}")
        loss = self.mean_of_all(output, given)
        if "pictures" in given:
            parts["diffusion_loss"] = diffusion(output, given["pictures"], self.generators, self.noise)
            loss = loss + self.recipe.diffusion_weight * parts["diffusion_loss"]
        check_reached(loss, cast(Any, model), self._told(items))
        if cast(Any, model).training:
            for name, value in parts.items():
                if value is not None:
                    self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
                    self._counts[name] = self._counts.get(name, 0) + 1
            self._recent.append((self.state.global_step + 1, items, loss.detach()))
            if loss.device.type == "cpu" or len(self._recent) >= LAZY:
                self.check()
        return (loss, output) if return_outputs else loss

    def _told(self, items: list[int]) -> str:
        return ", ".join(cast(Any, self.train_dataset).told(number) for number in items[:4]) or "held-out items"

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss alone."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of the parts of the loss since the last report."""
        if "loss" in logs:
            logs |= {name: total / self._counts[name] for name, total in self._sums.items()}
            self._sums, self._counts = {}, {}
        super().log(logs, *args, **kwargs)


def check_reached(loss: Tensor, model: torch.nn.Module, items: str) -> None:
    """Of a step of training, whether anything that trains took part in its loss.

    Raises:
        ConfigError: nothing did.
    """
    if model.training and torch.is_grad_enabled() and not loss.requires_grad:
        parts = sorted({".".join(beginning(clean(name))) for name, p in model.named_parameters() if p.requires_grad})
        raise ConfigError(f"nothing that trains ({', '.join(parts)}) takes part in the batch of {items}: see trains")


def diffusion(
    output: AnyGenOutput, pictures: Mapping[str, Any], generators: Mapping[str, Generator], noise: torch.Generator
) -> Tensor:
    """The mean over modalities of the conditional diffusion loss (survey eq. 5) of runs whose media are there.

    Args:
        output: with the conditions of all runs.
        pictures: modality -> (numbers of runs, their media).
        generators: modality -> frozen generator; gradients flow through it into the condition.
        noise: on the CPU.
    """
    losses = []
    for modality, (numbers, media) in pictures.items():
        made = Condition(cast(dict[str, Tensor], (output.conditions or {})[modality]))[torch.tensor(numbers)]
        generator = generators[modality]
        device = next(iter(made.tensors.values())).device
        drawn = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=noise)))
        losses.append(generator.denoising_loss(made, media, generator=drawn))
    return torch.stack(losses).mean()


class Log(TrainerCallback):
    """Every report of the trainer, as a line of the run's own log."""

    def __init__(self, log: RunLog) -> None:
        self.written = log
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def remember(self) -> None:
        """Takes the first figures from the log of the run that is gone on with."""
        for line in self.written.text().splitlines():
            row: dict[str, float] = json.loads(line)
            self.first = {**row, **self.first}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called by the trainer."""
        figures = (logs or {}).items()
        told: dict[str, Any] = {k: v for k, v in figures if isinstance(v, int | float) and not k.endswith(UNTOLD)}
        if told:
            self.first, self.last = told | self.first, self.last | told
            self.written.write(step=state.global_step, **told)


class Bar(ProgressCallback):
    """The trainer's progress bar; figures are in the run's own log, which is printed too."""

    def on_log(self, *_: Any, **__: Any) -> None:
        """Nothing."""


def frozen_generators(recipe: StageRecipe, ready: Ready) -> dict[str, Generator]:
    """The generators of the diffusion loss, frozen; none without it.

    Raises:
        ConfigError: min-SNR weights are asked of a generator that has none.
    """
    if not recipe.diffusion_weight:
        return {}
    made, device = {}, ready.model.device
    for modality in ready.conditions:
        generator: Any = load_generator(ready.directory, ready.model.settings.outputs[modality], device, torch.float32)
        for part in ("unet", "vae", "vocoder"):
            if (module := getattr(generator, part, None)) is not None:
                module.requires_grad_(False).eval()
        if recipe.min_snr is not None:
            if not hasattr(generator, "min_snr"):
                raise ConfigError(f"min_snr: the generator of {modality} weighs all times alike")
            generator.min_snr = recipe.min_snr
        made[modality] = generator
    return made


def training_arguments(recipe: StageRecipe, out: Path, steps: int, ready: Ready) -> dict[str, Any]:
    """What `TrainingArguments` and its descendants are told for a stage.

    Raises:
        ConfigError: a batch cannot be spread over the processes.
    """
    world = world_size()
    if recipe.batch_size % world:
        told = f"a batch of {recipe.batch_size} cannot be spread over {world} processes"
        raise ConfigError(f"{told}; choose a multiple of them")
    if recipe.evaluate_every is not None and not ready.held_out:
        logger.warning("evaluate_every=%d: no row is held out, so that nothing is measured", recipe.evaluate_every)
    on_cpu = ready.model.device.type == "cpu"
    every = max(1, min(20, steps // 20, recipe.save_every or steps))
    return dict(
        output_dir=str(out / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size // world,
        per_device_eval_batch_size=recipe.batch_size // world,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=round(recipe.warmup * steps),
        max_grad_norm=recipe.max_grad_norm,
        use_cpu=on_cpu,
        bf16=not on_cpu if recipe.bf16 is None else recipe.bf16,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        prediction_loss_only=True,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=not on_cpu,
        save_strategy="no" if recipe.save_every is None else "steps",
        save_steps=max(every, (recipe.save_every or 500) // every * every),  # at a report, where means begin anew
        save_total_limit=2,
        eval_strategy="no" if recipe.evaluate_every is None or not ready.held_out else "steps",
        eval_steps=recipe.evaluate_every,
        logging_steps=every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=[name for name in recipe.report_to if name != "tensorboard"],
        disable_tqdm=not sys.stderr.isatty(),
        seed=recipe.seed,
        data_seed=recipe.seed,
    )


def callbacks(recipe: StageRecipe, out: Path, ready: Ready, log: Log) -> list[TrainerCallback]:
    """What is told while a stage runs: the run's log, TensorBoard, samples, retention."""
    from anygen.training.stage_watch import Retention, Samples, tensorboard

    told: list[TrainerCallback] = [log]
    writer = None
    if "tensorboard" in recipe.report_to and (board := tensorboard(out / CURVES)) is not None:
        callback, writer = board
        told.append(callback)
    if recipe.samples:
        told.append(Samples(recipe, ready, out / "samples", writer))
    if recipe.retention_every is not None:
        told.append(Retention(recipe, ready.model, log, writer))
    return told


def fit(recipe: StageRecipe, out: Path, ready: Ready, log: RunLog) -> dict[str, float]:
    """Trains what is ready. Arguments, result and errors as of `stage_run.run`."""
    model = ready.model
    steps = recipe.count(len(ready.train))
    if steps == 0:
        return {"steps": 0.0}
    live = {modality: cast(Encoder, model.encoders[modality]) for modality in ready.live}
    generators = frozen_generators(recipe, ready)
    collator = Collator(
        ready.features,
        ready.conditions,
        encoders=live,
        pictures=list(generators),
        words=ready.words and recipe.lm_weight > 0,
        own_words=own_words(model),
    )
    lengths = None if ready.lengths is None else ready.lengths.__getitem__
    data = Mixed(
        ready.train,
        ready.make,
        count=steps * recipe.batch_size * recipe.accumulate,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        text=ready.text,
        share=ready.share,
        lengths=(lambda item: lengths(id(item))) if lengths is not None else (lambda item: item.length),
    )
    measured = Mixed(ready.held_out, ready.make, count=len(ready.held_out), batch_size=1, seed=recipe.seed + 1)
    told = Log(log)
    numbered = Numbered(data)
    trainer = StageTrainer(
        model=model,
        args=on_one_gpu(TrainingArguments(**training_arguments(recipe, out, steps, ready))),
        train_dataset=numbered,
        eval_dataset=Numbered(measured) if ready.held_out else None,
        data_collator=Numbered.collator(collator),
        callbacks=callbacks(recipe, out, ready, told),
        groups=groups(model, recipe.learning_rate, recipe.learning_rates, recipe.weight_decay),
        identity=identity(recipe),
        run_log=log,
        recipe=recipe,
        generators=generators,
    )
    if constant_states(model) and not (generators or collator.words or ready.features) and world_size() == 1:
        trainer.states = KeptStates(model)
        trainer.states.fill(data[number]["learned"].ids for number in range(len(data)))
    if trainer.is_fsdp_enabled:
        check_shardable(model)
        name_layers(model)
    last = trainer.last_checkpoint() if recipe.resume else None
    return conduct(trainer, recipe, ready, told, None if last is None else str(last))


def identity(recipe: StageRecipe) -> dict[str, Any]:
    """What of a recipe a run that goes on must have in common with the one that it goes on with."""
    return {key: value for key, value in recipe.to_dict().items() if key not in FREE}


def conduct(trainer: Trainer, recipe: StageRecipe, ready: Ready, told: Log, last: str | None) -> dict[str, float]:
    """Measures, trains, perhaps from the checkpoint `last` on, and measures again; result as of `stage_run.run`.

    Raises:
        OutOfMemoryError: says what to lower.
    """
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if sys.stderr.isatty():
        trainer.add_callback(Bar)
    elif trainer.is_world_process_zero():
        begin = "" if last is None else f", on from {Path(last).name}"
        logger.info("%s steps of %s rows%s", f"{trainer.args.max_steps:,}", f"{len(ready.train):,}", begin)
    # Not by `evaluate`, after which several processes would train each by itself. A run that goes on has it in its log.
    trainer.args.eval_on_start = bool(ready.held_out) and last is None
    if last is not None:
        told.remember()
    figures: dict[str, float] = {}
    lower = (
        f"lower batch_size ({recipe.batch_size}) and raise accumulate ({recipe.accumulate}) by as much, lower "
        f"max_tokens ({recipe.max_tokens}), set activation_checkpointing: true, or take peft.kind: qlora"
    )
    with memory(lower), with_equal_gradients(trainer, ready.model):
        trainer.train(resume_from_checkpoint=last)
        if isinstance(trainer, SafeTrainer):
            trainer.check()
        if ready.held_out:
            figures["held_out"] = trainer.evaluate()["eval_loss"]
            figures = {"held_out_before": told.first["eval_loss"]} | figures
    whole(ready.model).eval()
    figures |= {"steps": float(trainer.state.global_step), "loss": told.last.get("loss", float("nan"))}
    if "retention" in told.last:
        figures["retention"] = told.last["retention"]
    return figures


def optimizer(model: AnyGenModel, recipe: StageRecipe) -> torch.optim.Optimizer:
    """AdamW, each part at its rate."""
    told = groups(model, recipe.learning_rate, recipe.learning_rates, recipe.weight_decay)
    return torch.optim.AdamW(told, lr=recipe.learning_rate, betas=(0.9, 0.98))


__all__ = ["Item", "Log", "StageTrainer", "conduct", "diffusion", "fit", "optimizer"]
