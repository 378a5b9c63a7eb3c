"""Generators that take turns: whose turn it is, what happens when one fails, and that media are the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from anygen import AnyGenPipeline
from anygen.errors import OutOfMemoryError
from anygen.rendering import make_all
from anygen.together import Lanes, in_turns, scaled

ASKED: Any = {"seed": 3, "max_new_tokens": 24}


class Work:
    """So many steps, written down as they are done."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def steps(self, name: str, count: int, *, fails: bool = False) -> Any:
        try:
            for number in range(count):
                self.log.append(f"{name}{number}")
                yield number + 1, count
            if fails:
                raise ValueError(name)
            return name.upper()
        finally:
            self.log.append(f"{name} closed")


def test_the_large_one_leads_each_turn_and_all_are_told() -> None:
    log: list[str] = []
    told: list[Any] = []
    work = Work(log)

    @contextmanager
    def lane(modality: str) -> Iterator[None]:
        log.append(f"[{modality}")
        yield
        log.append("]")

    works = {"image": work.steps("i", 1), "video": work.steps("v", 2)}
    made = in_turns(works, lane, lambda *step: told.append(step))
    assert list(made.items()) == [("image", "I"), ("video", "V")]
    assert told == [("video", 1, 2), ("image", 1, 1), ("video", 2, 2)]
    turns = [entry for entry in log if entry[0] not in "]["]
    assert turns == ["v0", "i0", "v1", "i closed", "v closed"]
    assert log.count("[video") == 3 and log.count("[image") == 2 and log.count("]") == 5


def test_if_one_fails_the_others_are_closed() -> None:
    log: list[str] = []
    work = Work(log)
    works = {"image": work.steps("i", 9), "video": work.steps("v", 1, fails=True), "audio": work.steps("a", 9)}
    with pytest.raises(ValueError, match="v"):
        in_turns(works, Lanes(torch.device("cpu")).joined("image").__enter__())
    assert {"i closed", "a closed"} <= set(log) and "i1" not in log


def test_steps_of_batches_are_counted_over_all() -> None:
    def both() -> Any:
        first = yield from scaled(Work([]).steps("a", 2), 0, 2)
        second = yield from scaled(Work([]).steps("b", 2), 1, 2)
        return first + second

    steps = both()
    told = [next(steps) for _ in range(4)]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert end.value.value == "AB"


@pytest.fixture
def pipes(anything_directory: Path, monkeypatch: pytest.MonkeyPatch) -> AnyGenPipeline:
    pipe = AnyGenPipeline.from_pretrained(anything_directory, device="cpu")
    monkeypatch.setattr(AnyGenPipeline, "_may_overlap", lambda self, jobs: len(jobs) > 1)  # it would want a GPU
    return pipe


def test_media_are_those_made_one_after_the_other(pipes: AnyGenPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [pipes.plan(prompt, **ASKED) for prompt in ("All three", "Draw", "All three")]
    pipes.together = False
    wanted = pipes.render(plans, progress=False, batch_size=2)
    assert {m.modality for m in wanted[0].media} == {"image", "video", "audio"}
    alone: list[str] = []
    monkeypatch.setattr(
        "anygen.pipeline.make_all",
        lambda generator, *a, **o: alone.append(generator.modality) or make_all(generator, *a, **o),
    )
    pipes.together = True
    for made, theirs in zip(pipes.render(plans, progress=True, batch_size=2), wanted, strict=True):
        assert made.content == theirs.content
    assert not alone and pipes.together
    monkeypatch.setattr(type(pipes.generator("audio")), "overlaps", False)
    assert pipes.render(plans[0], progress=False).content == wanted[0].content
    assert sorted(alone) == ["audio", "image", "video"]


def test_without_the_memory_for_all_they_are_made_one_after_the_other_from_then_on(
    pipes: AnyGenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pipes.plan("All three", **ASKED)
    pipes.together = False
    wanted = pipes.render(plan, progress=False)
    pipes.together = True
    tried: list[int] = []

    def full(*_: Any, **__: Any) -> Any:
        tried.append(1)
        raise OutOfMemoryError("there is no room")

    monkeypatch.setattr("anygen.pipeline.make_together", full)
    for _ in range(2):
        assert pipes.render(plan, progress=False).content == wanted.content
    assert tried == [1] and not pipes.together


def test_on_a_cpu_and_for_many_or_one_kind_there_are_no_turns(anything_directory: Path) -> None:
    pipe = AnyGenPipeline.from_pretrained(anything_directory, device="cpu")
    few: Any = {"image": ([1], [1]), "audio": ([1], [1])}
    assert not pipe._may_overlap(few)
    pipe.model.__class__ = type("Elsewhere", (type(pipe.model),), {"device": torch.device("cuda")})
    assert pipe._may_overlap(few) and not pipe._may_overlap({"image": few["image"]})
    few["image"] = ([1] * 5, [1] * 5)
    assert not pipe._may_overlap(few)
    few["image"] = ([1], [1])
    pipe.generators.offload = "after_use"
    assert not pipe._may_overlap(few)
