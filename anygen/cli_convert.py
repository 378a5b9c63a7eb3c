"""`anygen convert`: a published checkpoint -> a directory in anygen's layout."""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Mapping


def nextgpt(options: argparse.Namespace) -> int:
    """Converts a checkpoint of NExT-GPT and prints what went where."""
    from anygen.convert_nextgpt import convert_nextgpt

    report = convert_nextgpt(
        options.checkpoint,
        options.out,
        llm=options.llm,
        encoder=options.encoder,
        lora_alpha=options.lora_alpha,
        overwrite=options.overwrite,
    )
    rows = [(part, str(tensors), f"{size:,}") for part, (tensors, size) in report.parts.items()]
    _print(f"NExT-GPT {report.line}: {', '.join(report.files)}", ("part", "tensors", "parameters"), rows)
    coverage = report.coverage
    print(
        f"matched {len(coverage.matched)}, missing {len(coverage.missing)}, unexpected {len(coverage.unexpected)}, "
        f"of another shape {len(coverage.shapes)}, superseded by a later stage {len(report.superseded)}"
    )
    print(f"words kept: {report.kept_tokens:,}; signal rows: {report.signal_rows}; {_changes(report.changed_rows)}")
    print(f"written to {options.out}; all of this stands in conversion.json")
    return 0


def imagebind(options: argparse.Namespace) -> int:
    """Converts ImageBind's release and prints what each trunk has."""
    from anygen.convert import convert_imagebind

    coverage = convert_imagebind(
        options.checkpoint, options.out, vocabulary=options.vocabulary, overwrite=options.overwrite
    )
    trunks: dict[str, list[int]] = defaultdict(list)
    for key, shape in coverage.matched.items():
        trunks[key.split(".")[1]].append(math.prod(shape))
    rows = [(trunk, str(len(sizes)), f"{sum(sizes):,}") for trunk, sizes in trunks.items()]
    _print("ImageBind", ("trunk", "tensors", "numbers"), rows)
    if options.vocabulary is None:
        print("no --vocabulary was given: the text trunk has no tokenizer and cannot be used by itself")
    print(f"written to {options.out}")
    return 0


def _changes(changed: Mapping[str, int] | None) -> str:
    if changed is None:
        return "rows of words were not compared (the LLM's weights are not at hand), all are kept"
    told = ", ".join(f"{count:,} of {name}" for name, count in changed.items())
    return f"rows of words that differ from the LLM's, kept: {told}"


def _print(title: str, heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
