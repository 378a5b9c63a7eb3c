"""Graphs of functions, emulated on the CPU: what is checked is all but CUDA's own part."""

import logging

import pytest
import torch
from torch import Tensor

from anygen import graphs
from anygen.graphs import Graphed


def scaled(values: Tensor, *, by: dict[str, Tensor], times: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    return values * by["factor"] * times, {"sum": values.sum(0)}


@torch.inference_mode()
def test_each_shape_is_captured_at_its_second_call_and_results_are_the_functions(emulate: type) -> None:
    capture = emulate()
    fast = Graphed(scaled, "it", capture=capture)
    given = [torch.randn(3, 2), torch.randn(3, 2), torch.randn(5, 2), torch.randn(3, 2), torch.randn(3, 2)]
    results = []
    for number, values in enumerate(given):
        told = {"factor": torch.tensor(float(number + 2))}
        results.append((fast(values, by=told), scaled(values, by=told)))
    for made, wanted in results:  # all at the end: a replay must not change what an earlier one gave
        torch.testing.assert_close(made, wanted, rtol=0, atol=0)
    assert (capture.captures, capture.replays, len(fast)) == (1, 3, 1)


@torch.inference_mode()
def test_the_first_call_runs_on_the_tensors_that_are_captured(emulate: type) -> None:
    """Otherwise compiled code, which tells inference tensors from others, would be made anew during the capture."""
    seen: list[tuple[int, bool]] = []

    def doubled(values: Tensor) -> Tensor:
        seen.append((values.data_ptr(), values.is_inference()))
        return 2 * values

    fast = Graphed(doubled, "it", capture=emulate())
    for number in range(3):
        values = torch.full((2,), float(number))
        assert values.is_inference()
        torch.testing.assert_close(fast(values), 2 * values)
    assert len(seen) > 1 and len(set(seen)) == 1 and not seen[0][1]


@torch.inference_mode()
def test_another_constant_is_another_graph_and_few_are_kept(emulate: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    capture = emulate()
    fast, values, by = Graphed(scaled, "it", capture=capture), torch.randn(2, 2), {"factor": torch.tensor(2.0)}
    for times in (1, 1, 2, 2, 3, 3):
        torch.testing.assert_close(fast(values, by=by, times=times), scaled(values, by=by, times=times))
    assert capture.captures == 3 and len(fast) == 2
    fast.clear()
    assert len(fast) == 0


def test_nothing_is_captured_where_gradients_are_wanted(emulate: type) -> None:
    capture = emulate()
    fast = Graphed(scaled, "it", capture=capture)
    values = torch.randn(3, 2, requires_grad=True)
    for _ in range(3):
        fast(values, by={"factor": torch.tensor(2.0)})[0].sum().backward()
    assert capture.captures == 0 and values.grad is not None


@torch.inference_mode()
def test_a_capture_that_fails_is_told_once_and_the_function_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    fast, values = Graphed(scaled, "the UNet", capture=refuse), torch.randn(2, 2)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, logger="anygen"):
        for _ in range(4):
            torch.testing.assert_close(
                fast(values, by={"factor": torch.tensor(3.0)}), scaled(values, by={"factor": torch.tensor(3.0)})
            )
    wanted = "the UNet runs without a CUDA graph: operation not permitted when stream is capturing"
    assert caplog.messages == [wanted] and not fast.active
