"""Planned parts to made ones, on the tiny model of `conftest.py`."""

from typing import Any, cast

import pytest

from anygen import AnyGenPipeline
from anygen.rendering import make
from anygen.reply import PlannedPart


def test_a_length_reaches_the_generators_of_what_has_one(pipe: AnyGenPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, generator = pipe.plan("Draw", seed=1, max_new_tokens=3), pipe.generator("image")
    plain, given = pipe.render(plan), list[dict[str, Any]]()
    part, device = cast(PlannedPart, plan.content[0]), pipe.device
    monkeypatch.setattr(generator, "generate", lambda condition, **options: given.append(options) or plain.images)
    for modality, reached in (("image", False), ("video", True), ("audio", True)):
        monkeypatch.setattr(type(generator), "modality", modality)
        made = make(generator, [part], [1], lambda *_: None, device=device, seconds=1.5, steps=None)
        assert made == plain.images and ("seconds" in given[-1]) == reached and "steps" not in given[-1]
    assert given[-1]["seconds"] == 1.5
    monkeypatch.undo()
    assert pipe.render(plan, seconds=1.5).images == plain.images
