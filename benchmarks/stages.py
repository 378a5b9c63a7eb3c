"""What each training stage on a user's data does to everything else that anygen-mini can.

    python benchmarks/stages.py                                  # makes the data, tells the commands
    python benchmarks/stages.py --run all --jobs 8               # trains, measures before and after, tells what moved
    python benchmarks/stages.py --run encoder_alignment --steps 40 --limit 60 --device cpu
    python benchmarks/stages.py --measure --stages preference_tuning           # what was trained before

The data (`stage_data.py`) are made of the built sets in data/. Each stage begins with anygen-mini, so that all may run
side by side. Rows of `anygen eval mini` that hang on nothing that a stage has changed, by the digests of its parts, are
not measured. What was measured is kept in OUT/measured, so that a run that was stopped goes on.
"""

import argparse
import hashlib
import itertools
import json
import os
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import environment, machine
from stage_data import MODEL, make_data

from anygen.loading import choose_device, model_directory
from anygen.training.evaluation_comparison import (
    Change,
    compare,
    comparison_table,
    parse_result,
    together,
)
from anygen.training.evaluation_report import Row


@dataclass(frozen=True, slots=True)
class Stage:
    """A shipped recipe, and what it is told here."""

    recipe: str
    data: tuple[str, ...]
    """KEY=FILE, files of the data's folder."""
    told: tuple[str, ...]
    """Further key=value."""

    def command(self, data: Path, out: Path, steps: int | None) -> list[str]:
        """What follows `anygen`."""
        recipe = Path("training/recipes") / f"{self.recipe}.yaml"
        given = [f"{key}={data / file}" for key, _, file in (pair.partition("=") for pair in self.data)]
        more = [] if steps is None else [f"steps={steps}"]
        where = [f"out={out / self.recipe}", f"cache={out / 'cache'}"]
        return ["train", str(recipe), *given, *where, *self.told, *more]


CHATS = ("data=chats.jsonl", "text_data=talk.jsonl")
GENTLE = ("text_share=0.1", "learning_rate=5.0e-6", "learning_rates.output_projectors=5.0e-6")
"""For parts that know the data's kind already: at four times as much the held-out loss of encoder alignment rose."""
STAGES = {
    "encoder_alignment": Stage(
        "encoder-alignment",
        ("data.image=pictures.jsonl",),
        (
            'questions.image=["What is this?", "What do you see?", "Name this.", "What is shown here?"]',
            "learning_rate=5.0e-6",
        ),
    ),
    "decoder_alignment": Stage(
        "decoder-alignment",
        ("captions.image=captions.txt",),
        ("answer=Here is {caption}.", "learning_rate=2.0e-5", "batch_size=32"),
    ),
    "instruction_tuning": Stage("instruction-tuning", CHATS, (*GENTLE, "learning_rates.llm=5.0e-6")),
    "one_stage": Stage("one-stage", CHATS, (*GENTLE, "learning_rates.llm=5.0e-7", "text_share=0.3")),
    "preference_tuning": Stage("preference-tuning", ("data=preferences.jsonl",), ()),
}
TRIES = 3
"""Of an evaluation beside which others run."""
EVERYTHING = ("image", "modality", "naming", "talk", "controls", "audio", "video", "matrix")
HANGS_ON = {
    "input": ("modality", "naming", "matrix"),
    "output.image": ("image", "controls", "video", "matrix"),
    "output.audio": ("audio", "matrix"),
    "adapter": EVERYTHING,
    "signal_tokens": EVERYTHING,
    "llm": EVERYTHING,
    "encoders": ("modality", "naming", "retrieval", "matrix"),
    "generators": ("image", "controls", "audio", "video", "matrix"),
}
"""Part of a model's directory -> rows of the evaluation that it counts in; one that is not told counts in all."""


def digests(directory: Path) -> dict[str, str]:
    """Part of a model's directory -> digest of its weights; projectors are told one by one."""
    from safetensors import safe_open

    found: dict[str, dict[str, str]] = {}
    for path in directory.rglob("*.safetensors"):
        place = path.relative_to(directory)
        whole = place.parts[0].removesuffix(".safetensors").partition("-0")[0]  # the number of a shard left out
        folder = "" if place.parent == Path() else str(place.parent)
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = whole
                if whole == "projectors":
                    part = ".".join(name.split(".")[:2]) if name.startswith("output.") else "input"
                value = file.get_tensor(name).double().numpy()  # equal in whichever precision it is kept
                found.setdefault(part, {})[f"{folder}:{name}"] = hashlib.sha256(value.tobytes()).hexdigest()
    return {part: hashlib.sha256(str(sorted(one.items())).encode()).hexdigest() for part, one in found.items()}


def touched(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The parts that differ, and the rows that they count in."""
    changed = sorted(part for part in before.keys() | after.keys() if before.get(part) != after.get(part))
    every = (*EVERYTHING, "retrieval")
    counted = {row for part in changed for row in HANGS_ON.get(part, every)}
    return changed, [row for row in every if row in counted]


class Bench:
    """Runs `anygen` as a user does, several commands side by side.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.room: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for told in itertools.islice(itertools.cycle(places(options.device)), options.jobs):
            self.room.put(told)
        self.locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self.before = digests(model_directory(MODEL))

    def anygen(self, arguments: Sequence[str], log: Path) -> str:
        """Runs a command when there is room -> what it prints; `log` takes what it says meanwhile.

        Raises:
            SystemExit: it failed.
        """
        threads = str(max(1, (os.cpu_count() or 1) // self.options.jobs))
        log.parent.mkdir(parents=True, exist_ok=True)
        place = self.room.get()
        env = {"OMP_NUM_THREADS": threads} | environment() | place
        try:
            begin, command = time.perf_counter(), [sys.executable, "-m", "anygen", *arguments]
            with log.open("w", encoding="utf-8") as told:
                ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=told, text=True, env=env, check=False)
        finally:
            self.room.put(place)
        if ended.returncode:
            raise SystemExit(f"anygen {shlex.join(arguments)} failed, see {log}")
        print(f"{time.perf_counter() - begin:6.0f} s  anygen {shlex.join(arguments)}", file=sys.stderr, flush=True)
        return ended.stdout

    def stage(self, name: str) -> dict[str, Any]:
        """Trains if it is to, measures -> what changed, the run's own figures, and the rows of the table."""
        stage, options = STAGES[name], self.options
        folder = self.out / stage.recipe
        if name in options.run:
            self.anygen(stage.command(options.data, self.out, options.steps), folder / "stage.log")
        if not (folder / "model").is_dir():
            raise SystemExit(f"there is no model in {folder}: train it with --run {name}")
        after = digests(folder / "model")
        changed, rows = touched(self.before, after)
        version = hashlib.sha256(json.dumps(after, sort_keys=True).encode()).hexdigest()[:12]
        wanted = [row for row in rows if not options.only or row in options.only]
        name_after = f"{stage.recipe}-{version}"
        measured = self.measure({"before": MODEL, name_after: str(folder / "model")}, wanted)
        changes = [change for row in wanted for change in compare(measured["before", row], measured[name_after, row])]
        changes += all_together(changes)
        figures = json.loads((folder / "training.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        untouched = [row for row in (*EVERYTHING, "retrieval") if row not in rows]
        return {"stage": name, "changed": changed, "untouched": untouched, "figures": figures, "rows": changes}

    def measure(self, models: Mapping[str, str], rows: Sequence[str]) -> dict[tuple[str, str], list[Row]]:
        """Models by name -> (name, kind of row) -> rows of `anygen eval mini --only KIND`, of all seeds together.

        What is stopped early has whole seeds of all of them, and where one fails the others are measured all the same.
        """
        seeds = dict(self.options.seeds)
        counts = {row: seeds.get(row, seeds.get("", 1)) for row in rows}
        asked = [
            (name, row, seed)
            for seed in range(max(counts.values(), default=0))
            for row in rows
            if seed < counts[row]
            for name in models
        ]
        made: dict[tuple[str, str], list[Sequence[Row]]] = defaultdict(list)
        with ThreadPoolExecutor(self.options.jobs) as pool:
            running = [pool.submit(self.kept, models[name], name, row, seed) for name, row, seed in asked]
        for (name, row, _), measured in zip(asked, running, strict=True):
            made[name, row].append(measured.result())
        return {key: [together(same) for same in zip(*measured, strict=True)] for key, measured in made.items()}

    def kept(self, model: str, name: str, row: str, seed: int) -> Sequence[Row]:
        """Measures, if that was not done before; kept under the model's name."""
        limit = self.options.limit
        file = self.out / "measured" / f"{name}-{row}-{'all' if limit is None else limit}-{seed}.json"
        with self.locks[str(file)]:
            if not file.exists():
                file.write_text(self.evaluated(model, row, seed, file.with_suffix(".log")), encoding="utf-8")
        return parse_result(file.read_text(encoding="utf-8")).rows

    def evaluated(self, model: str, row: str, seed: int, log: Path) -> str:
        """What `anygen eval mini` prints of a row; tried again where others had the device's memory for a moment."""
        options = self.options
        told = {"--limit": options.limit, "--device": options.device, "--batch-size": options.batch_size}
        more = [word for name, value in told.items() if value is not None for word in (name, str(value))]
        where = ["--model", model, "--data", str(options.sets / "icons"), "--seed", str(seed)]
        command = ["eval", "mini", "--only", row, "--json", *where, *more]
        for _ in range(TRIES - 1):
            try:
                return self.anygen(command, log)
            except SystemExit as error:
                if "not enough memory" not in log.read_text(encoding="utf-8"):
                    raise
                print(error, file=sys.stderr, flush=True)
        return self.anygen(command, log)


def places(device: str | None) -> list[dict[str, str]]:
    """What the environment of one command after the other tells of GPUs: each has one for itself."""
    if device not in (None, "cuda"):
        return [{"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    return [{"CUDA_VISIBLE_DEVICES": number} for number in numbers or [""]]


def all_together(changes: Sequence[Change]) -> Iterator[Change]:
    """All pairs of the matrix as one row: a cell alone has too few cases to show a point."""
    if pairs := [change for change in changes if re.match("any to any: .* -> ", change.after.name)]:
        before, after = (together(rows, "any to any: all pairs") for rows in zip(*map(sides, pairs), strict=True))
        yield Change(before=before, after=after)


def sides(change: Change) -> tuple[Row, Row]:
    """Before and after."""
    return change.before, change.after


def plain(change: Change) -> dict[str, Any]:
    """For JSON."""
    before, after = sides(change)
    told = {"row": after.name, "cases": after.cases, "before": before.value, "after": after.value, "unit": after.unit}
    return told | {name: getattr(change, name) for name in ("points", "worse", "lost", "won", "chance")}


def show(found: Mapping[str, Any]) -> None:
    """One stage's table."""
    from rich.console import Console

    figures = {k: v for k, v in found["figures"].items() if isinstance(v, int | float) and not isinstance(v, bool)}
    caption = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    caption += f"\nchanged: {', '.join(found['changed']) or 'nothing'}"
    caption += f"\nthe same weights, not measured: {', '.join(found['untouched']) or 'none'}"
    console = Console()
    table = comparison_table(found["stage"], found["rows"], caption)
    (console if console.is_terminal else Console(width=118)).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the data, tells the commands, trains and measures."""

    def names(text: str) -> list[str]:
        chosen = [*STAGES] if text == "all" else text.split(",")
        if unknown := [name for name in chosen if name not in STAGES]:
            raise argparse.ArgumentTypeError(f"there is no stage '{unknown[0]}'; known: all, {', '.join(STAGES)}")
        return chosen

    def seeds(text: str) -> tuple[str, int]:
        row, _, count = text.rpartition("=")
        if row and row not in (*EVERYTHING, "retrieval"):
            raise argparse.ArgumentTypeError(f"there is no row '{row}'; known: {', '.join(EVERYTHING)}, retrieval")
        if not count.isdecimal() or int(count) < 1:
            raise argparse.ArgumentTypeError(f"seeds are counted from 1, got '{count}'")
        return row, int(count)

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stages", type=names, metavar="STAGE,…", help="which are told and measured; default: all")
    parser.add_argument("--run", type=names, metavar="STAGE,…", default=[], help="trains these, or 'all', and measures")
    parser.add_argument("--measure", action="store_true", help="measures what was trained before")
    parser.add_argument("--data", type=Path, default=Path("runs/stages/data"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/stages"), help="default: %(default)s")
    parser.add_argument("--sets", type=Path, default=Path("data"), help="the built sets (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=7680, help="pictures of the data (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of every stage; default: the recipe's")
    parser.add_argument("--limit", type=int, help="cases a row; default: all")
    parser.add_argument(
        "--seeds",
        type=seeds,
        action="append",
        metavar="[ROW=]N",
        default=[],
        help="of cases, counted together, of all rows or of one; may be repeated (default: 1)",
    )
    parser.add_argument("--only", action="append", metavar="ROW", help="measures this row alone; may be repeated")
    parser.add_argument("--batch-size", type=int, metavar="N", help="cases at once; default: the evaluation's")
    parser.add_argument("--device", help="default: CUDA where it is")
    parser.add_argument("--jobs", type=int, default=1, help="commands side by side, spread over all GPUs (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(arguments)
    options.stages = options.stages or options.run or [*STAGES]
    begin = time.perf_counter()
    make_data(options.data, options.sets, options.rows, choose_device(options.device))
    print(f"{time.perf_counter() - begin:6.0f} s  data in {options.data}", file=sys.stderr, flush=True)
    for name in options.stages:
        command = STAGES[name].command(options.data, options.out, options.steps)
        print(f"anygen {shlex.join(command)}", file=sys.stderr if options.json else sys.stdout, flush=True)
    if not (options.run or options.measure):
        return 0
    bench, found, failed = Bench(options), [], []
    with ThreadPoolExecutor(len(options.stages)) as pool:
        for running in [pool.submit(bench.stage, name) for name in options.stages]:
            try:
                found.append(running.result())
            except SystemExit as error:  # the others count all the same
                failed.append(str(error))
    if options.json:
        stages = [one | {"rows": [plain(change) for change in one["rows"]]} for one in found]
        print(json.dumps({"machine": machine(), "limit": options.limit, "stages": stages}))
    else:
        for one in found:
            show(one)
    for error in failed:
        print(error, file=sys.stderr)
    return int(bool(failed) or any(row.worse for one in found for row in one["rows"]))


if __name__ == "__main__":
    sys.exit(main())
