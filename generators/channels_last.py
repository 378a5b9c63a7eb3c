"""diffusers' layers that leave channels last where they found them so, for code that is compiled.

- Transformers of pictures and clips end with a copy into channels first, which the next convolution copies back; what
  reads one order and writes the other takes four to six times as long as the memory needs.
- Of `F.interpolate` inductor makes a gather by indices that it computes from fractions; repeating needs none.

Each computes what its parent does. Source: diffusers, `models/transformers` and `models/upsampling`.
"""

from typing import Any, cast

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel, TransformerTemporalModelOutput
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


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


LAYERS: dict[type, type] = {
    Transformer2DModel: ChannelsLastTransformer2D,
    TransformerTemporalModel: ChannelsLastTransformerTemporal,
    Upsample2D: RepeatingUpsample2D,
}
"""diffusers' class -> ours."""


def adopt(model: nn.Module) -> None:
    """The layers of a model become ours."""
    _turn(model, LAYERS)


def release(model: nn.Module) -> None:
    """The reverse of `adopt`."""
    _turn(model, {ours: theirs for theirs, ours in LAYERS.items()})


def _turn(model: nn.Module, classes: dict[type, type]) -> None:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
