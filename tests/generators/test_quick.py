"""The fast way makes the media of the plain way: graphs emulated, blocks through a compiler that changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anygen import compiling
from anygen.errors import ConfigError
from anygen.features import Condition
from anygen.generators.diffusers_pipeline import denoiser
from anygen.generators.quick import Quick, check_compile, outermost
from anygen.registry import lookup


@pytest.fixture(params=["video", "audio"])
def generator(request: pytest.FixtureRequest, tiny_zeroscope: Any, tiny_audioldm2: Any) -> Any:
    return (tiny_zeroscope if request.param == "video" else tiny_audioldm2)()


def conditions(generator: Any, count: int) -> Condition:
    torch.manual_seed(5)
    return Condition({n: torch.randn(count, *shape) for n, shape in generator.condition_spec.shapes.items()})


def made(generator: Any, count: int, steps: int = 4) -> torch.Tensor:
    latents = generator.sample(conditions(generator, count), range(count), steps)
    decoded = generator.decode(latents)
    return torch.cat([latents.flatten(), decoded.flatten()])


@torch.inference_mode()
def test_captured_calls_make_the_same_media_shape_by_shape(generator: Any, emulate: type) -> None:
    wanted = {count: made(generator, count) for count in (1, 2)}
    capture = emulate()
    quick = Quick(generator.models(), graphs=True, capture=capture)
    for count in (1, 2, 1, 2):
        torch.testing.assert_close(made(generator, count), wanted[count])
    assert capture.captures >= 4 and capture.replays > 12
    generator.to("cpu")  # wherever to: weights may have moved
    assert not any(map(len, quick.graphs))
    quick.undo()
    replays = capture.replays
    torch.testing.assert_close(made(generator, 1), wanted[1])
    assert capture.replays == replays


@pytest.mark.parametrize(("generator", "compile"), [("video", "blocks"), ("audio", "whole")], indirect=["generator"])
def test_compiled_and_fused_it_makes_the_same_media_and_is_saved_as_it_was(
    generator: Any, emulate: type, compile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def backend(module: Any, inputs: Any) -> Callable[..., Any]:
        seen.append(len(inputs))
        return module.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    keys = set(generator.unet.state_dict())
    wanted = made(generator, 1, 2)
    capture = emulate()
    quick = Quick(generator.models(), graphs=True, compile=compile, layout=True, capture=capture)
    for _ in range(2):
        torch.testing.assert_close(made(generator, 1, 2), wanted, rtol=1e-4, atol=1e-4)
    assert seen and capture.replays
    quick.undo()
    assert set(generator.unet.state_dict()) == keys
    count = len(seen)
    torch.testing.assert_close(made(generator, 1, 2), wanted, rtol=1e-4, atol=1e-4)
    assert len(seen) == count


def test_training_is_not_captured(generator: Any, emulate: type) -> None:
    capture = emulate()
    Quick(generator.models(), graphs=True, capture=capture)
    condition = conditions(generator, 2)
    tensors = {name: rows.requires_grad_() for name, rows in condition.tensors.items()}
    noise = torch.Generator().manual_seed(0)
    media = torch.rand(2, 3, 3, 16, 16) if generator.modality == "video" else torch.rand(2, 1, 12, 16)
    for _ in range(3):
        generator.denoising_loss(Condition(tensors), media, generator=noise).backward()
    assert capture.captures == 0 and all(rows.grad is not None for rows in tensors.values())


def test_blocks_are_compiled_where_they_are_outermost(generator: Any) -> None:
    blocks = list(outermost(generator.unet))
    inside = {id(inner) for block in blocks for inner in block.modules() if inner is not block}
    assert blocks and not inside & {id(block) for block in blocks}
    names = {type(block).__name__ for block in blocks}
    wholes = {"audio": {"CrossAttnDownBlock2D", "CrossAttnUpBlock2D"}, "video": {"ResnetBlock2D", "Transformer2DModel"}}
    assert wholes[generator.modality] <= names and "BasicTransformerBlock" not in names


def test_quickening_on_the_cpu_captures_nothing_and_twice_is_once(generator: Any) -> None:
    wanted = made(generator, 1)
    assert generator.quicken(graphs=True).quick.graphs == []
    generator.quicken(graphs=True)
    torch.testing.assert_close(made(generator, 1), wanted, rtol=0, atol=0)


def test_what_may_be_compiled() -> None:
    assert [check_compile(value) for value in (False, True, "blocks", "whole")] == [None, "blocks", "blocks", "whole"]
    with pytest.raises(ConfigError, match="compile is True, False or one of blocks, whole; got 'all'"):
        check_compile("all")


@pytest.mark.parametrize("name", ["sdxl", "flux", "wan", "stable_audio"])
def test_pipelines_of_diffusers_make_the_same_through_graphs(name: str, tiny_pipeline: Any, emulate: type) -> None:
    generator: Any = lookup("generator", f"diffusers/{name}")(tiny_pipeline(name))
    small = {"wan": {"height": 16, "width": 16, "frames": 5}, "stable_audio": {"seconds": 0.1}}
    options: Any = small.get(name, {"height": 16, "width": 16})
    condition = generator.encode_text(["a red apple"])
    wanted = generator.sample(condition, [3], 4, **options)
    capture = emulate()
    generator.quick = Quick({"denoiser": denoiser(generator.pipeline)}, graphs=True, capture=capture)
    made = [generator.sample(condition, [3], 4, **options) for _ in range(2)]
    np.testing.assert_allclose(made[0], wanted, atol=1e-6)
    np.testing.assert_allclose(made[1], wanted, atol=1e-6)
    assert capture.captures == 1 and capture.replays >= 5
    generator.quicken(graphs=False)
    np.testing.assert_allclose(generator.sample(condition, [3], 4, **options), wanted, atol=1e-6)


def test_a_pipeline_samples_with_dpm_solver_where_it_is_asked_to(tiny_pipeline: Any, tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    pipeline = tiny_pipeline("sdxl")
    pipeline.save_pretrained(tmp_path)
    cls: Any = lookup("generator", "diffusers/sdxl")
    generator = cls.from_pretrained(tmp_path, solver="dpm++", steps=2, height=16, width=16)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    wanted = cls(pipeline).sample(generator.encode_text(["a"]), [1], 2, height=16, width=16)
    np.testing.assert_allclose(generator.sample(generator.encode_text(["a"]), [1]), wanted, atol=1e-6)
    with pytest.raises(ConfigError, match="solver is 'dpm\\+\\+' or left out, got 'euler'"):
        cls.from_pretrained(tmp_path, solver="euler")
    flow = tiny_pipeline("wan")
    flow.save_pretrained(tmp_path / "flow")
    with pytest.raises(ConfigError, match="solver='dpm\\+\\+' needs a schedule of noise variances; FlowMatch"):
        lookup("generator", "diffusers/wan").from_pretrained(tmp_path / "flow", solver="dpm++")
