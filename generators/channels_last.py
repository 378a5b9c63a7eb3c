"""diffusers' layers that leave channels last where they found them so, for code that is compiled.

- Transformers of pictures and clips end with a copy into channels first, which the next convolution copies back; what
  reads one order and writes the other takes four to six times as long as the memory needs.
- What a residual block reads is often what two others join. Inductor joins it while it takes statistics, place after
  place, with channels first; what reads it next turns it around, in four times the time that the memory needs.
- Of `F.interpolate` inductor makes a gather by indices that it computes from fractions; repeating needs none.
- Convolutions into three or four channels, the last ones of UNets and autoencoders, have no quick kernel in cuDNN.

Each computes what its parent does. Source: diffusers, `models/transformers`, `models/resnet` and `models/upsampling`.
"""

from typing import Any, cast

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel, TransformerTemporalModelOutput
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from anygen.kept import kept


class ChannelsLastTransformer2D(Transformer2DModel):
    """`Transformer2DModel`, whose result has channels last in memory."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        values = hidden_states.reshape(batch_size, height, width, -1).permute(0, 3, 1, 2)
        return (values if self.use_linear_projection else self.proj_out(values)) + residual


class ChannelsLastTransformerTemporal(TransformerTemporalModel):
    """`TransformerTemporalModel`, whose result has channels last in memory."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """float[clips * frames, C, H, W] -> the same, attending over the frames of each place."""
        rows, channels, height, width = hidden_states.shape
        clips = rows // num_frames
        values = hidden_states.reshape(clips, num_frames, channels, height, width).transpose(1, 2)
        values = self.norm(values).permute(0, 3, 4, 2, 1).reshape(clips * height * width, num_frames, channels)
        values = self.proj_in(values)
        for block in self.transformer_blocks:
            values = block(
                values,
                encoder_hidden_states=encoder_hidden_states,
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
            )
        values = self.proj_out(values).reshape(clips, height, width, num_frames, channels)
        made = values.permute(0, 3, 1, 2, 4).contiguous().view(rows, height, width, channels).permute(0, 3, 1, 2)
        made = made + hidden_states
        return TransformerTemporalModelOutput(sample=made) if return_dict else (made,)


class ChannelsLastResnetBlock2D(ResnetBlock2D):
    """`ResnetBlock2D`, whose input is put into memory once where both of its branches convolve it."""

    def forward(self, input_tensor: Tensor, temb: Any, *args: Any, **kwargs: Any) -> Tensor:
        """float[B, C, H, W] -> float[B, C', H, W]."""
        given = input_tensor if self.conv_shortcut is None else kept(input_tensor)
        return super().forward(given, temb, *args, **kwargs)


class NarrowConv2d(nn.Conv2d):
    """`nn.Conv2d` with a few output channels as one product of matrices: every place with the weights of every tap,
    summed afterwards."""

    def forward(self, input: Tensor) -> Tensor:
        """float[B, C, H, W] -> float[B, C', H, W]."""
        taps = self.kernel_size[0] * self.kernel_size[1]
        weights = self.weight.permute(1, 2, 3, 0).reshape(self.in_channels, taps * self.out_channels)
        weights = F.pad(weights, (0, -weights.shape[1] % 8))  # rows of a multiple of 16 bytes
        places = input.permute(0, 2, 3, 1)
        made = _wide_product(places.reshape(-1, self.in_channels), weights).narrow(1, 0, taps * self.out_channels)
        made = made.reshape(*places.shape[:3], *self.kernel_size, self.out_channels)
        up, left = (side // 2 for side in self.kernel_size)
        made = F.pad(made, (0, 0, 0, 0, 0, 0, left, left, up, up))
        height, width = input.shape[2:]
        summed: Tensor = sum(  # type: ignore[assignment]
            made.narrow(1, row, height).narrow(2, column, width).select(3, row).select(3, column)
            for row in range(self.kernel_size[0])
            for column in range(self.kernel_size[1])
        )
        if self.bias is not None:
            summed = summed + self.bias
        return summed.to(input.dtype).permute(0, 3, 1, 2)


def _is_narrow(module: nn.Conv2d) -> bool:
    odd = all(side % 2 for side in module.kernel_size)
    same = module.padding == tuple(side // 2 for side in module.kernel_size) and module.padding_mode == "zeros"
    alone = module.stride == (1, 1) and module.dilation == (1, 1) and module.groups == 1
    return odd and same and alone and module.out_channels <= NARROW and module.in_channels >= 8 * module.out_channels


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Of matrices whose results are to be summed; in float32 where the library writes it, which has no gradient."""
    if left.is_cuda and not torch.is_grad_enabled() and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


class RepeatingUpsample2D(Upsample2D):
    """`Upsample2D`, which repeats instead of interpolating."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """float[B, C, H, W] -> float[B, C', 2H, 2W], or of `output_size`."""
        if output_size is not None or self.use_conv_transpose or not self.interpolate or self.norm is not None:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        rows, channels, height, width = hidden_states.shape
        wide = hidden_states[:, :, :, None, :, None].expand(rows, channels, height, 2, width, 2)
        made = wide.reshape(rows, channels, 2 * height, 2 * width)
        if not self.use_conv:
            return made
        return cast(nn.Module, self.conv if self.name == "conv" else self.Conv2d_0)(made)


NARROW = 4
"""Output channels up to which a product is quicker."""
LAYERS: dict[type, type] = {
    ResnetBlock2D: ChannelsLastResnetBlock2D,
    Transformer2DModel: ChannelsLastTransformer2D,
    TransformerTemporalModel: ChannelsLastTransformerTemporal,
    Upsample2D: RepeatingUpsample2D,
}
"""diffusers' class -> ours."""


def adopt(model: nn.Module) -> None:
    """The layers of a model become ours."""
    _turn(model, LAYERS)
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_narrow(module):
            module.__class__ = NarrowConv2d


def release(model: nn.Module) -> None:
    """The reverse of `adopt`."""
    _turn(model, {ours: theirs for theirs, ours in LAYERS.items()} | {NarrowConv2d: nn.Conv2d})


def _turn(model: nn.Module, classes: dict[type, type]) -> None:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
