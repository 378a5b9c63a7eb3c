"""Layers that leave channels last compute what diffusers' own do."""

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from anygen.generators import quick
from anygen.generators.channels_last import LAYERS, NarrowConv2d, adopt, release

SMALL: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "norm_num_groups": 4}


def adopted(layer: nn.Module) -> Any:
    model = nn.Sequential(copy.deepcopy(layer))
    adopt(model)
    assert type(model[0]) is LAYERS[type(layer)]
    return model[0]


@pytest.mark.parametrize("linear", [True, False])
def test_a_transformer_of_pictures_is_diffusers_and_leaves_channels_last(linear: bool) -> None:
    torch.manual_seed(0)
    plain = Transformer2DModel(**SMALL, cross_attention_dim=6, use_linear_projection=linear).eval()
    values, states = torch.randn(2, 16, 4, 6).to(memory_format=torch.channels_last), torch.randn(2, 5, 6)
    with torch.no_grad():
        wanted = plain(values, encoder_hidden_states=states).sample
        made = adopted(plain)(values, encoder_hidden_states=states).sample
    torch.testing.assert_close(made, wanted)
    assert made.is_contiguous(memory_format=torch.channels_last) and wanted.is_contiguous()


@pytest.mark.parametrize("clips", [1, 3])
def test_a_transformer_of_frames_is_diffusers_and_leaves_channels_last(clips: int) -> None:
    torch.manual_seed(0)
    plain = TransformerTemporalModel(**SMALL).eval()
    values = torch.randn(4 * clips, 16, 2, 3).to(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = plain(values, num_frames=4).sample
        made = adopted(plain)(values, num_frames=4, return_dict=False)[0]
        assert torch.equal(adopted(plain)(values, num_frames=4).sample, made)
    torch.testing.assert_close(made, wanted)
    assert made.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("use_conv", [True, False])
def test_values_are_repeated_as_nearest_neighbours_are(use_conv: bool) -> None:
    torch.manual_seed(0)
    plain = Upsample2D(8, use_conv=use_conv)
    values = torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(adopted(plain)(values), plain(values))
    torch.testing.assert_close(adopted(plain)(values, (7, 10)), plain(values, (7, 10)))


@pytest.mark.parametrize("narrowing", [True, False])
def test_a_residual_block_is_diffusers(narrowing: bool) -> None:
    torch.manual_seed(0)
    plain = ResnetBlock2D(in_channels=12, out_channels=8 if narrowing else 12, temb_channels=6, groups=4)
    values, time = torch.randn(2, 12, 4, 6), torch.randn(2, 6)
    torch.testing.assert_close(adopted(plain)(values, time), plain(values, time))


@pytest.mark.parametrize(("kernel", "channels"), [(3, 4), (1, 3), ((5, 3), 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_into_few_channels_is_pytorchs(kernel: Any, channels: int, bias: bool) -> None:
    torch.manual_seed(0)
    padding = tuple(side // 2 for side in (kernel if isinstance(kernel, tuple) else (kernel, kernel)))
    plain = nn.Conv2d(32, channels, kernel, padding=padding, bias=bias).double()
    model = nn.Sequential(copy.deepcopy(plain))
    adopt(model)
    values = torch.randn(2, 32, 5, 7, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert type(model[0]) is NarrowConv2d
    torch.testing.assert_close(model(values), plain(values), rtol=1e-9, atol=1e-9)
    assert model(values).is_contiguous(memory_format=torch.channels_last) or channels == 1
    release(model)
    assert type(model[0]) is nn.Conv2d


def test_only_convolutions_that_it_computes_become_products() -> None:
    others: list[dict[str, Any]] = [
        {"stride": 2, "padding": 1},
        {"padding": 0},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "groups": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": "same"},
    ]
    model = nn.Sequential(
        *(nn.Conv2d(32, 4, 3, **other) for other in others),
        nn.Conv2d(32, 8, 3, padding=1),
        nn.Conv2d(8, 4, 3, padding=1),
    )
    adopt(model)
    assert {type(module) for module in model} == {nn.Conv2d}


@pytest.mark.parametrize(("kind", "letter"), [(UNet2DConditionModel, "2D"), (UNet3DConditionModel, "3D")])
def test_between_a_unet_s_blocks_channels_are_last(kind: type[nn.Module], letter: str) -> None:
    """What one block hands to the next is in the order in which convolutions read."""
    torch.manual_seed(0)
    unet: Any = kind(
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=8,
        norm_num_groups=4,
        down_block_types=(f"CrossAttnDownBlock{letter}", f"DownBlock{letter}"),
        up_block_types=(f"UpBlock{letter}", f"CrossAttnUpBlock{letter}"),
    ).eval()
    frames = (3,) if letter == "3D" else ()
    given = (torch.randn(2, 4, *frames, 8, 8), 7, torch.randn(2, 5, 8))
    with torch.no_grad():
        wanted = unet(*given).sample
        quick.weights_channels_last(unet)
        adopt(unet)
        first: list[str] = []

        def look(module: nn.Module, _: Any, made: Any) -> None:
            made = getattr(made, "sample", made[0] if isinstance(made, tuple) else made)
            if not made.is_contiguous(memory_format=torch.channels_last):
                first.append(type(module).__name__)

        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            for part in (*block.resnets, *getattr(block, "attentions", ()), *getattr(block, "temp_attentions", ())):
                part.register_forward_hook(look)
        made = unet(*given).sample
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    assert not first
    release(unet)
    assert not any(type(module) in LAYERS.values() for module in unet.modules())
