"""`transformers.Trainer` for a stage: its losses, its optimizer, its logs, and what happens when it fails."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from anygen.encoders.base import Encoder
from anygen.errors import CheckpointError, ConfigError, OutOfMemoryError
from anygen.features import Condition
from anygen.generators.base import Generator
from anygen.loading import load_generator
from anygen.model import AnyGenModel, AnyGenOutput
from anygen.training.loop import RunLog
from anygen.training.stage import Ready, StageRecipe
from anygen.training.stage_data import Collator, Item, Mixed, arguments, to
from anygen.training.trainable import groups

logger = logging.getLogger("anygen.training")


class StageTrainer(Trainer):
    """Sums the losses that a recipe weighs, and reports each by itself.

    Args:
        recipe: with the weights.
        generators: output modality -> frozen generator, for the diffusion loss.
    """

    def __init__(self, *args: Any, recipe: StageRecipe, generators: Mapping[str, Generator], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe, self.generators = recipe, generators
        self.noise = torch.Generator().manual_seed(recipe.seed)
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the LM, the alignment and the diffusion loss.

        Raises:
            ConfigError: it is no number; names the batch.
        """
        given = to(inputs, self.args.device)
        output: AnyGenOutput = model(**arguments(given))
        losses = {"lm_loss": output.lm_loss, "alignment_loss": output.alignment_loss}
        if "pictures" in given:
            losses["diffusion_loss"] = diffusion(output, given["pictures"], self.generators, self.noise)
        weights = self.recipe.lm_weight, self.recipe.alignment_weight, self.recipe.diffusion_weight
        named: dict[str, float] = dict(zip(("lm_loss", "alignment_loss", "diffusion_loss"), weights, strict=True))
        terms = [named[name] * loss for name, loss in losses.items() if loss is not None and named[name]]
        if not terms:
            raise ConfigError(f"nothing in this batch is learned: {'; '.join(given['where'][:4])}")
        loss = torch.stack(terms).sum()
        if not bool(loss.isfinite()):
            raise ConfigError(self._no_number(given["where"]))
        if cast(Any, model).training:
            for name, value in losses.items():
                if value is not None:
                    self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
                    self._counts[name] = self._counts.get(name, 0) + 1
        return (loss, output) if return_outputs else loss

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:  # torch lists the shapes
            told = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{resume_from_checkpoint} is of another model: {told}") from None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint holds what trains, and the projectors; of these none may be missing, and none left over."""
        wanted = {name for name, p in cast(Any, self.model).named_parameters() if p.requires_grad}
        faults = [f"missing {name}" for name in load_result.missing_keys if name in wanted]
        faults += [f"unexpected {name}" for name in load_result.unexpected_keys]
        if faults:
            raise CheckpointError(f"the checkpoint is of another model or recipe: {'; '.join(faults[:4])}")

    def _no_number(self, where: list[str]) -> str:
        kept = get_last_checkpoint(str(self.args.output_dir)) if Path(str(self.args.output_dir)).is_dir() else None
        told = "; ".join(where[:8]) + (f" and {len(where) - 8} more" if len(where) > 8 else "")
        return (
            f"the loss is no number at step {self.state.global_step + 1}, for the batch of {told}; "
            + (f"{kept} holds the last good state" if kept else "no checkpoint was written (save_every)")
            + "; lower learning_rate, or look at these rows"
        )


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
        self.last: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called by the trainer."""
        told = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float) and not k.endswith("_per_second")}
        told.pop("epoch", None)
        if told:
            self.last |= told
            self.written.write(step=state.global_step, **told)


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


def training_arguments(recipe: StageRecipe, out: Path, steps: int, *, on_cpu: bool) -> dict[str, Any]:
    """What `TrainingArguments` and its descendants are told for a stage."""
    return dict(
        output_dir=str(out / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=round(recipe.warmup * steps),
        max_grad_norm=recipe.max_grad_norm,
        use_cpu=on_cpu,
        bf16=not on_cpu if recipe.bf16 is None else recipe.bf16,
        activation_checkpointing=False,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        prediction_loss_only=True,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=not on_cpu,
        save_strategy="no" if recipe.save_every is None else "steps",
        save_steps=recipe.save_every or 500,
        save_total_limit=2,
        eval_strategy="no" if recipe.evaluate_every is None else "steps",
        eval_steps=recipe.evaluate_every,
        logging_steps=max(1, min(20, steps // 20)),
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
    if "tensorboard" in recipe.report_to and (board := tensorboard(out / "tensorboard")) is not None:
        callback, writer = board
        told.append(callback)
    if recipe.samples:
        told.append(Samples(recipe, ready, out / "samples", writer))
    if recipe.retention_every is not None:
        told.append(Retention(recipe, ready.model, log, writer))
    return told


def fit(recipe: StageRecipe, out: Path, ready: Ready, log: RunLog) -> dict[str, float]:
    """Trains what is ready. Arguments, result and errors as of `stage_run.run`."""
    model, on_cpu = ready.model, ready.model.device.type == "cpu"
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
    if recipe.activation_checkpointing:
        base: Any = model.llm.base  # transformers renames the method
        getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)({"use_reentrant": False})
    told = Log(log)
    trainer = StageTrainer(
        model=model,
        args=TrainingArguments(**training_arguments(recipe, out, steps, on_cpu=on_cpu)),
        train_dataset=data,
        eval_dataset=measured if ready.held_out else None,
        data_collator=collator,
        optimizers=(optimizer(model, recipe), None),
        callbacks=callbacks(recipe, out, ready, told),
        recipe=recipe,
        generators=generators,
    )
    return conduct(trainer, recipe, ready, told)


def conduct(trainer: Trainer, recipe: StageRecipe, ready: Ready, told: Log) -> dict[str, float]:
    """Measures, trains and measures again; result as of `stage_run.run`.

    Raises:
        OutOfMemoryError: says what to lower.
    """
    trainer.remove_callback(PrinterCallback)
    if not sys.stderr.isatty():
        trainer.remove_callback(ProgressCallback)
    figures: dict[str, float] = {}
    folder = Path(str(trainer.args.output_dir))
    last = get_last_checkpoint(str(folder)) if recipe.resume and folder.is_dir() else None
    try:
        if ready.held_out:
            figures["held_out_before"] = trainer.evaluate()["eval_loss"]
        trainer.train(resume_from_checkpoint=last)
        if ready.held_out:
            figures["held_out"] = trainer.evaluate()["eval_loss"]
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(
            f"not enough memory ({str(error).splitlines()[0][:160]}); lower batch_size ({recipe.batch_size}) and raise "
            f"accumulate ({recipe.accumulate}) by as much, lower max_tokens ({recipe.max_tokens}), set "
            "activation_checkpointing: true, or take peft.kind: qlora"
        ) from error
    ready.model.eval()
    figures |= {"steps": float(trainer.state.global_step), "loss": told.last.get("loss", float("nan"))}
    if "retention" in told.last:
        figures["retention"] = told.last["retention"]
    return figures


def optimizer(model: AnyGenModel, recipe: StageRecipe) -> torch.optim.Optimizer:
    """AdamW, each part at its rate."""
    told = groups(model, recipe.learning_rate, recipe.learning_rates, recipe.weight_decay)
    return torch.optim.AdamW(told, lr=recipe.learning_rate, betas=(0.9, 0.98))


__all__ = ["Item", "Log", "StageTrainer", "conduct", "diffusion", "fit", "optimizer"]
