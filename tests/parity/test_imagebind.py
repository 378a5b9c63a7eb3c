"""Our ImageBind against the published code, at small sizes, with one state dict."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anygen.encoders.imagebind import (
    ImageBindConfig,
    ImageBindModel,
    MotionConfig,
    PlaneConfig,
    TextConfig,
    VisionConfig,
)

if importlib.util.find_spec("imagebind") is None or importlib.util.find_spec("einops") is None:
    pytest.skip("needs the published ImageBind code and einops", allow_module_level=True)

CONFIG = ImageBindConfig(
    out_dim=16,
    vision=VisionConfig(width=32, blocks=2, heads=4, patch=56),
    text=TextConfig(width=24, blocks=2, heads=3),
    audio=PlaneConfig(width=24, blocks=2, heads=3, height=128, plane_width=204, patch=32, stride=20, logit_scale=20),
    depth=PlaneConfig(width=24, blocks=2, heads=2, patch=56, stride=56, logit_scale=5),
    thermal=PlaneConfig(width=16, blocks=2, heads=2, patch=56, stride=56, logit_scale=10),
    imu=MotionConfig(width=16, blocks=2, heads=2, drop_path=0.7),
)
INPUTS = {
    "vision": (2, 3, 224, 224),
    "vision clips": (2, 3, 3, 2, 224, 224),
    "text": (2, 77),
    "audio": (2, 3, 1, 128, 204),
    "depth": (2, 1, 224, 224),
    "thermal": (2, 1, 224, 224),
    "imu": (2, 6, 2000),
}


@pytest.fixture(scope="module")
def published() -> Iterator[nn.Module]:
    """The published model at `CONFIG`'s sizes; its optional imports are replaced while this module runs."""
    before = dict(sys.modules)
    stubs = {name: ModuleType(name) for name in ("timm", "timm.layers", "iopath", "iopath.common")}
    stubs |= {name: ModuleType(name) for name in ("iopath.common.file_io", "imagebind.data")}
    # no rate of dropping is read in evaluation mode
    setattr(stubs["timm.layers"], "DropPath", lambda rate: nn.Identity())  # noqa: B010
    setattr(stubs["timm.layers"], "trunc_normal_", nn.init.trunc_normal_)  # noqa: B010
    setattr(stubs["iopath.common.file_io"], "g_pathmgr", None)  # noqa: B010
    sys.modules.update(stubs)
    try:
        torch.manual_seed(0)
        model = (
            importlib.import_module("imagebind.models.imagebind_model")
            .ImageBindModel(**_published_sizes(CONFIG))
            .eval()
        )
        with torch.no_grad():  # fresh biases are 0 and fresh norms 1, which would hide their misuse
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        yield model
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in ("imagebind", "timm", "iopath"):
                del sys.modules[name]
        sys.modules.update({name: before[name] for name in stubs if name in before})


@pytest.fixture(scope="module")
def ours(published: nn.Module) -> ImageBindModel:
    model = ImageBindModel(CONFIG).eval()
    model.load_state_dict(published.state_dict())
    return model


@pytest.mark.parametrize("case", INPUTS)
def test_values_and_gradients_equal_the_published_code(case: str, published: nn.Module, ours: ImageBindModel) -> None:
    trunk = case.split()[0]
    values = _random_values(case)
    answers = []
    for model in (published, ours):
        model.zero_grad()
        embedding = model({trunk: values})[trunk]
        (embedding * torch.linspace(-1, 1, CONFIG.out_dim)).sum().backward()
        answers.append((embedding, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
    (theirs, their_grads), (mine, my_grads) = answers
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert my_grads.keys() == their_grads.keys()
    for key, grad in their_grads.items():
        # the logit scales multiply gradients by up to 20
        torch.testing.assert_close(
            my_grads[key], grad, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_both_have_the_same_keys_and_shapes(published: nn.Module) -> None:
    with torch.device("meta"):
        own = ImageBindModel(CONFIG).state_dict()
    assert {key: value.shape for key, value in own.items()} == {
        key: value.shape for key, value in published.state_dict().items()
    }


def _random_values(case: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if case == "text":
        ids = torch.randint(1, 40000, INPUTS[case], generator=generator)
        ids[0, 9], ids[1, 76] = 49407, 49407
        ids[0, 10:] = 0
        return ids
    return torch.randn(INPUTS[case], generator=generator)


def _published_sizes(config: ImageBindConfig) -> dict[str, Any]:
    sizes: dict[str, Any] = {"out_embed_dim": config.out_dim}
    for name, trunk in config.trunks.items():
        sizes |= {f"{name}_embed_dim": trunk.width, f"{name}_num_blocks": trunk.blocks}
        sizes[f"{name}_num_heads"] = trunk.heads
    assert config.vision and config.audio and config.depth and config.thermal
    sizes["kernel_size"] = (2, config.vision.patch, config.vision.patch)
    sizes |= {"audio_kernel_size": config.audio.patch, "audio_stride": config.audio.stride}
    return sizes | {"depth_kernel_size": config.depth.patch, "thermal_kernel_size": config.thermal.patch}
