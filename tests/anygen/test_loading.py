import pytest
import torch

from anygen.generators.base import Generator
from anygen.loading import Generators, choose_device, choose_dtype


@pytest.mark.parametrize(("cuda", "mps", "wanted"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_that_is_there_is_chosen(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device(None) == torch.device(wanted)
    assert choose_device("cpu") == torch.device("cpu")


def test_bfloat16_is_the_default_on_cuda_alone() -> None:
    assert choose_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert choose_dtype(None, torch.device("cpu")) == choose_dtype(None, torch.device("mps")) == torch.float32
    for name in ("bf16", "bfloat16", torch.bfloat16):
        assert choose_dtype(name, torch.device("cpu")) == torch.bfloat16


def test_generators_are_a_mapping_that_loads_on_demand(pipe: object) -> None:
    image: Generator = pipe.generators["image"]  # type: ignore[attr-defined]
    loads: list[str] = []

    def load() -> Generator:
        loads.append("image")
        return image

    generators = Generators({"image": load})
    assert list(generators) == ["image"] and len(generators) == 1 and "audio" not in generators
    assert generators.get("audio") is None and generators.loaded() == {} and loads == []
    assert generators["image"] is generators["image"] is image
    assert loads == ["image"] and generators.loaded() == {"image": image}
