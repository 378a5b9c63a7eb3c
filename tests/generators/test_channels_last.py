"""Layers that leave channels last compute what diffusers' own do."""

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from anygen.generators import quick
from anygen.generators.channels_last import LAYERS, adopt, release

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
