"""An LLM in fewer bits: which package does it on a device, and what transformers is told.

The linear layers alone are quantised; embeddings, head, adapter and everything around the LLM keep their type.

Source: LLM.int8() (arXiv:2208.07339) and NF4 of QLoRA (arXiv:2305.14314) by bitsandbytes; weight-only integers by
torchao and optimum-quanto.
"""

from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch

from anygen.errors import ConfigError

Quantization = Literal["8bit", "4bit"]
PACKAGES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "optimum.quanto": "optimum-quanto"}
"""Module -> what to install, in order of preference."""


def check_quantization(quantization: str | None) -> Quantization | None:
    """`quantization`, if it is known.

    Raises:
        ConfigError: it is not; lists what is.
    """
    if quantization is not None and quantization not in get_args(Quantization):
        raise ConfigError(
            f"quantization is one of {', '.join(get_args(Quantization))}, or left out; got {quantization!r}"
        )
    return quantization  # type: ignore[return-value]


def backend(device: torch.device) -> str:
    """The module that quantises on a device.

    Raises:
        ConfigError: none is installed; says what to install.
    """
    wanted = [name for name in PACKAGES if device.type == "cuda" or name != "bitsandbytes"]
    for name in wanted:
        if _installed(name):
            return name
    best = PACKAGES[wanted[0]]
    others = " or ".join(f"'{PACKAGES[name]}'" for name in wanted[1:])
    raise ConfigError(f"quantization needs a package that is not installed: `pip install {best}` (or {others})")


def transformers_config(quantization: Quantization, device: torch.device, dtype: torch.dtype) -> Any:
    """What `AutoModelForCausalLM.from_pretrained` takes as `quantization_config`.

    Args:
        quantization: 8 or 4 bits.
        device: where the LLM goes.
        dtype: what is computed in.

    Raises:
        ConfigError: no package is installed that can; says what to install.
    """
    import transformers

    bits = 8 if quantization == "8bit" else 4
    match backend(device):
        case "bitsandbytes" if bits == 8:
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        case "bitsandbytes":
            return transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        case "torchao" if bits == 8 or device.type == "cuda":
            from torchao import quantization as ao  # type: ignore[import-not-found]

            weights = ao.Int8WeightOnlyConfig() if bits == 8 else ao.Int4WeightOnlyConfig(group_size=64)
            return transformers.TorchAoConfig(weights)
        case _ if _installed("optimum.quanto"):
            return transformers.QuantoConfig(weights=f"int{bits}")
        case found:
            raise ConfigError(
                f"{found} has no {bits}-bit weights for {device.type}: `pip install optimum-quanto`, or take "
                "quantization='8bit'"
            )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
