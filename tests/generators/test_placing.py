"""Models that come and go make the same media; here all of them come to the CPU, which is what hooks are told."""

from typing import Any

import numpy as np
import pytest
import torch

from anygen.errors import ConfigError
from anygen.features import Condition
from anygen.generators.placing import check_savers
from anygen.registry import lookup


@pytest.mark.parametrize("placement", ["model_offload", "sequential"])
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_a_placed_generator_makes_the_same(
    placement: str, modality: str, tiny_zeroscope: Any, tiny_audioldm2: Any
) -> None:
    make = tiny_zeroscope if modality == "video" else tiny_audioldm2
    generator, placed = make(), make().place("cpu", placement)
    torch.manual_seed(5)
    condition = Condition({n: torch.randn(2, *shape) for n, shape in generator.condition_spec.shapes.items()})
    wanted = generator.generate(condition, seeds=[1, 2], steps=2)
    for _ in range(2):
        made = placed.generate(condition, seeds=[1, 2], steps=2)
        placed.release()
        assert made == wanted
    weight = next(placed.unet.parameters())
    assert weight.is_meta == (placement == "sequential") and placed.device.type == "cpu"
    assert all(hasattr(model, "_hf_hook") for model in (placed.unet, placed.vae))


@pytest.mark.parametrize("placement", ["model_offload", "sequential"])
def test_a_placed_pipeline_makes_the_same(placement: str, tiny_pipeline: Any, tmp_path: Any) -> None:
    tiny_pipeline("sdxl").save_pretrained(tmp_path)
    cls: Any = lookup("generator", "diffusers/sdxl")
    generator, placed = (cls.from_pretrained(tmp_path, steps=2, height=16, width=16) for _ in range(2))
    condition = generator.encode_text(["a red apple"])
    wanted = generator.sample(condition, [3])
    placed.place("cpu", placement)
    np.testing.assert_allclose(placed.sample(condition, [3]), wanted, atol=1e-6)
    placed.release()
    np.testing.assert_allclose(placed.sample(condition, [3]), wanted, atol=1e-6)


def test_switches_that_save_memory_are_switched_on(tiny_zeroscope: Any, tiny_pipeline: Any) -> None:
    generator = tiny_zeroscope()
    condition = Condition({"prompt_embeds": torch.randn(2, *generator.condition_spec.shapes["prompt_embeds"])})
    wanted = generator.sample(condition, [1, 2], 2), generator.generate(condition, seeds=[1, 2], steps=2)
    generator.save_memory(["vae_slicing", "attention_slicing"])
    assert generator.vae.use_slicing and not generator.vae.use_tiling
    torch.testing.assert_close(generator.sample(condition, [1, 2], 2), wanted[0], rtol=1e-4, atol=1e-4)
    for made, clip in zip(generator.generate(condition, seeds=[1, 2], steps=2), wanted[1], strict=True):
        assert abs(made.frames.astype(int) - clip.frames.astype(int)).max() <= 1
    generator.save_memory(["vae_tiling"])
    assert generator.vae.use_tiling
    pipeline: Any = lookup("generator", "diffusers/sdxl")(tiny_pipeline("sdxl"))
    pipeline.save_memory(["vae_tiling"])
    assert pipeline.pipeline.vae.use_tiling
    with pytest.raises(ConfigError, match="savers are vae_slicing, vae_tiling, attention_slicing; got 'magic'"):
        check_savers(["magic", "vae_tiling"])
