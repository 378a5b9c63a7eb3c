"""Which of a model's generators can be held at once on a device, and what to switch on where not even one can.

The first policy that fits is taken: everything resident; one generator at a time; one model of one; one layer.
"""

from dataclasses import dataclass

import torch

from anygen.errors import OutOfMemoryError
from anygen.memory_need import POLICIES, ModelNeed
from anygen.preset_parts import Precision
from anygen.presets import GIB

_TOLD = {
    "resident": "everything stays",
    "auto": "generators make room for each other",
    "after_use": "each generator goes once its media are made",
    "model_offload": "one model of a generator at a time",
    "sequential": "one layer of a generator at a time",
}
_ORDER: tuple[tuple[Precision, str], ...] = (
    ("bf16", "dtype='bfloat16'"),
    ("8-bit", "dtype='bfloat16', quantization='8bit'"),
    ("4-bit", "dtype='bfloat16', quantization='4bit'"),
)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What was decided; `print` it."""

    need: ModelNeed
    precision: Precision
    free: int
    """Bytes that the device had."""
    device: str
    offload: str
    """The policy."""

    def __str__(self) -> str:
        """One line, then one a part."""
        taken = self.need.total(self.precision, self.offload)
        share = f"{_size(taken)} of the {_size(self.free)} that are free on {self.device}"
        lines = [f"offload '{self.offload}': {_TOLD[self.offload]}; at most {share}"]
        for need in self.need.needs:
            size = need.bytes[self.precision]
            lines.append(f"  {need.role}: {'not known yet' if size is None else _size(size)}")
        return "\n".join(lines)


def precision_of(dtype: torch.dtype, quantization: str | None = None) -> Precision:
    """The column of `ModelNeed` for what is loaded."""
    if quantization is not None:
        return "8-bit" if quantization == "8bit" else "4-bit"
    return "fp32" if dtype == torch.float32 else "bf16"


def plan_memory(
    need: ModelNeed, free: int, device: torch.device, *, precision: Precision, offload: str | None = None
) -> MemoryPlan:
    """The policy for a device.

    Args:
        need: of the model.
        free: bytes on the device before anything is loaded.
        device: which; only on CUDA is a model refused, as a machine's memory gives way by itself.
        precision: what is loaded.
        offload: the policy asked for; None or "auto" takes the first that fits.

    Raises:
        OutOfMemoryError: the policy asked for, or every one, takes more than is free; says what would fit.
    """
    asked = (offload,) if offload not in (None, "auto") else POLICIES
    chosen = next((policy for policy in asked if need.total(precision, policy) <= free), None)
    if chosen is None and device.type == "cuda":
        raise OutOfMemoryError(_too_small(need, free, device, precision, asked))
    if device.type != "cuda" and chosen in (None, "model_offload", "sequential"):
        chosen = offload or "auto"  # in one memory nothing is gained by moving
    return MemoryPlan(need, precision, free, str(device), chosen or "auto")


def fitting(need: ModelNeed, free: int) -> str | None:
    """The arguments of `from_pretrained` under which a model fits, from the best to the smallest; None if none do."""
    for precision, arguments in _ORDER:
        for policy in POLICIES:
            if need.total(precision, policy) <= free:
                return f"{arguments}, offload='{policy}' ({_size(need.total(precision, policy))})"
    return None


def _too_small(
    need: ModelNeed, free: int, device: torch.device, precision: Precision, asked: tuple[str | None, ...]
) -> str:
    least = min(need.total(precision, str(policy)) for policy in asked)
    policy = f"offload='{asked[0]}'" if len(asked) == 1 else "any offload"
    told = f"{device} is too small: {_size(free)} are free, and {policy} takes at least {_size(least)} in {precision}"
    found = fitting(need, free)
    parts = ", ".join(f"{n.role} {_size(n.bytes[precision] or 0)}" for n in need.needs)
    if found is None:
        return f"{told} ({parts}); nothing fits: take a smaller model, fewer generators=[…], or device='cpu'"
    return f"{told} ({parts}); this would fit: {found}"


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{1024 * size / GIB:.1f} MiB"
