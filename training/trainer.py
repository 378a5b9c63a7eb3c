"""`transformers.Trainer` on one process or many, whose runs can be killed: whole checkpoints, and errors that help.

- A checkpoint is written beside its place and renamed, so that it is there whole or not at all; the last two are kept.
- A run that begins again in the same folder goes on from the last one, bit for bit as if it had not been interrupted.
- Losses are means over the batches of all processes together, so that their number changes nothing.
- A loss that is no number, a full disk, or a checkpoint that does not fit ends the run with what to do.

Under `accelerate launch` each process trains on its share of a batch; see `training/accelerate/`.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from anygen.component import check_fit, read_safetensors
from anygen.errors import CheckpointError, ConfigError, OutputError
from anygen.files import is_disk_full
from anygen.model import AnyGenOutput
from anygen.training.loop import RunLog, is_main, world_size
from anygen.training.sharding import check_shardable, load_shards, name_layers, touching, whole

ITEMS, RUN = "items", "run.json"
"""The key under which a batch carries its items' numbers; the file of a checkpoint that says of which run it is."""
KEPT, LAZY = 2, 64
"""Checkpoints that are kept; steps after which a GPU is asked whether their losses are numbers."""
UNIMPORTANT = ("name", "resume", "checkpoint_steps")
"""Keys of a recipe that may differ from those of the run that is gone on with."""


class Numbered(Dataset[tuple[int, Any]]):
    """A dataset whose items carry their numbers, so that a bad batch can be named."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self.data[number]

    def told(self, number: int) -> str:
        """An item in words; a dataset may have a method `told` for it."""
        told: Callable[[int], str] | None = getattr(self.data, "told", None)
        return f"item {number}" + (f" ({told(number)})" if told is not None else "")

    @staticmethod
    def collator(collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[tuple[int, Any]]], dict[str, Any]]:
        """The collator of the items -> that of numbered ones."""
        return lambda rows: collate([item for _, item in rows]) | {ITEMS: [number for number, _ in rows]}


class WholeCheckpoints(Trainer):
    """Checkpoints that are there whole or not at all, are of this run, and fit this module.

    Args:
        identity: what a checkpoint has to have been trained with.
        run_log: kept in checkpoints, and set back with them.
    """

    def __init__(
        self, *args: Any, identity: Mapping[str, Any] | None = None, run_log: RunLog | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.identity, self.run_log = dict(identity or {}), run_log
        self._partial: Path | None = None

    def check(self) -> None:
        """Asked before a checkpoint is written; raises what speaks against it."""

    def _good(self) -> str:
        folder = Path(str(self.args.output_dir))
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        return f"{last} is good" if last else "there is no checkpoint yet"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial) if self._partial is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes `checkpoint-STEP`, whole or not at all.

        Raises:
            ConfigError: losses or weights are no numbers; the checkpoint before stays.
            OutputError: the disk is full, or cannot be written to.
        """
        self.check()
        trained = [p for group in cast(Any, self.optimizer).param_groups for p in group["params"]]
        if not all(bool((p.full_tensor() if hasattr(p, "full_tensor") else p).isfinite().all()) for p in trained):
            told = f"weights are no numbers after step {self.state.global_step}; lower the learning rate"
            raise ConfigError(f"{told}; {self._good()}")
        folder = Path(str(self.args.output_dir))
        partial, name = folder / ".partial", f"checkpoint-{self.state.global_step}"
        try:
            if is_main():
                shutil.rmtree(partial, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._partial = partial
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if is_main():
                self._publish(partial / name, folder / name)
            self.accelerator.wait_for_everyone()
        except Exception as error:
            if not _is_of_disk(error):
                raise
            free = shutil.disk_usage(folder).free / 1e6
            why = "the disk is full" if is_disk_full(error) else str(error).splitlines()[0][:200]
            raise OutputError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {folder}: {why} ({free:.0f} MB "
                f"are free); nothing of it was left behind, {self._good()}; make room and start again, to go on from it"
            ) from error
        finally:
            self._partial = None
            if is_main():
                shutil.rmtree(partial, ignore_errors=True)

    def _publish(self, written: Path, place: Path) -> None:
        log = self.run_log.text() if self.run_log is not None else ""
        (written / RUN).write_text(json.dumps({"identity": self.identity, "log": log}), encoding="utf-8")
        for file in (path for path in written.rglob("*") if path.is_file()):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        shutil.rmtree(place, ignore_errors=True)
        os.rename(written, place)
        others = sorted(place.parent.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        for old in others[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Strictly.

        Raises:
            CheckpointError: it is of a model of other parts or sizes; lists them.
        """
        target: nn.Module = self.model if model is None else model  # type: ignore[assignment]
        if self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.is_fsdp_enabled:
            return load_shards(target, Path(resume_from_checkpoint))
        state = read_safetensors(Path(resume_from_checkpoint))
        check_fit(target.state_dict(), state, f"the checkpoint {resume_from_checkpoint}")
        target.load_state_dict(state, strict=False)  # frozen weights are not in it

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError, RuntimeError, EOFError, OSError, UnpicklingError) as error:
            why = str(error).splitlines()[0]
            raise CheckpointError(f"the optimizer's state in {checkpoint} does not fit, or is broken: {why}") from error

    def last_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, of a run with the same identity; None without one.

        Raises:
            CheckpointError: it is of another run; names what differs.
        """
        folder = Path(str(self.args.output_dir))
        if not folder.is_dir() or (last := get_last_checkpoint(str(folder))) is None:
            return None
        run = json.loads((Path(last) / RUN).read_text(encoding="utf-8"))
        then = run["identity"]
        differ = [key for key in {**then, **self.identity} if then.get(key) != self.identity.get(key)]
        if differ:
            told = ", ".join(f"{key} was {then.get(key)}, is {self.identity.get(key)}" for key in differ[:4])
            raise CheckpointError(
                f"{last} is of another run: {told}; begin anew with resume=false, or take another folder (out)"
            )
        if self.run_log is not None:
            self.run_log.restore(run["log"])
        return Path(last)


class SafeTrainer(WholeCheckpoints):
    """Whole checkpoints, losses of all processes together, and bad batches by their names.

    Args:
        groups: of parameters, as AdamW takes them.
        weight_decay: AdamW's.
        train_dataset: a `Numbered`, its batches collated by `Numbered.collator`.
    """

    def __init__(
        self,
        *args: Any,
        groups: Sequence[dict[str, Any]],
        weight_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.groups, self.decay = groups, weight_decay
        self._recent: list[tuple[int, list[int], Tensor]] = []

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW; made here, since sharding replaces parameters."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(list(self.groups), betas=(0.9, 0.98), weight_decay=self.decay)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The module's loss, as the mean over what all processes have of the batch.

        Raises:
            ConfigError: as `check`.
        """
        items = inputs.pop(ITEMS, [])
        output = model(**inputs)
        loss = self.mean_of_all(output, inputs) if self.accelerator.num_processes > 1 else output["loss"]
        self._recent.append((self.state.global_step + 1, items, loss.detach()))
        if loss.device.type == "cpu" or len(self._recent) >= LAZY:
            self.check()
        return (loss, output) if return_outputs else loss

    def mean_of_all(self, output: Any, inputs: Mapping[str, Any]) -> Tensor:
        """This process's part of the loss of the whole batch, times the number of processes, whose gradients DDP
        averages. The LM loss is a mean over learned tokens, the alignment loss one over runs (of one modality)."""
        if not isinstance(output, AnyGenOutput):
            return output["loss"]  # of as many items on every process
        device, model = self.args.device, self.accelerator.unwrap_model(self.model)
        labels, conditions = inputs.get("labels"), inputs.get("conditions") or {}
        learned = [labels] if labels is not None else []
        learned += [inputs["words"]["labels"]] if "words" in inputs else []
        tokens = sum(((some[:, 1:] != -100).sum() for some in learned), torch.zeros((), device=device))
        runs = sum(len(next(iter(tensors.values()))) for tensors in conditions.values())
        own = torch.stack([tokens.float(), torch.tensor(float(runs), device=device)])
        together = cast(Tensor, self.accelerator.reduce(own, "sum"))
        shares = own * self.accelerator.num_processes / together.clamp(min=1)
        loss = torch.zeros((), device=device)
        if output.lm_loss is not None:
            loss = loss + shares[0] * output.lm_loss
        if output.alignment_loss is not None:
            loss = loss + shares[1] * model.alignment_weight * output.alignment_loss
        return loss

    def check(self) -> None:
        """Whether the losses since the last check are numbers.

        Raises:
            ConfigError: one is not; names the step, its batch, and the last good checkpoint.
        """
        recent, self._recent = self._recent, []
        if not recent or bool((finite := torch.stack([loss for *_, loss in recent]).isfinite()).all()):
            return
        step, items, _ = recent[int(finite.logical_not().nonzero()[0])]
        data: Any = self.train_dataset
        told = ", ".join(data.told(number) for number in items[:8])
        more = f" and {len(items) - 8} more" if len(items) > 8 else ""
        raise ConfigError(
            f"the loss is no number at step {step}; lower the learning rate, or look at the batch: {told}{more}; "
            f"{self._good()}"
        )


def on_one_gpu(arguments: Any) -> Any:
    """The same `TrainingArguments`, before a trainer takes them: several GPUs that one process sees would multiply its
    batches and be `DataParallel`, which splits what cannot be split."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def with_equal_gradients(trainer: Trainer, module: nn.Module) -> AbstractContextManager[None]:
    """`touching` a module that is trained, where processes reduce the gradients that each of them has."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return nullcontext()
    return touching(module, autocast=torch.bfloat16 if trainer.is_deepspeed_enabled and trainer.args.bf16 else None)


def _is_of_disk(error: Exception) -> bool:
    """torch and safetensors tell a failed write by messages alone."""
    told = str(error)
    return (
        isinstance(error, OSError) or is_disk_full(error) or "PytorchStreamWriter" in told or "unexpected pos" in told
    )


class Watch(TrainerCallback):
    """Writes the losses into the run's log."""

    def __init__(self, log: RunLog) -> None:
        self.log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called by the trainer."""
        if logs and (loss := logs.get("loss")) is not None:
            self.log.write(step=state.global_step, loss=loss, learning_rate=logs.get("learning_rate"))


def identity_of(recipe: Any) -> dict[str, Any]:
    """What of a recipe decides the result."""
    return {key: value for key, value in recipe.to_dict().items() if key not in UNIMPORTANT}


def fit(
    module: nn.Module,
    data: Dataset[Any],
    collator: Any,
    parameters: Sequence[dict[str, Any]],
    log: RunLog,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    weight_decay: float = 0.0,
    phase: str = "training",
    checkpoint_steps: int = 0,
    resume: bool = True,
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Trains with AdamW, a short warm-up and a cosine to zero.

    Args:
        module: whose forward pass returns a loss.
        data: at least `batch_size` items; may tell items in words by a method `told(number)`.
        collator: items -> the arguments of the forward pass.
        parameters: groups, as AdamW takes them, with their learning rates.
        log: told of every twentieth of the steps, or oftener; checkpoints lie beside it.
        steps: how many.
        batch_size: items of a step, of all processes together.
        seed: of the order.
        weight_decay: AdamW's.
        phase: names the folder of its checkpoints, for a run with several.
        checkpoint_steps: how often one is written; 0 writes none.
        resume: goes on from the last one, if there is one.
        identity: what a checkpoint to go on from has to have been trained with.

    Raises:
        ConfigError: the loss became no number, or a batch cannot be spread over the processes.
        CheckpointError: there is a checkpoint of another run or model.
        OutputError: a checkpoint cannot be written.
    """
    world = world_size()
    if batch_size % world:
        raise ConfigError(f"a batch of {batch_size} cannot be spread over {world} processes; choose a multiple of them")
    every = max(1, min(steps // 20, checkpoint_steps or steps))
    folder = log.path.parent / "checkpoints" / phase
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size // world,
        use_cpu=not torch.cuda.is_available(),
        lr_scheduler_type="cosine",
        warmup_steps=min(20, max(1, steps // 10)),
        max_grad_norm=1.0,
        remove_unused_columns=False,
        save_strategy="steps" if checkpoint_steps else "no",
        save_steps=max(every, checkpoint_steps // every * every),  # at a report, since means begin anew there
        report_to=[],
        logging_steps=every,
        logging_nan_inf_filter=False,
        seed=seed,
        data_seed=seed,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_drop_last=True,
    )
    numbered = Numbered(data)
    trainer = SafeTrainer(
        model=module,
        args=on_one_gpu(arguments),
        train_dataset=numbered,
        data_collator=Numbered.collator(collator),
        callbacks=[Watch(log)],
        groups=parameters,
        weight_decay=weight_decay,
        identity=identity,
        run_log=log,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_fsdp_enabled:
        check_shardable(module)
        name_layers(module)
    if checkpoint_steps and not resume and is_main():
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    last = trainer.last_checkpoint() if checkpoint_steps and resume else None
    if last is not None and int(last.name.split("-")[1]) >= steps:
        trainer._load_from_checkpoint(str(last))
    else:
        with with_equal_gradients(trainer, module):
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        trainer.check()
    whole(module).eval()
