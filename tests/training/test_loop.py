"""Schedule, averaged weights, log and contact sheet."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from anygen.training.loop import Alarm, AveragedWeights, Pace, Progress, RunLog, bf16_on_gpu, compiled, save_grid


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    rates = [Progress(1000, step=step).learning_rate(2.0, warmup=100) for step in range(1001)]
    assert rates[:3] == pytest.approx([0.02, 0.04, 0.06], rel=1e-3)
    assert rates[500] == pytest.approx(2 * (0.01 + 0.99 * 0.5))
    assert rates[250] == pytest.approx(2 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert rates[1000] == pytest.approx(0.02)
    assert max(rates) == rates[99] or max(rates) == rates[100]


def test_without_decay_the_learning_rate_stays_at_its_peak() -> None:
    rates = [Progress(1000, step=step).learning_rate(2.0, warmup=100, decay=False) for step in (0, 49, 99, 500, 1000)]
    assert rates == pytest.approx([0.02, 1.0, 2.0, 2.0, 2.0])


def test_the_pace_is_that_of_the_last_interval() -> None:
    pace = Pace(since=time.monotonic() - 10)
    assert pace.report(1000) == pytest.approx(100, rel=0.05)
    pace.since -= 20
    assert pace.report(1400) == pytest.approx(20, rel=0.05)


def test_an_alarm_rings_once_an_interval_and_never_without_one() -> None:
    alarm = Alarm(1.0, last=time.monotonic() - 61)
    assert alarm.rings() and not alarm.rings()
    assert Alarm(0.0).rings() and not Alarm(None, last=0.0).rings()


def test_a_compiled_step_begins_where_cuda_graphs_may_reuse_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    module, told = nn.Linear(2, 1), []
    assert compiled(module, None) is module
    monkeypatch.setattr(torch, "compile", lambda module, mode: lambda x: told.append(mode) or module(x))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: told.append("begin"))
    step, x = compiled(module, "reduce-overhead"), torch.ones(3, 2)
    assert torch.equal(step(x), module(x)) and told == ["begin", "reduce-overhead"]


def test_a_run_ends_by_steps_or_by_the_clock() -> None:
    assert not Progress(10, step=9).done and Progress(10, step=10).done
    half = Progress(1000, minutes=2.0, step=100, started=time.monotonic() - 60)
    assert half.fraction == pytest.approx(0.5, abs=0.01) and not half.done
    late = Progress(1000, minutes=2.0, step=100, started=time.monotonic() - 121)
    assert late.done and late.learning_rate(1.0, warmup=1) == pytest.approx(0.01)
    slow = Progress(1000, minutes=2.0, step=900)
    assert slow.fraction == pytest.approx(0.9)


def test_averaged_weights_are_the_moving_average() -> None:
    module = nn.Linear(2, 1, bias=False)
    seen = torch.zeros(())
    module.register_buffer("seen", seen)
    with torch.no_grad():
        module.weight.fill_(0)
    average = AveragedWeights(module, decay=0.5)
    wanted = 0.0
    for step in range(30):
        with torch.no_grad():
            module.weight.fill_(step)
            seen.fill_(step)
        average.update(module, step)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * step
        torch.testing.assert_close(average.module.weight, torch.full((1, 2), wanted))
    assert average.module.seen == 29 and not average.module.weight.requires_grad and module.weight.requires_grad


def test_averaging_equal_weights_changes_nothing() -> None:
    module = nn.Linear(3, 3)
    average = AveragedWeights(module, decay=0.9)
    average.update(module, 1000)
    torch.testing.assert_close(average.module.weight, module.weight)


def test_the_log_appends_one_json_line_a_report(tmp_path: Path) -> None:
    RunLog(tmp_path / "new" / "folder", "vae").write(step=1, loss=0.123456789)
    RunLog(tmp_path / "new" / "folder", "vae").write(step=2, note="done")
    first, second = map(json.loads, (tmp_path / "new" / "folder" / "vae.jsonl").read_text().splitlines())
    assert first["loss"] == 0.12346 and first["step"] == 1 and first["seconds"] >= 0
    assert second["note"] == "done"


def test_a_grid_has_every_picture_in_its_place(tmp_path: Path) -> None:
    pictures = torch.linspace(-0.2, 1.2, 5).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    save_grid(pictures, tmp_path / "grid.png", columns=3)
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (18, 12)
        shown = [sheet.getpixel((6 * (n % 3) + 1, 6 * (n // 3) + 1)) for n in range(6)]
    wanted = [round(255 * min(1, max(0, v))) for v in torch.linspace(-0.2, 1.2, 5).tolist()] + [255]
    assert shown == [(level,) * 3 for level in wanted]


def test_mixed_precision_is_for_gpus() -> None:
    with bf16_on_gpu(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
