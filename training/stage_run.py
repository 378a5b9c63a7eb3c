"""Runs a stage from its recipe to `out/model`."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from anygen.model import AnyGenModel
from anygen.model_config import SourceConfig
from anygen.training.adapters import CHECKPOINTS, finish, forget_checkpoints
from anygen.training.loop import RunLog, is_main
from anygen.training.stage import Prepare, StageRecipe, make_ready
from anygen.training.stage_trainer import CURVES, fit
from anygen.training.trainable import own_weights


def run(recipe: StageRecipe, out: Path, prepare: Prepare, trains: Sequence[str]) -> dict[str, float]:
    """Runs a stage and writes `out/model`.

    Args:
        recipe: of the stage.
        out: folder of the results.
        prepare: reads and checks the data.
        trains: the stage's own choice of parts.

    Returns:
        `steps`, `loss` (the last that was logged), `held_out_before` and `held_out` losses, `retention` if asked for.

    Raises:
        ConfigError: something named is not there, too many rows are bad, or the loss became no number.
        OutOfMemoryError: the device has too little memory.
    """
    log = begin_log(recipe, out)
    ready = make_ready(recipe, out, prepare, trains)
    tell_parameters(ready.model, log)
    figures = fit(recipe, out, ready, log)
    for hook in ready.hooks:
        hook.remove()
    save(recipe, out, ready.model)
    log.write(final=True, **figures)
    return figures


def begin_log(recipe: StageRecipe, out: Path) -> RunLog:
    """`out/training.jsonl`; of an earlier run that is not gone on with it goes, with checkpoints and curves."""
    log, folder = RunLog(out, "training"), out / CHECKPOINTS
    if not (recipe.resume and folder.is_dir() and get_last_checkpoint(str(folder))):
        log.restore("")
        forget_checkpoints(out)
        if is_main():
            shutil.rmtree(out / CURVES, ignore_errors=True)
    return log


def tell_parameters(model: AnyGenModel, log: RunLog) -> None:
    """Writes the table of trainable parameters, part by part, to the log and, as a table, to stderr."""
    counts = model.trainable_parameters()
    for name, (trainable, total) in counts.items():
        log.write(part=name, trainable=trainable, parameters=total)
    print_table(counts)


def print_table(counts: Mapping[str, tuple[int, int]], console: Any = None) -> None:
    """Part -> (trainable, all) parameters, as a table; on stderr by default."""
    from rich.console import Console
    from rich.table import Table

    table = Table("part", title="parameters")
    for column in ("trainable", "all", "share"):
        table.add_column(column, justify="right")
    total = (sum(t for t, _ in counts.values()), sum(a for _, a in counts.values()))
    for name, (trainable, every) in {**counts, "all": total}.items():
        table.add_row(name, f"{trainable:,}", f"{every:,}", f"{trainable / max(every, 1):.2%}")
    console = console or Console(file=sys.stderr, width=None if sys.stderr.isatty() else 100)
    console.print(table)


def save(recipe: StageRecipe, out: Path, model: AnyGenModel) -> Path:
    """Writes `out/model`; parts whose own weights changed are written beside the frozen ones, under new names."""
    changed = own_weights(model)
    settings, origin = model.settings, model.origin
    for name in sorted(changed):
        path = name.replace(".", "/")
        while origin is not None and (origin / path).exists():
            path += "-trained"
        if name == "llm":
            settings = replace(settings, llm=SourceConfig(path=path))
            continue
        modality = name.partition(".")[2]
        one = settings.modalities[modality]
        assert one.input is not None
        encoder = replace(one.input.encoder, source=SourceConfig(path=path))
        one = replace(one, input=replace(one.input, encoder=encoder))
        settings = replace(settings, modalities=settings.modalities | {modality: one})
    model.settings = settings
    written = finish(model.requires_grad_(False), out, name=recipe.name)
    forget_checkpoints(out)
    return written
