"""`benchmarks/any_to_any.py` measures what a model can, and says plainly what it cannot."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from anygen import AnyGenPipeline

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, asking what the tiny models know."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    script: Any = import_module("any_to_any")
    monkeypatch.setattr(script, "ASK", {"image": "Draw", "video": "Film", "audio": "Play"})
    monkeypatch.setattr(script, "ALL", "All three")
    monkeypatch.setattr(script, "TWO", "Draw three")
    return script


@pytest.fixture
def short(anything: AnyGenPipeline, monkeypatch: pytest.MonkeyPatch) -> AnyGenPipeline:
    """The tiny model of all modalities, which says at most one medium where one is asked for."""
    call, stream = AnyGenPipeline.__call__, AnyGenPipeline.stream
    monkeypatch.setattr(AnyGenPipeline, "__call__", lambda *args, **options: call(*args, max_media=1, **options))
    monkeypatch.setattr(AnyGenPipeline, "stream", lambda *args, **options: stream(*args, max_new_tokens=14, **options))
    return anything


def test_a_row_for_each_modality_that_is_made(benchmark: Any, short: AnyGenPipeline) -> None:
    rows = list(benchmark.one_more(short, 2))
    assert [row.what for row in rows[::2]] == [
        f"one more answer with a {noun}" for noun in ("picture", "clip", "sound")
    ]
    assert [row.bar for row in rows[::2]] == [4.0, 15.0, 4.0]
    assert all(row.value > 0 for row in rows) and [row.note for row in rows[1::2]] == ["2 steps", "3 steps", "3 steps"]
    assert all(part.value < whole.value for whole, part in zip(rows[::2], rows[1::2], strict=True))


def test_what_a_model_lacks_is_said_and_not_measured(benchmark: Any, short: AnyGenPipeline) -> None:
    pictures = AnyGenPipeline(short.model, {"image": short.generator("image")})
    rows = {row.what: row for row in benchmark.one_more(pictures, 1)}
    assert rows["one more answer with a picture"].met
    for noun, modality in (("clip", "video"), ("sound", "audio")):
        row = rows[f"one more answer with a {noun}"]
        assert (row.value, row.met) == (None, None) and row.note == f"the model makes no {modality}: nothing to measure"
    assert benchmark.lacking(pictures.drawable) == ["video", "audio"] and benchmark.lacking(short.drawable) == []


def test_an_answer_without_the_medium_is_said(benchmark: Any, short: AnyGenPipeline) -> None:
    benchmark.ASK["image"] = "Say"
    first = next(iter(benchmark.one_more(short, 1)))
    assert (first.value, first.note) == (None, "'Say' was answered by words alone")


def test_a_stream_is_timed_up_to_the_second_medium(
    benchmark: Any, short: AnyGenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anygen.streaming import MediaDone, MediaStarted, TextDelta

    part, ticks = short("Draw", seed=4).content[0], iter(range(100))
    events = [
        TextDelta("A cat."),  # at 1
        MediaStarted("image", 0, "A cat."),
        MediaDone(0, part),  # type: ignore[arg-type]
        TextDelta(" And a"),
        TextDelta(" dog."),  # at 5
        MediaStarted("image", 1, "And a dog."),
        TextDelta(" There."),
    ]
    monkeypatch.setattr(benchmark, "time", type("Clock", (), {"perf_counter": lambda: float(next(ticks))}))
    with monkeypatch.context() as patch:
        patch.setattr(AnyGenPipeline, "stream", lambda *_, **__: iter(events))
        assert benchmark.timed(short, "Draw two", 0) == {"begun": 2.0, "done": 3.0, "next_text": 5.0}
        rows = {row.what: row for row in benchmark.streaming(short, 2)}
    compared = [rows[f"stream: first {what}, counted from that end"] for what in ("media event", "medium done")]
    assert [(row.value, row.bar, row.met) for row in compared] == [(-3.0, 0.0, True), (-2.0, 0.0, True)]


def test_a_stream_without_words_behind_its_medium_is_not_compared(benchmark: Any, short: AnyGenPipeline) -> None:
    rows = {row.what: row for row in benchmark.streaming(short, 1)}  # the tiny model's media follow each other
    assert rows["stream: first medium done"].value > 0
    compared = rows["stream: first medium done, counted from that end"]
    assert (compared.value, compared.note) == (None, "nothing to compare")
    assert rows["stream: end of the next segment's text"].note == "no text came after the first medium"
