"""Which attention goes which way; that it computes the same is PyTorch's, and a GPU's tests'."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from anygen.generators import short_attention
from anygen.generators.quick import Quick
from anygen.generators.short_attention import SHORT, ShortAttention


def test_the_temporal_layers_alone_are_adopted_and_released_as_they_were(tiny_zeroscope: Any) -> None:
    generator = tiny_zeroscope()
    before = dict(generator.unet.attn_processors)
    quick = Quick(generator.models(), graphs=False)
    adopted = {n for n, processor in generator.unet.attn_processors.items() if isinstance(processor, ShortAttention)}
    assert adopted == {name for name in before if "temp_attentions" in name or "transformer_in" in name} != set()
    short_attention.adopt(generator.unet)  # twice is once
    quick.undo()
    assert generator.unet.attn_processors == before


@pytest.mark.parametrize(
    ("cuda", "tokens", "chosen"), [(True, SHORT, True), (True, SHORT + 1, False), (False, 4, False)]
)
def test_short_sequences_on_a_gpu_take_the_kernel_for_them(
    cuda: bool, tokens: int, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    @contextmanager
    def kernel(backends: Any) -> Any:
        seen.append(backends)
        yield

    monkeypatch.setattr(short_attention, "sdpa_kernel", kernel)
    given: Any = SimpleNamespace(is_cuda=cuda, shape=(3, tokens, 8))
    wanted = torch.ones(1)
    made = ShortAttention(
        lambda attn, states, scale, mask=None: wanted if (states, scale, mask) == (given, 2, 5) else None
    )(torch.nn.Identity(), given, 2, mask=5)
    assert made is wanted
    assert [backends[0] for backends in seen] == [SDPBackend.EFFICIENT_ATTENTION] * chosen
