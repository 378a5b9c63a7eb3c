"""What is to be kept is computed once, in its own order of memory, and differentiable."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anygen.kept import _realised, kept, teach_inductor


def test_it_is_an_operator_of_pytorch_with_a_gradient() -> None:
    values = torch.randn(2, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.anygen.kept.default, (values,))
    kept(values).square().sum().backward()
    torch.testing.assert_close(values.grad, 2 * values.detach())


@pytest.mark.parametrize(
    ("told", "ordered"),
    [
        (torch.zeros(2, 4, 3, 3).to(memory_format=torch.channels_last), True),
        (torch.zeros(2, 4, 3, 3), False),
        (torch.zeros(1, 8), False),
    ],
)
def test_inductor_writes_it_in_the_order_of_its_strides(
    told: torch.Tensor, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V

    class Box:
        realized = False

        def realize(self) -> None:
            self.realized = True

    seen: list[Any] = []
    monkeypatch.setattr(ir.ExternKernel, "require_channels_last", lambda box: seen.append(box) or box)
    box, graph = Box(), SimpleNamespace(current_node=SimpleNamespace(meta={"val": told}))
    with V.set_graph_handler(graph):  # type: ignore[arg-type]
        assert _realised(box) is box and box.realized
    assert seen == [box] * ordered
    teach_inductor()
    assert torch.ops.anygen.kept.default in lowering.lowerings
