"""The second half of an answer: planned parts in, made parts out, by generators.

Shapes: M parts of one modality.
"""

from collections.abc import Generator as PythonGenerator
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch

from anygen.features import Condition
from anygen.generators.base import Generator
from anygen.loading import memory
from anygen.media import Media
from anygen.planning import asked_for, chunks
from anygen.progress import progress_bars
from anygen.reply import MadePart, PlannedPart
from anygen.stepwise import StepCallback, Steps
from anygen.streaming import Event, MediaDone, MediaStep
from anygen.together import Lanes, in_turns, scaled

TIMED = ("video", "audio")
"""Modalities whose media have a length."""


def make_all(
    generator: Generator,
    parts: Sequence[PlannedPart],
    seeds: Sequence[int],
    *,
    device: torch.device,
    batch_size: int,
    progress: bool | None,
    **options: Any,
) -> list[MadePart]:
    """M parts and M seeds -> M parts, `batch_size` of them at a time.

    Args:
        generator: of the parts' modality.
        parts: of one modality, of any replies.
        seeds: of each part's noise.
        device: where the conditions go.
        batch_size: parts that go through together.
        progress: shows bars on stderr; by default if that is a terminal.
        **options: `steps`, `guidance_scale`, `seconds`; None is the generator's own.

    Raises:
        ConfigError: a part was planned for another generator, or an option is out of range.
        OutOfMemoryError: the device has too little; says what helps.
    """
    media: list[Media] = []
    batches = chunks(len(parts), batch_size)
    with progress_bars(shown=progress) as bars:
        task = bars.add_task(f"{generator.modality} × {len(parts)}", total=None)
        for number, batch in enumerate(batches):

            def on_step(done: int, total: int, number: int = number) -> None:
                bars.update(task, completed=number * total + done, total=len(batches) * total)

            media += make(generator, parts[batch], seeds[batch], on_step, device=device, **options)
    return _made(parts, media, seeds)


def make_together(
    generators: Mapping[str, Generator],
    jobs: Mapping[str, tuple[Sequence[PlannedPart], Sequence[int]]],
    lanes: Lanes,
    *,
    device: torch.device,
    batch_size: int,
    progress: bool | None,
    **options: Any,
) -> dict[str, list[MadePart]]:
    """As `make_all`, for several modalities at once.

    Args:
        generators: modality -> its generator, which `overlaps`.
        jobs: modality -> parts and seeds.
        lanes: where the steps of each are launched.
        device, batch_size, progress, **options: as for `make_all`, which tells the errors, too.
    """
    with progress_bars(shown=progress) as bars:
        tasks = {m: bars.add_task(f"{m} × {len(parts)}", total=None) for m, (parts, _) in jobs.items()}
        works = {
            m: _in_steps(generators[m], *job, device=device, batch_size=batch_size, **options)
            for m, job in jobs.items()
        }
        with lanes.joined(*works) as lane:
            return in_turns(works, lane, lambda m, done, total: bars.update(tasks[m], completed=done, total=total))


def _in_steps(
    generator: Generator,
    parts: Sequence[PlannedPart],
    seeds: Sequence[int],
    *,
    device: torch.device,
    batch_size: int,
    **options: Any,
) -> Steps[list[MadePart]]:
    media: list[Media] = []
    batches = chunks(len(parts), batch_size)
    for number, batch in enumerate(batches):
        condition, asked = _prepared(generator, parts[batch], device, options)
        with memory(), closing(generator.generate_stepwise(condition, seeds=seeds[batch], **asked)) as steps:
            media += yield from scaled(steps, number, len(batches))
    return _made(parts, media, seeds)


def _made(parts: Sequence[PlannedPart], media: Sequence[Media], seeds: Sequence[int]) -> list[MadePart]:
    return [
        MadePart(part.modality, value, part.caption, seed)
        for part, value, seed in zip(parts, media, seeds, strict=True)
    ]


def make_stepwise(
    generator: Generator, part: PlannedPart, index: int, seed: int, *, device: torch.device, **options: Any
) -> PythonGenerator[Event, None, MadePart]:
    """One part, its steps yielded as they happen; returns it made.

    Args:
        generator: of the part's modality.
        part: what to make.
        index: its place among the answer's media.
        seed: of its noise.
        device: where the condition goes.
        **options: as for `make_all`, which tells the errors, too.
    """
    condition, asked = _prepared(generator, [part], device, options)
    with memory(), closing(generator.generate_stepwise(condition, seeds=[seed], **asked)) as steps:
        while True:
            try:
                done, total = next(steps)
            except StopIteration as end:
                media: list[Media] = end.value
                break
            yield MediaStep(index, done, total)
    made = MadePart(part.modality, media[0], part.caption, seed)
    yield MediaDone(index, made)
    return made


def make(
    generator: Generator,
    parts: Sequence[PlannedPart],
    seeds: Sequence[int],
    on_step: StepCallback,
    *,
    device: torch.device,
    **options: Any,
) -> list[Media]:
    """One call of the generator. Takes and raises the same as `make_all`."""
    condition, asked = _prepared(generator, parts, device, options)
    with memory():
        return generator.generate(condition, seeds=seeds, on_step=on_step, **asked)


def _prepared(
    generator: Generator, parts: Sequence[PlannedPart], device: torch.device, options: dict[str, Any]
) -> tuple[Condition, dict[str, Any]]:
    """The parts' conditions as one batch on the device, and the options that the generator takes."""
    condition = generator.condition_spec.check(Condition.cat([part.condition for part in parts]))
    asked = asked_for(**options)
    if generator.modality not in TIMED:
        asked.pop("seconds", None)
    return condition.to(device), asked
