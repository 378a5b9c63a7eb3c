"""A UNet over clips whose spatial layers are an image UNet's: temporal layers are put in between and learn alone.

Zeroscope's `UNet3DConditionModel` holds a `UNet2DConditionModel` layer by layer, and its temporal layers begin as the
identity, so that each frame is at first drawn as that UNet draws a picture. A folder may keep the temporal layers alone
and say in `shared.json` where the image UNet lies.

Source: Guo et al. 2023 (arXiv:2307.04725) and Blattmann et al. 2023 (arXiv:2304.08818), temporal layers in a frozen
image UNet; Wang et al. 2023 (arXiv:2308.06571), the layers.
Differs: `config.json` has two things beyond diffusers'. `temporal_levels` names the levels that have temporal layers,
from the finest, 0; the middle block counts as one more below the coarsest, and with a list the layer at the entry is
left out as well. `attention_head_dim` may be a list, a width for each level, as an image UNet of 8 heads a level needs:
diffusers' class has one width for all (its layer at the entry cannot be built of a list, and a `TypeError` says so).
"""

import json
from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anygen.component import SHARD, check_fit, read_safetensors
from anygen.errors import CheckpointError, ConfigError

WEIGHTS = "diffusion_pytorch_model"
LEVELS = "temporal_levels"
_ALIKE = (
    "sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block", "downsample_padding",
    "mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps", "cross_attention_dim", "time_cond_proj_dim",
)  # fmt: skip
"""Fields that mean the same in both classes."""
_FIXED: Mapping[str, Any] = {
    "addition_embed_type": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "dual_cross_attention": False,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "upcast_attention": False,
}
"""Fields of an image UNet that a UNet over clips has not, with the value that it has built in."""


class SkippedTime(nn.Module):
    """Stands where a temporal layer is the identity, and costs nothing."""

    def __init__(self, wraps: bool) -> None:
        """`wraps`: attention gives its result in a tuple, a convolution does not."""
        super().__init__()
        self.wraps = wraps

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor | tuple[Tensor]:
        """float[B * F, C, h, w], as it came."""
        return (hidden_states,) if self.wraps else hidden_states


def is_temporal(name: str) -> bool:
    """Whether a parameter of a `UNet3DConditionModel` is of a layer that an image UNet lacks."""
    return name.startswith("transformer_in.") or ".temp_convs." in name or ".temp_attentions." in name


def temporal_state(unet: nn.Module) -> dict[str, Tensor]:
    """The parameters of the temporal layers that are there."""
    return {name: value for name, value in unet.state_dict().items() if is_temporal(name)}


def clip_config(image: Mapping[str, Any], levels: tuple[int, ...] | None) -> dict[str, Any]:
    """The configuration of the UNet over clips that holds an image UNet.

    Args:
        image: a `UNet2DConditionModel`'s configuration.
        levels: as `temporal_levels` in the module's docstring; None: all temporal layers there are.

    Raises:
        ConfigError: the image UNet has what a UNet over clips cannot have, or there is no such level.
    """
    if odd := [name for name, value in _FIXED.items() if image.get(name, value) != value]:
        raise ConfigError(f"a UNet over clips cannot hold an image UNet with {odd[0]} = {image[odd[0]]!r}")
    channels = image["block_out_channels"]
    if wrong := [level for level in levels or () if not 0 <= level <= len(channels)]:
        raise ConfigError(f"temporal_levels: the UNet has levels 0 to {len(channels)}, the last its middle: {wrong[0]}")
    heads = image["attention_head_dim"]  # so diffusers calls it
    heads = [heads] * len(channels) if isinstance(heads, int) else heads
    widths = [width // count for width, count in zip(channels, heads, strict=True)]
    config = {name: image[name] for name in _ALIKE if name in image}
    for side in ("down_block_types", "up_block_types"):
        config[side] = [kind.replace("2D", "3D") for kind in image[side]]
    config["attention_head_dim"] = widths[0] if len(set(widths)) == 1 else widths
    return config if levels is None else config | {LEVELS: sorted(set(levels))}


def animated(image_unet: Any, levels: tuple[int, ...] | None) -> Any:
    """A UNet over clips with all layers of `image_unet`, copied and frozen; its temporal layers do nothing yet.

    A pass needs gradients from the first temporal layer on: what lies before it costs a forward pass only.

    Raises:
        ConfigError: as `clip_config`.
        CheckpointError: a layer of the one has no counterpart in the other.
    """
    config = clip_config(image_unet.config, levels)
    unet = _build(config)
    for name, parameter in unet.named_parameters():
        if is_temporal(name) and ".proj_out." in f".{name}":  # the convolutions' last layer is zero already
            nn.init.zeros_(parameter)
    _leave_out(unet, config)
    load_spatial(unet, image_unet.state_dict(), "the image generator's UNet")
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(is_temporal(name))
    return unet


def load_spatial(unet: nn.Module, image: Mapping[str, Tensor], what: str) -> None:
    """Copies an image UNet's weights into the spatial layers; what and where they are from is told in errors.

    Raises:
        CheckpointError: a weight of the one has no counterpart in the other.
    """
    spatial = {name: value for name, value in unet.state_dict().items() if not is_temporal(name)}
    given = as_spatial(image, spatial)
    check_fit(spatial, given, what)
    unet.load_state_dict(given, strict=False)


def as_spatial(image: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An image UNet's weights, in the shapes wanted where they differ as a 1x1 convolution from a linear layer."""
    given = dict(image)
    for name, value in image.items():
        if name in wanted and {value.ndim, wanted[name].ndim} == {2, 4} and value.numel() == wanted[name].numel():
            given[name] = value.reshape(wanted[name].shape)
    return given


def has_own_layout(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` says what diffusers' class does not read; see the module's docstring."""
    return LEVELS in config or not isinstance(config.get("attention_head_dim", 64), int)


def load_clip_unet(directory: Path, dtype: torch.dtype, image: Path | None = None) -> Any:
    """Reads a UNet over clips.

    Args:
        directory: `config.json` and the weights, those of the temporal layers alone if `image` is given.
        dtype: of the weights.
        image: the folder of the `UNet2DConditionModel` that has the spatial layers.

    Raises:
        CheckpointError: a file is missing, or a weight is missing, left over or of another shape.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / 'config.json'} is not readable: {error}") from None
    with torch.device("meta"):  # no time is lost on weights that are replaced
        unet = _build(config)
    state = read_safetensors(directory, WEIGHTS)
    if image is None:  # as diffusers reads it: a layer that is left out is there as the identity
        check_fit(unet.state_dict(), state, f"{directory}")
        _leave_out(unet, config)
        state = {name: state[name] for name in unet.state_dict()}
    else:
        _leave_out(unet, config)
        wanted = unet.state_dict()
        state |= as_spatial(read_safetensors(image, WEIGHTS), wanted)
        check_fit(wanted, state, f"the UNet of {directory} and {image}")
    unet.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
    return unet


def whole(unet: Any) -> Any:
    """The UNet with every temporal layer that diffusers' class has; those that were left out are the identity."""
    with torch.device("meta"):
        full = _build(unet.config)
    have = unet.state_dict()
    state = {
        name: have[name] if name in have else torch.zeros(value.shape, dtype=unet.dtype)
        for name, value in full.state_dict().items()
    }
    full.load_state_dict(state, assign=True)
    return full


def save_temporal(unet: Any, directory: Path) -> None:
    """Writes `config.json` and the temporal layers that are there: what `load_clip_unet` reads beside an image UNet."""
    from huggingface_hub import save_torch_state_dict

    unet.save_config(directory)
    save_torch_state_dict(
        temporal_state(unet), directory, filename_pattern=WEIGHTS + "{suffix}.safetensors", max_shard_size=SHARD
    )


def _build(config: Mapping[str, Any]) -> Any:
    """A `UNet3DConditionModel` with all its temporal layers, and with heads of the widths told."""
    from diffusers import UNet3DConditionModel
    from diffusers.models.attention_processor import Attention

    told = {name: value for name, value in config.items() if name not in (LEVELS, "_name_or_path")}
    widths = told.get("attention_head_dim", 64)
    if isinstance(widths, int):
        unet: Any = UNet3DConditionModel.from_config(told)
    else:
        # Queries, keys and values are as wide as their level, so the width of a head sets only where they are cut.
        unet = UNet3DConditionModel.from_config(told | {"attention_head_dim": gcd(*widths)})
        for block, width in zip(_blocks(unet), [*widths, widths[-1], *widths], strict=True):
            for module in block.modules():
                if isinstance(module, Attention):
                    module.heads = module.sliceable_head_dim = module.inner_dim // width
                    module.scale = width**-0.5
        unet.register_to_config(attention_head_dim=list(widths))
    if LEVELS in config:
        unet.register_to_config(**{LEVELS: list(config[LEVELS])})
    return unet


def _leave_out(unet: Any, config: Mapping[str, Any]) -> None:
    """Replaces the temporal layers that the configuration does not name."""
    if LEVELS not in config:
        return
    unet.transformer_in = SkippedTime(wraps=True)
    depth = len(unet.down_blocks)
    for block, level in zip(_blocks(unet), [*range(depth), depth, *range(depth)], strict=True):
        if level in config[LEVELS]:
            continue
        for kind, wraps in (("temp_convs", False), ("temp_attentions", True)):
            if (layers := getattr(block, kind, None)) is not None:
                setattr(block, kind, nn.ModuleList(SkippedTime(wraps) for _ in layers))


def _blocks(unet: Any) -> list[nn.Module]:
    """From the finest level down, the middle, and again from the finest level down."""
    return [*unet.down_blocks, unet.mid_block, *reversed(unet.up_blocks)]
