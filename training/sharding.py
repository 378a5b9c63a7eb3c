"""What FSDP2 needs to be told of our models, and how to have a model whole again when the training is over.

Source: PyTorch FSDP2, `torch.distributed.fsdp.fully_shard`, which replaces parameters by shards (`DTensor`) in place.
"""

from typing import Any, cast

import torch
from torch import nn

from anygen.errors import ConfigError


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


@torch.no_grad()
def whole(module: nn.Module) -> nn.Module:
    """The same module without FSDP2, each process with all of its weights; a module that is not sharded stays as it is.

    Tied parameters stay tied.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for part in list(module.modules()):
        if isinstance(part, FSDPModule):
            part.reshard()
            state = cast(Any, part)._get_fsdp_state()
            state._pre_forward_hook_handle.remove()
            state._post_forward_hook_handle.remove()
            part.__class__ = type(part).__mro__[2]  # FSDP made a class of FSDPModule and the module's own
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if isinstance(parameter, DTensor):
                if id(parameter) not in made:
                    full = cast(DTensor, parameter.detach()).full_tensor().clone()
                    made[id(parameter)] = nn.Parameter(full, requires_grad=parameter.requires_grad)
                part._parameters[name] = made[id(parameter)]
    return module
