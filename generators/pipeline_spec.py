"""What has to be said about a pipeline of diffusers to make a generator of it, and how its folder is read.

Source: diffusers 0.42, `DiffusionPipeline` and its subclasses' `encode_prompt` and `__call__`.
Shapes: B batch, L condition tokens, C condition width.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anygen.errors import AnyGenError, CheckpointError, ConfigError
from anygen.generators.diffusers_loss import Predict
from anygen.generators.latent import SamplingDefaults
from anygen.progress import quiet_libraries

OUTPUTS = {"image": "images", "video": "frames", "audio": "audios"}
"""Modality -> where a pipeline's output has its media, as nearly every pipeline names it."""
INDEX = "model_index.json"
Encode = Callable[[Any, list[str]], Sequence[Tensor]]
"""(pipeline, B captions) -> what `ConditionTensor.output` counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineDefaults(SamplingDefaults):
    """What `generate` uses where its caller says nothing; stored as `sampling.json`. None is the pipeline's own."""

    height: int | None = None
    """Of pictures and frames, in pixels."""
    width: int | None = None
    """Of pictures and frames, in pixels."""
    frames: int | None = None
    """Length of a clip."""
    fps: float = 8.0
    """Frames a second of a clip."""
    seconds: float | None = None
    """Length of a sound."""
    sampling_rate: int | None = None
    """Samples a second of a sound; None reads the vocoder's or the VAE's."""
    solver: str | None = None
    """"dpm++": DPM-Solver++ (arXiv:2211.01095) on the published noise schedule, which needs half the steps, in place
    of the scheduler that the folder names. For models that predict noise or velocity; flows have their own."""
    max_sequence_length: int | None = None
    """Tokens that a caption is cut or padded to, for pipelines whose encoder takes this argument."""

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.fps > 0 or (self.frames is not None and self.frames < 1):
            raise ConfigError(
                f"there must be at least 1 step and 1 frame, and a positive fps, not steps={self.steps}, "
                f"frames={self.frames}, fps={self.fps:g}"
            )
        if self.guidance_interval != (0.0, 1.0):
            raise ConfigError("guidance_interval: a pipeline of diffusers guides in all its steps")
        if self.solver not in (None, "dpm++"):
            raise ConfigError(f"solver is 'dpm++' or left out, got '{self.solver}'")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditionTensor:
    """One tensor of a condition: which argument of the pipeline it becomes, and which output of its encoder it is."""

    name: str
    """Its name in the condition, and the pipeline's argument: float[B, L, C] or, pooled, float[B, C]."""
    output: int = 0
    """Its place in what the encoder returns."""
    negative: str | None = None
    """The argument for the unconditional half of guidance; None where the pipeline has none, or is to make its own."""
    negative_output: int | None = None
    """Its place in what the encoder returns with guidance; None takes `output` for the empty caption."""
    mask: str | None = None
    """The argument int64[B, L] that says which rows are text, for pipelines that want one."""
    mask_output: int | None = None
    """Its place; where there is one, rows of padding are made zero."""
    negative_mask: str | None = None
    """The same for `negative`."""
    negative_mask_output: int | None = None
    """The same for `negative_output`."""
    shape: tuple[int, ...] | None = None
    """Without the batch axis; None reads it from the empty caption's, so that one declaration serves every width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSpec:
    """What makes a generator of a pipeline."""

    pipeline: str
    """Its class in diffusers."""
    modality: str
    """"image", "video" or "audio"."""
    condition: tuple[ConditionTensor, ...]
    """What the pipeline is conditioned on."""
    defaults: PipelineDefaults = PipelineDefaults()
    """Steps, guidance, size and length where neither a call nor the folder states them."""
    media: str | None = None
    """The attribute of the pipeline's output that holds the media; None is that of `OUTPUTS`."""
    text_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    """Parts that only the encoder needs: loaded when `encode_text` is first called."""
    dtype_of: str | None = None
    """A text part whose `dtype` the pipeline reads even when it is given embeddings."""
    without: tuple[str, ...] = ()
    """Parts never loaded, such as a safety checker."""
    encoder: str | Encode = "encode_prompt"
    """The pipeline's method, or a function, that encodes captions."""
    encode_options: Mapping[str, Any] = field(default_factory=dict)
    """More arguments for the method."""
    guidance: str = "guidance_scale"
    """The argument that takes the weight of classifier-free guidance."""
    length: str | None = None
    """The argument that takes a clip's frames or a sound's seconds."""
    frame_step: int = 1
    """A clip has a multiple of this many frames and one more."""
    frame_rate: str | None = None
    """The argument that is told the frames a second, where there is one."""
    call_options: Mapping[str, Any] = field(default_factory=dict)
    """More arguments for every call, unless the caller states them."""
    predict: Predict | None = None
    """What the denoiser predicts, for `denoising_loss`; None where there is no such loss."""

    def __post_init__(self) -> None:
        if self.modality not in OUTPUTS:
            raise ConfigError(f"{self.pipeline}: modality is one of {', '.join(OUTPUTS)}, not '{self.modality}'")
        if not self.condition:
            raise ConfigError(f"{self.pipeline}: a condition has at least one tensor")
        for tensor in self.condition:
            places = {"mask_output": tensor.mask_output}
            if tensor.negative_output is not None:
                places["negative_mask_output"] = tensor.negative_mask_output
            if tensor.mask is not None and (missing := [name for name, place in places.items() if place is None]):
                raise ConfigError(f"{self.pipeline}: '{tensor.name}' has a mask, so state its {missing[0]}")

    def pipeline_class(self) -> type[Any]:
        """The class in diffusers.

        Raises:
            ConfigError: this version of diffusers has none of that name.
        """
        import diffusers

        if (found := getattr(diffusers, self.pipeline, None)) is None:
            known = [name for name in dir(diffusers) if name.endswith("Pipeline")]
            near = get_close_matches(self.pipeline, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"diffusers {diffusers.__version__} has no pipeline '{self.pipeline}'{hint}")
        return found


def set_solver(pipeline: Any, defaults: PipelineDefaults) -> None:
    """Gives the pipeline the scheduler that its defaults ask for.

    Raises:
        ConfigError: the pipeline's own schedule is a flow's, or a distilled one's, which has no noise variances.
    """
    if defaults.solver is None:
        return
    from diffusers import DPMSolverMultistepScheduler

    own = pipeline.scheduler
    if "beta_schedule" not in own.config:
        raise ConfigError(f"solver='dpm++' needs a schedule of noise variances; {type(own).__name__} has none")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(own.config)


def check_index(directory: Path, spec: PipelineSpec) -> None:
    """Raises CheckpointError unless the folder is of the pipeline declared."""
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a {spec.pipeline} folder: it has no {INDEX}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{directory / INDEX} is not JSON: {error}") from None
    if (found := index.get("_class_name")) != spec.pipeline:
        raise CheckpointError(f"{directory} is a folder of {found}, not of {spec.pipeline}")


def load_pipeline(spec: PipelineSpec, directory: Path, dtype: torch.dtype, parts: Mapping[str, Any]) -> Any:
    """The pipeline of a folder, `parts` (which may be None) taken in place of the folder's."""
    with quiet_libraries(diffusers=True):
        try:
            return spec.pipeline_class().from_pretrained(directory, torch_dtype=dtype, use_safetensors=True, **parts)
        except AnyGenError:
            raise
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory}: {error}") from error
