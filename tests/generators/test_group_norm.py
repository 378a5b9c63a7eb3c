"""Group normalisation channel by channel is PyTorch's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anygen.generators.group_norm import ChannelwiseGroupNorm, _parts, adopt, group_norm, release


@pytest.mark.parametrize("shape", [(2, 12, 5), (2, 12, 4, 6), (1, 12, 3, 4, 5), (2, 12, 32, 24)])
@pytest.mark.parametrize("affine", [True, False])
def test_it_is_pytorchs(shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    # channels of unlike means and widths, so that statistics of channels are not those of groups
    values = torch.randn(shape, dtype=torch.float64) * torch.rand(12, *(1,) * (len(shape) - 2), dtype=torch.float64)
    values += 50 * torch.randn(12, *(1,) * (len(shape) - 2), dtype=torch.float64)
    weight, bias = (torch.randn(2, 12, dtype=torch.float64)) if affine else (None, None)
    for groups in (1, 3, 12):
        made, wanted = (norm(values, groups, weight, bias, 1e-5) for norm in (group_norm, F.group_norm))
        torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-9)


def test_channels_are_read_in_parts_that_divide_them() -> None:
    assert [_parts(places) for places in (1, 64, 255, 256, 4096, 384, 2**20)] == [1, 1, 1, 2, 32, 2, 256]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_it_keeps_the_dtype_and_the_order_and_rounds_once(order: torch.memory_format) -> None:
    torch.manual_seed(0)
    wide = (torch.randn(2, 8, 6, 6) + 3).to(torch.bfloat16).to(memory_format=order)
    norm = nn.GroupNorm(4, 8)
    nn.init.normal_(norm.weight)
    wanted = norm(wide.float()).to(torch.bfloat16)
    adopt(norm.to(torch.bfloat16))
    made = norm(wide)
    assert made.dtype == torch.bfloat16 and made.is_contiguous(memory_format=order)
    torch.testing.assert_close(made, wanted, rtol=2e-2, atol=2e-2)  # weights are of bfloat16 too


def test_a_large_mean_costs_no_digits() -> None:
    torch.manual_seed(0)
    values = torch.randn(1, 4, 64, 64) + 3000
    wanted = F.group_norm(values.double(), 2)
    torch.testing.assert_close(group_norm(values, 2, None, None, 1e-5).double(), wanted, rtol=1e-3, atol=2e-3)


def test_modules_are_adopted_and_released_as_they_were() -> None:
    class Own(nn.GroupNorm):
        pass

    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Sequential(nn.GroupNorm(1, 4)), Own(2, 4))
    keys, values = set(model.state_dict()), torch.randn(3, 4)
    wanted = model(values)
    adopt(model)
    assert [type(m) for m in (model[0], model[1][0], model[2])] == [ChannelwiseGroupNorm] * 2 + [Own]  # type: ignore[index]
    assert set(model.state_dict()) == keys
    torch.testing.assert_close(model(values), wanted)  # [B, C] alone has nothing to join
    release(model)
    assert type(model[0]) is nn.GroupNorm and type(model[1][0]) is nn.GroupNorm  # type: ignore[index]
