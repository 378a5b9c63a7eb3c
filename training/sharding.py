"""What FSDP2 and DeepSpeed need to be told of our models, and how to have a model whole again after the training.

Source: PyTorch FSDP2, `torch.distributed.fsdp.fully_shard`, which replaces parameters by shards (`DTensor`) in place.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from anygen.errors import CheckpointError, ConfigError

_FSDP, _MARKS = "torch.distributed.fsdp", ("__composable_api_state_key", "_fsdp_", "_is_fsdp_")
"""Whose hooks, and which attributes, `fully_shard` leaves on a module."""


def name_layers(module: Any) -> None:
    """Says which layers are sharded one by one: those that the LLM's family names."""
    llm = getattr(module, "llm", None) or getattr(getattr(module, "model", None), "llm", None)
    if llm is not None and getattr(module, "_no_split_modules", None) is None:
        here = {type(part).__name__ for part in module.modules()}
        module._no_split_modules = [name for name in llm.base._no_split_modules or [] if name in here]


def check_shardable(module: nn.Module) -> None:
    """Refuses what sharding would get wrong.

    Raises:
        ConfigError: a parameter's gradient is hooked, as where only some rows train, and sharding drops hooks.
    """
    if hooked := [name for name, p in module.named_parameters() if p.requires_grad and p._backward_hooks]:
        raise ConfigError(
            f"FSDP2 cannot train single rows ({', '.join(hooked)}); use training/accelerate/ddp.yaml for this recipe"
        )


@contextmanager
def touching(module: nn.Module, *, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Inside, what a forward pass returns (its losses; without any, its states) depends on all that trains outside
    sharded layers, if only by zero.

    Processes whose batches lack a part, as those without media lack a projector's, would else reduce other gradients
    than the rest, and the run would hang: FSDP2 and DeepSpeed reduce what has a gradient.

    Args:
        module: whose `forward` is another one inside.
        autocast: dtype of its products, for DeepSpeed, which casts weights and leaves what they meet to us.
    """
    plain = module.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        trained = [p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        device = next(module.parameters()).device.type
        with nullcontext() if autocast is None else torch.autocast(device, dtype=autocast):
            output = plain(*arguments, **options)
        zero = torch.stack([p.flatten()[0].float() * 0 for p in trained]).sum() if trained else 0.0
        losses = [name for name in ("loss", "lm_loss", "alignment_loss") if output.get(name) is not None]
        for name in losses or ["hidden_states"]:
            output[name] = (output[name] + zero).to(output[name].dtype)
        return output

    module.forward = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)


def load_shards(module: nn.Module, checkpoint: Path) -> None:
    """Reads what `accelerate` wrote of a sharded module into it, sharded or not; frozen weights are not in it.

    Raises:
        CheckpointError: it does not fit.
    """
    from torch.distributed import checkpoint as shards

    try:
        (folder,) = checkpoint.glob("pytorch_model_fsdp_*")
        shards.load({"model": module.state_dict()}, checkpoint_id=folder)  # in place
    except (ValueError, RuntimeError, shards.CheckpointException) as error:
        raise CheckpointError(
            f"the checkpoint {checkpoint} does not fit: {str(error).splitlines()[-1][:300]}"
        ) from None


@torch.no_grad()
def whole(module: nn.Module) -> nn.Module:
    """The same module, each process with all of its weights; one that was not spread over processes stays as it is.

    Tied parameters stay tied. Of what DeepSpeed trained the copies in float32 come back, each in memory of its own, as
    files of weights want it.
    """
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    for parameter in module.parameters():
        if hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_get_full_fp32_param  # pyright: ignore[reportMissingImports]

            parameter.data = cast(torch.Tensor, safe_get_full_fp32_param(parameter)).to(parameter.device).clone()
    if not any(isinstance(part, FSDPModule) for part in module.modules()):
        return module
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
            part.__class__ = type(part).__mro__[2]  # FSDP made a class of FSDPModule and the module's own
    for part in module.modules():
        _module_state_mapping.pop(part, None)
        for key in [key for key in part.__dict__ if key.startswith(_MARKS)]:
            del part.__dict__[key]
        for hooks in [value for key, value in part.__dict__.items() if key.endswith("_hooks")]:
            for number in [n for n, hook in hooks.items() if getattr(hook, "__module__", "").startswith(_FSDP)]:
                del hooks[number]
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if isinstance(parameter, DTensor):
                if id(parameter) not in made:
                    full = cast(DTensor, parameter.detach()).full_tensor().clone()
                    made[id(parameter)] = nn.Parameter(full, requires_grad=parameter.requires_grad)
                part._parameters[name] = made[id(parameter)]
    return module
