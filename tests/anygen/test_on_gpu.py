"""The fast way on a real GPU, at tiny size: graphs are captured, and answers are those of the plain way."""

from pathlib import Path
from typing import Any

import pytest
import torch

from anygen import AnyGenPipeline
from anygen.features import Condition
from anygen.graphs import Graphed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
ASKED: Any = {"seed": 3, "max_new_tokens": 24, "progress": False}
PROMPTS = ["All three", "Say", "Draw"]


def load(directory: Path, **options: Any) -> AnyGenPipeline:
    return AnyGenPipeline.from_pretrained(directory, device="cuda", dtype="float32", **options)


def graphs(pipe: AnyGenPipeline) -> list[Graphed]:
    memories = pipe.model.memories
    assert memories is not None
    return [memory.step for memory in memories._idle if isinstance(memory.step, Graphed)]


def sample(generator: Any, count: int, steps: int = 4) -> torch.Tensor:
    torch.manual_seed(5)
    shapes = generator.condition_spec.shapes
    condition = Condition({name: torch.randn(count, *shape) for name, shape in shapes.items()})
    return generator.decode(generator.sample(condition.to("cuda"), range(count), steps)).cpu()


def test_graphs_are_captured_and_say_the_same(anything_directory: Path) -> None:
    plain, fast = load(anything_directory, graphs=False), load(anything_directory)
    assert plain.model.memories is None
    for _ in range(2):
        for prompt in PROMPTS:
            ours, theirs = fast(prompt, **ASKED), plain(prompt, **ASKED)
            assert ours.text == theirs.text
            assert [m.modality for m in ours.media] == [m.modality for m in theirs.media]
        ours, theirs = fast(PROMPTS, **ASKED), plain(PROMPTS, **ASKED)
        assert [reply.text for reply in ours] == [reply.text for reply in theirs]
    assert graphs(fast) and all(graph.active and len(graph) for graph in graphs(fast))


def test_a_chat_through_graphs_says_the_same(anything_directory: Path) -> None:
    plain, fast = load(anything_directory, graphs=False).chat(**ASKED), load(anything_directory).chat(**ASKED)
    for prompt in ("Say", "Draw", "Film"):
        assert fast.send(prompt).text == plain.send(prompt).text


@torch.inference_mode()
def test_after_a_capture_that_failed_others_are_captured_and_chance_goes_on() -> None:
    values = torch.arange(3.0, device="cuda")
    looks = Graphed(lambda given: given * given.sum().item(), "one that looks at values")
    for _ in range(3):
        torch.testing.assert_close(looks(values), 3 * values)
    assert not looks.active
    assert torch.nn.Linear(4, 4, device="cuda").weight.abs().sum() > 0
    doubles = Graphed(lambda given: 2 * given, "another")
    for _ in range(3):
        torch.testing.assert_close(doubles(values), 2 * values)
    assert doubles.active and len(doubles) == 1


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_generators_are_captured_and_make_the_same(modality: str, tiny_zeroscope: Any, tiny_audioldm2: Any) -> None:
    make = tiny_zeroscope if modality == "video" else tiny_audioldm2
    plain, fast = make().to("cuda"), make().to("cuda")
    fast.quicken(graphs=True)
    for count in (1, 2, 1):
        torch.testing.assert_close(sample(fast, count), sample(plain, count), rtol=1e-3, atol=1e-3)
    assert all(graph.active and len(graph) for graph in fast.quick.graphs)
    fast.to("cpu").to("cuda")
    assert not any(map(len, fast.quick.graphs))
    torch.testing.assert_close(sample(fast, 1), sample(plain, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("placement", ["model_offload", "sequential"])
def test_placed_generators_make_the_same_and_leave_the_device(placement: str, tiny_zeroscope: Any) -> None:
    plain, placed = tiny_zeroscope().to("cuda"), tiny_zeroscope().place("cuda", placement)
    for _ in range(2):
        torch.testing.assert_close(sample(placed, 1), sample(plain, 1), rtol=1e-3, atol=1e-3)
        placed.release()
        assert next(placed.unet.parameters()).device.type in ("cpu", "meta")


def test_generators_that_take_turns_make_the_same_as_one_after_the_other(anything_directory: Path) -> None:
    pipe = load(anything_directory)
    plan = pipe.plan("All three", **{k: v for k, v in ASKED.items() if k != "progress"})
    pipe.together = False
    wanted = pipe.render(plan, progress=False).media
    assert [m.modality for m in wanted][:3] == ["image", "video", "audio"]
    pipe.together = True
    for _ in range(4):  # plainly, captured, replayed
        assert pipe.render(plan, progress=False).media == wanted
    assert pipe.together and set(pipe._lanes._streams) == {"image", "video", "audio"}


@pytest.mark.parametrize("offload", ["auto", "model_offload", "sequential"])
def test_every_policy_answers(anything_directory: Path, offload: str) -> None:
    pipe = load(anything_directory, offload=offload)
    assert [m.modality for m in pipe("All three", **ASKED).media][:3] == ["image", "video", "audio"]


def test_compiled_it_says_the_same(anything_directory: Path) -> None:
    plain, fast = load(anything_directory, graphs=False), load(anything_directory, compile=True)
    for prompt in PROMPTS:
        assert fast(prompt, **ASKED).text == plain(prompt, **ASKED).text
    assert graphs(fast) and all(graph.active for graph in graphs(fast))
