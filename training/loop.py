"""What the diffusion, autoencoder and contrastive trainings share: schedule, averaged weights, logging, checkpoints.

The LLM stages use `transformers.Trainer`; these three are not language models and step on data that lives on the
device, so they run plain `accelerate` loops.
"""

import copy
import json
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("anygen.training")


def start(seed: int) -> "Accelerator":
    """Seeds everything and returns the accelerator of a run; convolutions are tuned to their fixed shapes."""
    from accelerate import Accelerator

    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return Accelerator()


def bf16_on_gpu(device: torch.device) -> torch.autocast:
    """Mixed precision where it pays. Entered around the step, not by the accelerator, so that steps compile whole."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@dataclass
class Progress:
    """How far a run is, by steps or, when `minutes` is set and runs out first, by the clock.

    A budget in minutes lets one recipe end its learning-rate schedule on any device; the steps that it reached are
    logged, and a recipe that is to be reproduced states them and no minutes.
    """

    steps: int
    minutes: float | None = None
    step: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def fraction(self) -> float:
        """0 at the start, 1 at the end."""
        clock = (time.monotonic() - self.started) / 60 / self.minutes if self.minutes else 0.0
        return max(self.step / self.steps, clock)

    @property
    def done(self) -> bool:
        """Whether the run has had its steps or its minutes."""
        return self.fraction >= 1

    def learning_rate(self, peak: float, warmup: int = 200) -> float:
        """Linear warm-up, then a cosine to 1 % of the peak."""
        ramp = min(1.0, (self.step + 1) / warmup)
        return peak * ramp * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.fraction))))


class AveragedWeights:
    """Exponential moving average of a module's parameters, with the usual ramp of the decay."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module: Any = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the average towards `module`; early on it follows faster."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)
        for own, other in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(other)


class RunLog:
    """One JSON line a report, in the run's folder and in the log."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path, self.name, self.started = directory / f"{name}.jsonl", name, time.monotonic()

    def write(self, **values: Any) -> None:
        """Appends the values, with the seconds since the run began."""
        row = {"seconds": round(time.monotonic() - self.started, 1)} | {
            key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in values.items()
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        logger.info("%s %s", self.name, json.dumps(row))


def save_grid(pictures: torch.Tensor, path: Path, columns: int = 16) -> None:
    """Writes float[B, 3, S, S] in [0, 1] as one PNG contact sheet."""
    from PIL import Image

    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), "white")
    for number, picture in enumerate((pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()):
        sheet.paste(Image.fromarray(picture), ((number % columns) * (width + 2), (number // columns) * (height + 2)))
    sheet.save(path)
