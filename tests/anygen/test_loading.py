import pytest
import torch

from anygen.loading import choose_device, choose_dtype


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
