"""The contract of a generator: a condition in, media out; and the text encoder that defines its conditions.

Shapes: B batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from anygen.features import Condition, ConditionSpec
from anygen.stepwise import StepCallback, Steps, in_thread


class Generator(ABC):
    """A frozen diffusion generator. It is loaded once and stays; each sample's noise comes from its own seed."""

    modality: ClassVar[str]
    condition_spec: ConditionSpec
    overlaps: ClassVar[bool] = False
    """Whether `generate_stepwise` works in the thread of whoever asks for its next step, on that one's CUDA stream, so
    that generators may take turns (`anygen.together`)."""

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Loads the parts needed to generate; the text encoder waits until `encode_text` is called."""

    @abstractmethod
    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a directory that `from_pretrained` and diffusers read."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Moves every loaded part."""

    def quicken(self, *, graphs: bool, compile: bool | str = False) -> Self:
        """Goes the fast way from now on, where the generator has one (`anygen.generators.quick`); here it has none.

        Args:
            graphs: CUDA graphs, for each shape of a call.
            compile: True or "blocks" compiles what repeats; "whole" each model at once.
        """
        return self

    def place(self, device: torch.device | str, placement: str) -> Self:
        """Lets the models come to `device` one at a time (`anygen.generators.placing`); here all of them move.

        Args:
            device: where to work.
            placement: "model_offload" or "sequential".
        """
        return self.to(device)

    def release(self) -> None:  # noqa: B027
        """After a call: what `place` lets come and go leaves the device."""

    def save_memory(self, savers: Collection[str]) -> None:  # noqa: B027
        """Switches on what takes less memory and longer, where the generator has it.

        Raises:
            ConfigError: one is unknown.
        """

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> Condition:
        """B captions -> B conditions: the generator's own text encoder, the target of caption-only alignment."""

    @abstractmethod
    def generate(
        self,
        condition: Condition,
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: StepCallback | None = None,
        **options: Any,
    ) -> list[Any]:
        """B conditions and B seeds -> B media values. A sample does not depend on the batch it is in."""

    def generate_stepwise(self, condition: Condition, *, seeds: Sequence[int], **options: Any) -> Steps[list[Any]]:
        """As `generate`, step by step: yields (steps done, steps in all) after each, and returns the media.

        A generator whose loop can yield overrides this; here `generate` runs in a thread.
        """
        return in_thread(lambda on_step: self.generate(condition, seeds=seeds, on_step=on_step, **options))

    @abstractmethod
    def denoising_loss(self, condition: Condition, media: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """The conditional latent-diffusion loss (MM-LLMs survey, arXiv 2401.13601, eq. 5), a scalar."""
