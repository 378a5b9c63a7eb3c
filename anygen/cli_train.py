"""`anygen train`, `anygen eval`, `anygen data build`: what the folder `training` does."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path

from anygen.errors import ConfigError

DATASETS = {
    "icons": ("anygen.training.icons", "npm"),
    "animations": ("anygen.training.animations", "npm"),
    "sounds": ("anygen.training.sounds", "sounds"),
}
"""Name of a dataset -> the module that builds it, and its packages' folder in the cache."""


def train(options: argparse.Namespace) -> int:
    """Runs a recipe; its log goes to stderr, its last figures to stdout, of several processes the first one's."""
    from anygen.training.loop import is_main, leave
    from anygen.training.recipes import dry_run, run

    if options.dry_run:
        with _logged(logging.WARNING):
            dry_run(Path(options.recipe), options.overrides)
        return 0
    with redirect_stdout(sys.stderr), _logged(logging.INFO):
        figures = run(Path(options.recipe), options.overrides)
    leave()
    if is_main():
        for name, value in figures.items():
            print(f"{name}: {value:.6g}")
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """Measures a model; exit code 0 whether or not the bars are met, the table says so."""
    from rich.console import Console

    with redirect_stdout(sys.stderr), _logged(logging.WARNING if options.json else logging.INFO):
        from anygen.loading import memory
        from anygen.pipeline import AnyGenPipeline
        from anygen.training.evaluation import evaluate as measure
        from anygen.training.evaluation_comparison import (
            check_comparable,
            compare,
            comparison_table,
            read_result,
        )

        before = None
        if options.compare is not None:  # before anything takes long
            before = read_result(Path(options.compare))
            check_comparable(Path(options.compare), before, limit=options.limit, seed=options.seed)
        pipe = AnyGenPipeline.from_pretrained(options.model, device=options.device, dtype=options.dtype)
        with memory(f"lower --batch-size {options.batch_size}, or take --dtype bfloat16 or --device cpu"):
            result = measure(
                pipe.model,
                pipe.generators,
                Path(options.data),
                suite=options.suite,
                only=options.only,
                batch_size=options.batch_size,
                limit=options.limit,
                seed=options.seed,
                report=None if options.report is None else Path(options.report),
            )
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 120)
    if options.json:
        print(json.dumps(result.to_dict()), flush=True)
    else:
        console.print(result.table())
    if before is not None:  # only now: whatever cannot be compared, nothing that was measured is lost
        console.print(comparison_table(f"since {options.compare}", compare(before.rows, result.rows)))
    return 0


def build_data(options: argparse.Namespace) -> int:
    """Builds a dataset; packages are kept in the cache between builds."""
    if options.name not in DATASETS:
        raise ConfigError(f"there is no dataset '{options.name}'; known: {', '.join(DATASETS)}")
    from anygen.environment import home

    module, cache = DATASETS[options.name]
    with redirect_stdout(sys.stderr), _logged(logging.INFO):
        checksum = import_module(module).build(Path(options.out), home() / cache)
    print(f"{options.out}: checksum {checksum}")
    return 0


@contextmanager
def _logged(level: int) -> Iterator[None]:
    """anygen's log on stderr; afterwards, who imports the command line has its own logging again."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("anygen")
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])
