"""What the diffusion, autoencoder and contrastive trainings share: schedule, averaged weights, logging, checkpoints.

The LLM stages use `transformers.Trainer`; these three are not language models and step on data that lives on the
device, so they run plain `accelerate` loops.
"""

import copy
import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from anygen.loading import memory

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("anygen.training")


def world_size() -> int:
    """The processes of a run under `accelerate launch`; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the first process of a run, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def wait() -> None:
    """Until all processes of a run are here."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave() -> None:
    """Ends the group of a run's processes together: one that is torn down while another still talks may abort."""
    if world_size() > 1 and torch.distributed.is_initialized():
        wait()
        torch.distributed.destroy_process_group()


Train = TypeVar("Train", bound=Callable[..., Any])


def lowering(*names: str) -> Callable[[Train], Train]:
    """Decorates a kind's `train(recipe, out)`: where memory does not suffice it says what of the recipe to lower.

    Args:
        names: the keys of the recipe that decide how much memory a step takes.
    """

    def decorate(train: Train) -> Train:
        @functools.wraps(train)
        def run(recipe: Any, out: Path) -> Any:
            lower = ", ".join(f"{name} ({getattr(recipe, name)})" for name in names)
            with memory(
                f"lower {lower}; an LLM that does not fit itself is spread over several GPUs by accelerate launch "
                "--config_file training/accelerate/fsdp2.yaml"
            ):
                return train(recipe, out)

        cast(Any, run).lowers = names
        return cast(Train, run)

    return decorate


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

    def learning_rate(self, peak: float, warmup: int = 200, *, decay: bool = True) -> float:
        """Linear warm-up, then a cosine to 1 % of the peak, or the peak itself where another run goes on from here."""
        ramp = min(1.0, (self.step + 1) / warmup)
        if not decay:
            return peak * ramp
        return peak * ramp * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.fraction))))


@dataclass
class Pace:
    """How many things a second were done since the last report."""

    done: int = 0
    since: float = field(default_factory=time.monotonic)

    def report(self, done: int) -> float:
        """Given the count so far; call it after a `.item()`, or work that a GPU has still to do counts as done."""
        now = time.monotonic()
        pace = (done - self.done) / max(now - self.since, 1e-9)
        self.done, self.since = done, now
        return pace


@dataclass
class Alarm:
    """Rings every so many minutes; None never rings."""

    minutes: float | None
    last: float = field(default_factory=time.monotonic)

    def rings(self) -> bool:
        """Whether the minutes have passed since it last rang, or since it was made."""
        if self.minutes is None or time.monotonic() - self.last < 60 * self.minutes:
            return False
        self.last = time.monotonic()
        return True


def compiled(module: nn.Module, mode: str | None) -> Callable[..., Any]:
    """A module's forward pass, compiled in one of `torch.compile`'s modes; None leaves it as it is.

    In a mode with CUDA graphs ("reduce-overhead") a call overwrites what the call before it returned and the gradients
    of its backward pass: copy what is kept, and drop the gradients before the next call.
    """
    if mode is None:
        return module
    run = torch.compile(module, mode=mode)

    def step(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return run(*args)

    return step


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
        """Appends the values, with the seconds since the run began; of several processes the first one's."""
        if not is_main():
            return
        row = {"seconds": round(time.monotonic() - self.started, 1)} | {
            key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in values.items()
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        logger.info("%s %s", self.name, json.dumps(row))

    def text(self) -> str:
        """All that was written."""
        return self.path.read_text(encoding="utf-8") if self.path.exists() else ""

    def restore(self, text: str) -> None:
        """Replaces all that was written, for a run that goes on from an earlier state."""
        if is_main():
            self.path.write_text(text, encoding="utf-8")


def save_grid(pictures: torch.Tensor, path: Path, columns: int = 16) -> None:
    """Writes float[B, 3, S, S] in [0, 1] as one PNG contact sheet."""
    from PIL import Image

    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), "white")
    for number, picture in enumerate((pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()):
        sheet.paste(Image.fromarray(picture), ((number % columns) * (width + 2), (number // columns) * (height + 2)))
    sheet.save(path)
