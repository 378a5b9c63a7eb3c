"""A UNet over clips that holds an image UNet: heads, levels, and what is stored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anygen.errors import CheckpointError, ConfigError
from anygen.generators.clip_unet import (
    WEIGHTS,
    SkippedTime,
    animated,
    clip_config,
    is_temporal,
    load_clip_unet,
    save_temporal,
    temporal_state,
    whole,
)
from anygen.generators.latent import EMBEDS, SHARED, save_part
from anygen.generators.stable_diffusion import StableDiffusionGenerator
from anygen.generators.zeroscope import ZeroscopeGenerator

SHIPPED = Path(__file__).parents[2] / "anygen/assets/mini/generators/image/unet/config.json"
SHARES = {"vae": "../image/vae", "text_encoder": "../image/text_encoder", "tokenizer": "../image/tokenizer"}
LEVELS = [None, (), (0,), (0, 1), (1, 2), (3,)]


def image_unet(channels: tuple[int, ...] = (16, 24, 32), heads: int | tuple[int, ...] = 4, **changes: Any) -> Any:
    """A random `UNet2DConditionModel` whose levels are of different widths."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    changes |= {"attention_head_dim": heads}
    unet: Any = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        norm_num_groups=4,
        **changes,
    )
    return unet.eval()


def stirred(unet: Any) -> Any:
    """With temporal layers that do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in temporal_state(unet).values():
            value.normal_(std=0.3)
    return unet.eval()


def draws(unet: Any, clips: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return unet(clips, torch.tensor([7, 800]), encoder_hidden_states=embeds).sample


def assert_draws_frames(unet: Any, pictures: Any, width: int) -> None:
    """Untrained, each frame is what the image UNet makes of it."""
    torch.manual_seed(2)
    clips, embeds = torch.randn(2, unet.config.in_channels, 3, 4, 4), torch.randn(2, 5, width)
    drawn = draws(unet, clips, embeds)
    for frame in range(3):
        wanted = draws(pictures, clips[:, :, frame], embeds)
        assert wanted.std() > 0.01
        torch.testing.assert_close(drawn[:, :, frame], wanted, rtol=0, atol=1e-4)


# --- layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("heads", [4, (2, 4, 8)])
def test_untrained_it_draws_each_frame_as_the_image_unet(
    levels: tuple[int, ...] | None, heads: int | tuple[int, ...]
) -> None:
    pictures = image_unet(heads=heads)
    assert_draws_frames(animated(pictures, levels).eval(), pictures, 16)


def test_so_it_does_with_the_image_unet_that_ships() -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    pictures: Any = UNet2DConditionModel.from_config(json.loads(SHIPPED.read_text()))
    unet = animated(pictures.eval(), (0, 1)).eval()
    assert unet.config.attention_head_dim == [16, 24, 32]
    assert_draws_frames(unet, pictures, 256)
    sizes = [sum(value.numel() for name, value in temporal_state(unet).items() if kind in name) for kind in
             ("temp_convs", "temp_attentions")]  # fmt: skip
    assert sizes == [1_928_448, 3_534_528]


def test_every_spatial_weight_is_a_frozen_copy_and_the_temporal_ones_learn() -> None:
    pictures = image_unet()
    unet, given = animated(pictures, (0, 1)), dict(pictures.named_parameters())
    spatial = {name: value for name, value in unet.named_parameters() if not is_temporal(name)}
    assert spatial.keys() == given.keys() and len(temporal_state(unet)) > 0
    for name, value in spatial.items():
        assert torch.equal(value.flatten(), given[name].flatten()) and value.data_ptr() != given[name].data_ptr()
    assert all(value.requires_grad == is_temporal(name) for name, value in unet.named_parameters())


@pytest.mark.parametrize("levels", LEVELS[1:])
def test_only_the_levels_named_have_temporal_layers(levels: tuple[int, ...]) -> None:
    unet = stirred(animated(image_unet(), levels))
    blocks = [[unet.down_blocks[n], unet.up_blocks[2 - n]] for n in range(3)] + [[unet.mid_block]]
    for level, owners in enumerate(blocks):
        for block in owners:
            skipped = {isinstance(m, SkippedTime) for k in ("temp_convs", "temp_attentions") if hasattr(block, k)
                       for m in getattr(block, k)}  # fmt: skip
            assert skipped == {level not in levels}
    assert isinstance(unet.transformer_in, SkippedTime)
    clips, embeds = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 5, 16)
    changed = clips.clone()
    changed[:, :, 0] += 1
    moved = (draws(unet, changed, embeds) - draws(unet, clips, embeds))[:, :, 2].abs().max()
    assert (moved > 1e-3) == bool(levels)  # frames see each other through these layers alone


def test_heads_are_cut_where_the_image_unet_cuts_them_in_temporal_attention_too() -> None:
    unet = animated(image_unet(), (0, 1))
    for block, width in zip(unet.down_blocks[:2], (4, 6), strict=True):
        for layer in (block.attentions[0], block.temp_attentions[0]):
            attention = layer.transformer_blocks[0].attn1
            assert (attention.heads, attention.scale) == (4, width**-0.5)


@pytest.mark.parametrize(
    ("changes", "levels", "message"),
    [
        ({"freq_shift": 1}, (0,), "cannot hold an image UNet with freq_shift = 1"),
        ({}, (0, 4), "temporal_levels: the UNet has levels 0 to 3, the last its middle: 4"),
        ({}, (-1,), "levels 0 to 3, the last its middle: -1"),
    ],
)
def test_what_a_unet_over_clips_cannot_be_is_refused(
    changes: dict[str, Any], levels: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        clip_config(image_unet(**changes).config, levels)


def test_an_image_unet_with_layers_that_have_no_counterpart_is_refused() -> None:
    deep: Any = {"transformer_layers_per_block": 2}
    with pytest.raises(CheckpointError, match=r"the image generator's UNet does not fit: unexpected .*blocks\.1"):
        animated(image_unet(**deep), (0,))


# --- folders -------------------------------------------------------------------------------------------------


@pytest.fixture
def composed(tmp_path: Path) -> tuple[Any, Path, Path]:
    """A UNet with temporal layers, the folder of these, and that of the image UNet."""
    pictures = image_unet()
    unet = stirred(animated(pictures, (0, 1)))
    save_temporal(unet, tmp_path / "clips")
    save_part(pictures, tmp_path / "pictures")
    return unet, tmp_path / "clips", tmp_path / "pictures"


def test_temporal_layers_and_image_unet_are_joined_to_what_was_saved(composed: tuple[Any, Path, Path]) -> None:
    unet, clips, pictures = composed
    stored = load_file(clips / f"{WEIGHTS}.safetensors")
    assert stored.keys() == temporal_state(unet).keys()
    loaded = load_clip_unet(clips, torch.float32, pictures).eval()
    assert dict(loaded.config).items() >= {"temporal_levels": [0, 1], "attention_head_dim": [4, 6, 8]}.items()
    given, embeds = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 5, 16)
    torch.testing.assert_close(draws(loaded, given, embeds), draws(unet, given, embeds))
    assert load_clip_unet(clips, torch.float16, pictures).dtype == torch.float16


def test_a_whole_unet_has_all_layers_of_diffusers_class_and_draws_the_same(
    composed: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    unet, *_ = composed
    full = whole(unet).eval()
    given, embeds = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 5, 16)
    assert full.state_dict().keys() == animated(image_unet(), None).state_dict().keys()
    torch.testing.assert_close(draws(full, given, embeds), draws(unet, given, embeds))
    save_part(full, tmp_path / "full")
    again = load_clip_unet(tmp_path / "full", torch.float32).eval()
    assert again.state_dict().keys() == unet.state_dict().keys()  # the others are not computed
    torch.testing.assert_close(draws(again, given, embeds), draws(unet, given, embeds))


def test_weights_that_are_missing_or_too_many_are_listed(composed: tuple[Any, Path, Path]) -> None:
    _, clips, pictures = composed
    stored = load_file(file := clips / f"{WEIGHTS}.safetensors")
    name = next(iter(stored))
    save_file({("other" if key == name else key): value for key, value in stored.items()}, file)
    with pytest.raises(CheckpointError, match=rf"does not fit: missing {name}; unexpected other"):
        load_clip_unet(clips, torch.float32, pictures)
    with pytest.raises(CheckpointError, match="does not fit: missing conv_in.weight"):
        load_clip_unet(clips, torch.float32)
    (clips / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not readable"):
        load_clip_unet(clips, torch.float32, pictures)


# --- generators ----------------------------------------------------------------------------------------------


def generator_of(given: ZeroscopeGenerator, unet: Any) -> ZeroscopeGenerator:
    parts = {"vae": given.vae, "scheduler": given.scheduler, "unconditional": given.unconditional, "text": given.text}
    return ZeroscopeGenerator(unet=unet, defaults=given.defaults, **parts)


@pytest.mark.parametrize("channels", [(16, 16, 16), (16, 24, 32)])
def test_a_composed_folder_and_a_standalone_one_give_the_same_clips_here_and_in_diffusers(
    tiny_zeroscope: Callable[..., ZeroscopeGenerator], tmp_path: Path, channels: tuple[int, ...]
) -> None:
    from diffusers import TextToVideoSDPipeline, UNet3DConditionModel

    given, pictures = tiny_zeroscope(), image_unet(channels)
    generator = generator_of(given, stirred(animated(pictures, (0, 1))))
    parts = {"vae": given.vae, "scheduler": given.scheduler, "unconditional": given.unconditional, "text": given.text}
    StableDiffusionGenerator(unet=pictures, **parts).save_pretrained(tmp_path / "image")
    generator.save_pretrained(tmp_path / "video", shared=SHARES | {"spatial": "../image/unet"})
    generator.save_pretrained(tmp_path / "whole")
    assert json.loads((tmp_path / "video" / SHARED).read_text())["spatial"] == "../image/unet"
    condition = generator.encode_text(["a red apple"])
    wanted = generator.sample(condition, [4])
    composed, standalone = (ZeroscopeGenerator.from_pretrained(tmp_path / name) for name in ("video", "whole"))
    for loaded in (composed, standalone):
        torch.testing.assert_close(loaded.sample(condition, [4]), wanted, atol=1e-5, rtol=0)
    (one,), (same,) = (loaded.generate(condition, seeds=[4]) for loaded in (composed, standalone))
    assert one == same
    if len(set(channels)) > 1:  # heads of several widths: refused, rather than cut elsewhere
        with pytest.raises(TypeError, match="must be tuple of ints"):
            UNet3DConditionModel.from_pretrained(tmp_path / "whole/unet")
        pipeline: Any = TextToVideoSDPipeline.from_pretrained(tmp_path / "whole", unet=standalone.unet)
    else:
        pipeline = TextToVideoSDPipeline.from_pretrained(tmp_path / "whole")
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        prompt_embeds=condition.tensors[EMBEDS],
        negative_prompt_embeds=generator.unconditional[None],
        num_frames=generator.defaults.frames,
        num_inference_steps=generator.defaults.steps,
        guidance_scale=generator.defaults.guidance_scale,
        generator=[torch.Generator().manual_seed(4)],
        output_type="latent",
    ).frames
    torch.testing.assert_close(latents, wanted, atol=1e-5, rtol=0)


def test_an_image_generator_has_its_spatial_layers_itself(
    tiny_zeroscope: Callable[..., ZeroscopeGenerator], tmp_path: Path
) -> None:
    given = tiny_zeroscope()
    parts = {"vae": given.vae, "scheduler": given.scheduler, "unconditional": given.unconditional, "text": given.text}
    generator = StableDiffusionGenerator(unet=image_unet(), **parts)
    generator.save_pretrained(tmp_path / "image")
    with pytest.raises(ConfigError, match="'spatial': a UNet2DConditionModel cannot have its spatial layers from"):
        generator.save_pretrained(tmp_path / "other", shared={"spatial": "../image/unet"})
    (tmp_path / "image" / SHARED).write_text(json.dumps({"spatial": "unet"}))
    with pytest.raises(CheckpointError, match="cannot have its spatial layers from another UNet"):
        StableDiffusionGenerator.from_pretrained(tmp_path / "image")


def test_a_missing_image_unet_is_named_with_its_place(
    tiny_zeroscope: Callable[..., ZeroscopeGenerator], tmp_path: Path
) -> None:
    tiny_zeroscope().save_pretrained(tmp_path)
    (tmp_path / SHARED).write_text(json.dumps({"spatial": "../image/unet"}))
    with pytest.raises(CheckpointError, match=r"it has no 'spatial' at \.\./image/unet, where shared\.json has it"):
        ZeroscopeGenerator.from_pretrained(tmp_path)
