"""What pictures, clips and sounds cost on two cores: seconds for one more, the order of a stream, memory.

    python benchmarks/any_to_any.py                # one table, anygen-mini
    python benchmarks/any_to_any.py --model DIR
    python benchmarks/any_to_any.py --quick --json

Where the model makes no clips or no sounds, the row says so in place of a figure. More than two cores are not used, as
the bars are for two.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from measuring import GB, Row, machine, peak, seconds, show

if TYPE_CHECKING:
    from anygen import AnyGenPipeline
    from anygen.reply import Reply

MODALITIES = ("image", "video", "audio")
NOUNS = {"image": "picture", "video": "clip", "audio": "sound"}
ASK = {
    "image": "Draw a red apple",
    "video": "Make a clip of a rocket moving up",
    "audio": "Let me hear a trumpet",
}
BARS = {"image": 4.0, "video": 15.0, "audio": 4.0}
ALL = "Show me a tiger, make a clip of a rocket moving up, and let me hear a trumpet"
TWO = "Draw a cat and then a dog"
"""What is asked of a model that makes pictures alone."""
MEMORY = """
import sys
from anygen import AnyGenPipeline
pipe = AnyGenPipeline.from_pretrained(sys.argv[1] or None, device="cpu", offload=sys.argv[2])
plans = pipe.plan(sys.argv[3:], seed=7)
for modality in pipe.drawable:
    pipe.generator(modality)
pipe.render(plans, progress=False, batch_size=1)
"""
"""A process of its own: model or nothing, policy, prompts."""


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", metavar="NAME_OR_DIR", help="by default the embedded anygen-mini")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    two_cores()
    repeats = 1 if options.quick else 5
    rows = list(memory(options.model))  # before torch is imported here: a child's peak counts its own
    from anygen import AnyGenPipeline

    pipe = AnyGenPipeline.from_pretrained(options.model, device="cpu", offload="resident")
    name, lacks = pipe.name, lacking(pipe.drawable)
    for part in (one_more(pipe, repeats), streaming(pipe, repeats)):
        for row in part:
            rows.append(row)
            if sys.stderr.isatty() and not options.json:
                print(f"{row.what}: {row.value} {row.unit} {row.note}", file=sys.stderr)
    if options.json:
        told = [asdict(row) | {"met": row.met} for row in rows]
        print(json.dumps({"model": name, "lacks": lacks, "machine": machine(), "rows": told}))
    else:
        show(rows, name)
        if lacks:
            print(f"{name} makes {', '.join(['text', *pipe.drawable])}; it lacks {', '.join(lacks)}.")
    return 0


def two_cores() -> None:
    """Keeps this process and its children on two cores, and off the terminal what libraries note."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])


def lacking(makes: Sequence[str]) -> list[str]:
    """The modalities that a model should make and does not."""
    return [modality for modality in MODALITIES if modality not in makes]


def memory(model: str | None) -> Iterator[Row]:
    """Peak memory of a process that holds everything and makes one of each, and of one that holds one at a time."""
    from anygen import hub
    from anygen.model_config import AnyGenConfig

    makes = [*AnyGenConfig.load(hub.resolve(model) / "anygen.json").outputs]
    prompts = [ASK[modality] for modality in MODALITIES if modality in makes]
    lacks = [f"no {modality}" for modality in lacking(makes)]
    held = f"LLM, encoders, generators of {', '.join(makes)}"
    note = "; ".join([held, *lacks])
    for policy, bar in (("resident", 4.0), ("after_use", None)):
        used = peak(["-c", MEMORY, model or "", policy, *prompts])
        yield Row(f"peak memory (RSS), generators {policy}", used / GB, "GB", bar, note if bar else "one at a time")


def one_more(pipe: "AnyGenPipeline", repeats: int) -> Iterator[Row]:
    """A further answer with one medium, everything loaded; and what of it the generator takes."""
    for modality in MODALITIES:
        what, bar = f"one more answer with a {NOUNS[modality]}", BARS[modality]
        if modality not in pipe.drawable:
            yield Row(what, None, "s", bar, f"the model makes no {modality}: nothing to measure")
            continue
        reply = pipe(ASK[modality], seed=0, progress=False)
        if len(reply.media) != 1 or reply.media[0].modality != modality:
            yield Row(what, None, "s", bar, f"{ASK[modality]!r} was answered by {answered(reply)}")
            continue
        replies = [seconds(partial(pipe, ASK[modality], seed=seed, progress=False)) for seed in range(repeats)]
        making = median(reply.timings["generators"] for _, reply in replies)
        steps = getattr(getattr(pipe.generator(modality), "defaults", None), "steps", "?")
        yield Row(what, median(spent for spent, _ in replies), "s", bar, f"{reply.media[0]!r}")
        yield Row("of it the generator", making, "s", note=f"{steps} steps")


def answered(reply: "Reply") -> str:
    """What an answer holds, for a note."""
    return ", ".join(medium.modality for medium in reply.media) or "words alone"


def streaming(pipe: "AnyGenPipeline", repeats: int) -> Iterator[Row]:
    """When the first medium comes, and when the text of the segment behind it ends: seconds after the question."""
    ask = ALL if not lacking(pipe.drawable) else TWO
    if "image" not in pipe.drawable and lacking(pipe.drawable):
        yield Row("stream", None, "s", note="the model makes no image: nothing to measure")
        return
    times = [timed(pipe, ask, seed) for seed in range(repeats)]
    note = f'"{ask}"'
    for what, key in (
        ("stream: first medium begun", "begun"),
        ("stream: first medium done", "done"),
        ("stream: end of the next segment's text", "next_text"),
    ):
        known = [run[key] for run in times if key in run]
        missing = "the answer held no medium" if key != "next_text" else "no text came after the first medium"
        yield Row(what, median(known) if known else None, "s", note=note if known else missing)
    for what, key in (("first media event", "begun"), ("first medium done", "done")):
        late = [run[key] - run["next_text"] for run in times if key in run and "next_text" in run]
        told = "negative: it came before" if late else "nothing to compare"
        yield Row(f"stream: {what}, counted from that end", max(late) if late else None, "s", 0.0, told)


def timed(pipe: "AnyGenPipeline", ask: str, seed: int) -> dict[str, float]:
    """Seconds from the question to the first medium's begin and end, and to the last words before the second medium."""
    from anygen.streaming import MediaDone, MediaStarted, TextDelta

    begin, times = time.perf_counter(), dict[str, float]()
    for event in pipe.stream(ask, seed=seed):
        now = time.perf_counter() - begin
        match event:
            case MediaStarted(index=0):
                times["begun"] = now
            case MediaDone(index=0):
                times["done"] = now
            case MediaStarted():
                break  # the next segment's text is complete
            case TextDelta() if "begun" in times:
                times["next_text"] = now
    return times


if __name__ == "__main__":
    sys.exit(main())
