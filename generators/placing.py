"""A generator's models on a device that is too small for all of them at once, and switches that need less memory.

| placement | on the device | a call takes |
|---|---|---|
| `model_offload` | one model at a time: UNet, then VAE, then vocoder | the copies of the models, once a call |
| `sequential` | one layer at a time | a copy of all weights at every step |

Source: accelerate's `cpu_offload_with_hook` and `cpu_offload`, by which diffusers does the same to its pipelines.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from anygen.errors import ConfigError

Placement = Literal["model_offload", "sequential"]
Saver = Literal["vae_slicing", "vae_tiling", "attention_slicing"]


class Placed:
    """Models that wait in the machine's memory and come to a device when they are called.

    Args:
        models: in the order in which a call needs them; on the CPU.
        device: where they work.
        placement: what comes at once.
    """

    def __init__(self, models: Mapping[str, nn.Module], device: torch.device, placement: Placement) -> None:
        from accelerate import cpu_offload, cpu_offload_with_hook

        self.device, self.hooks = device, []
        for model in models.values():
            if placement == "sequential":
                cpu_offload(model, device, offload_buffers=True)
                continue
            _, hook = cpu_offload_with_hook(model, device, self.hooks[-1] if self.hooks else None)
            self.hooks.append(hook)

    def release(self) -> None:
        """After a call: what is still on the device leaves it."""
        for hook in self.hooks:
            hook.offload()


def check_savers(savers: Collection[str]) -> None:
    """Raises ConfigError unless all are known."""
    if unknown := sorted(set(savers) - set(get_args(Saver))):
        raise ConfigError(f"savers are {', '.join(get_args(Saver))}; got {unknown[0]!r}")


def save_memory(savers: Collection[str], *, vae: Any, denoiser: Any) -> None:
    """Switches on what takes less memory and longer, where the models have it.

    Args:
        savers: "vae_slicing" decodes a sample at a time, "vae_tiling" a tile at a time (seams are blended),
            "attention_slicing" takes heads one by one.
        vae: of diffusers.
        denoiser: of diffusers.

    Raises:
        ConfigError: one is unknown.
    """
    check_savers(savers)
    for name, model, method, arguments in (
        ("vae_slicing", vae, "enable_slicing", ()),
        ("vae_tiling", vae, "enable_tiling", ()),
        ("attention_slicing", denoiser, "set_attention_slice", ("auto",)),
    ):
        if name in savers and hasattr(model, method):
            getattr(model, method)(*arguments)
