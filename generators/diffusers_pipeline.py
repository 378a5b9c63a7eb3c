"""Any text-conditioned pipeline of diffusers as a generator: a declaration says what its conditions are.

    class PixArtGenerator(DiffusersGenerator):
        spec = PipelineSpec(
            pipeline="PixArtSigmaPipeline",
            modality="image",
            condition=(
                ConditionTensor(
                    name="prompt_embeds",
                    mask="prompt_attention_mask",
                    mask_output=1,
                    negative="negative_prompt_embeds",
                    negative_mask="negative_prompt_attention_mask",
                ),
            ),
        )

The pipeline itself samples and decodes, so that what it makes equals a plain call of it with its own prompts
(tests/generators/test_diffusers_pipeline.py holds every declaration of `diffusers_specs` to that).
Differs: each sample's noise comes from its own seed; the negative condition of an empty caption is stored beside the
weights, and text encoders wait until `encode_text` is called, so that generating needs neither.

**The mask travels in the condition**, as in `audioldm2`: projectors predict embeddings, not masks, so rows of padding
are zero in what `encode_text` returns, and `text_mask` reads the mask back from the rows' sizes.

Source: diffusers 0.42, `DiffusionPipeline` and its subclasses' `encode_prompt` and `__call__`.
Shapes: B batch, L condition tokens, C condition width, F frames, H W sides in pixels, N samples.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from anygen.component import SHARD
from anygen.errors import AnyGenError, CheckpointError, ConfigError
from anygen.features import Condition, ConditionSpec
from anygen.generators.audioldm2 import text_mask
from anygen.generators.base import Generator
from anygen.generators.diffusers_loss import pipeline_loss
from anygen.generators.pipeline_spec import (
    INDEX,
    OUTPUTS,
    ConditionTensor,
    PipelineDefaults,
    PipelineSpec,
    check_index,
    load_pipeline,
    set_solver,
)
from anygen.generators.placing import Placed, Placement, save_memory
from anygen.generators.quick import Quick, check_compile
from anygen.progress import quiet_libraries
from anygen.stepwise import StepCallback

__all__ = ["ConditionTensor", "DiffusersGenerator", "PipelineDefaults", "PipelineSpec"]

UNCONDITIONAL, SAMPLING = "unconditional.safetensors", "sampling.json"


class DiffusersGenerator(Generator):
    """A pipeline of diffusers behind the contract of a generator. A subclass states `spec`, and is registered."""

    spec: ClassVar[PipelineSpec]
    quick: Quick | None = None
    """The fast way, if `quicken` was called."""
    placed: Placed | None = None
    """Where the models come and go, if `place` was called."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "spec" in vars(cls):
            cls.modality = cls.spec.modality

    def __init__(
        self,
        pipeline: Any,
        *,
        unconditional: Mapping[str, Tensor] | None = None,
        load_text: Callable[[], Any] | None = None,
        defaults: PipelineDefaults | None = None,
    ) -> None:
        """Takes a loaded pipeline, and sets its models to evaluation mode.

        Args:
            pipeline: of the class that `spec` names.
            unconditional: name -> float[L, C] or float[C], the negative condition; None has the encoder make it.
            load_text: loads the same pipeline with its text parts; None if `pipeline` has them.
            defaults: where neither these nor a call state a value, the pipeline's own holds.

        Raises:
            CheckpointError: the encoder's or the stored tensors have other names or shapes than `spec` declares.
        """
        self.defaults = defaults or self.spec.defaults
        self.pipeline = _evaluating(pipeline)
        self._load_text, self._text = load_text, pipeline if load_text is None else None
        self._call = dict(signature(type(pipeline).__call__).parameters)
        self.unconditional = dict(self._negative() if unconditional is None else unconditional)
        if load_text is not None:
            self._text = None  # loaded for the empty caption alone; T5 may be larger than all else
        shapes = {name: tuple(rows.shape) for name, rows in self.unconditional.items()}
        wanted = {tensor.name: tensor.shape or shapes.get(tensor.name) for tensor in self.spec.condition}
        if shapes != wanted:
            raise CheckpointError(f"{self.spec.pipeline} is declared with conditions of {wanted}, here are {shapes}")
        self.condition_spec = ConditionSpec(shapes=shapes)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **changes: Any,
    ) -> Self:
        """Reads a diffusers folder of safetensors; `unconditional.safetensors` and `sampling.json` are ours, optional.

        Args:
            directory: holds a `model_index.json` of the pipeline that `spec` names.
            device: where to.
            dtype: of the weights.
            **changes: fields of `PipelineDefaults`.

        Raises:
            CheckpointError: it is a folder of something else, or a part is missing or damaged.
            ConfigError: there is no such default.
        """
        from safetensors.torch import load_file

        directory, spec = Path(directory), cls.spec
        check_index(directory, spec)
        told = spec.defaults
        if (directory / SAMPLING).exists():
            told = PipelineDefaults.load(directory / SAMPLING)
        defaults = PipelineDefaults.from_dict(told.to_dict() | changes)
        absent = dict.fromkeys((*spec.text_parts, *spec.without))
        pipeline = load_pipeline(spec, directory, dtype, absent)
        set_solver(pipeline, defaults)
        if spec.dtype_of is not None:
            setattr(pipeline, spec.dtype_of, _Stated(dtype))

        def load_text() -> Any:
            loaded = {name: part for name, part in pipeline.components.items() if name not in spec.text_parts}
            return load_pipeline(spec, directory, dtype, loaded | dict.fromkeys(spec.without)).to(pipeline.device)

        unconditional: dict[str, Tensor] | None = None
        stored = directory / UNCONDITIONAL
        if stored.exists() and defaults.max_sequence_length == told.max_sequence_length:
            unconditional = {name: rows.to(dtype) for name, rows in load_file(stored).items()}
        return cls(pipeline, unconditional=unconditional, load_text=load_text, defaults=defaults).to(device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a folder that `from_pretrained` and the pipeline's own read, text parts included."""
        from safetensors.torch import save_file

        directory = Path(directory)
        with quiet_libraries(diffusers=True):
            self.text_pipeline.save_pretrained(directory, max_shard_size=SHARD)
        for path in (directory / INDEX, *directory.glob("*/config.json")):
            known = json.loads(path.read_text(encoding="utf-8"))
            if known.pop("_name_or_path", None) is not None:  # the folder it was loaded from is nobody's business
                path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        empty = {name: rows.contiguous().cpu() for name, rows in self.unconditional.items()}
        save_file(empty, directory / UNCONDITIONAL)
        self.defaults.save(directory / SAMPLING)

    @property
    def text_pipeline(self) -> Any:
        """The pipeline with its text parts, loaded on first use; all else it shares with `pipeline`."""
        if self._text is None and self._load_text is not None:
            self._text = _evaluating(self._load_text())
        return self._text

    @property
    def device(self) -> torch.device:
        """Where the denoiser works."""
        return denoiser(self.pipeline).device if self.placed is None else self.placed.device

    @property
    def sampling_rate(self) -> int | None:
        """Samples a second of a sound."""
        if self.defaults.sampling_rate is not None:
            return self.defaults.sampling_rate
        source = getattr(self.pipeline, "vocoder", None) or self.pipeline.vae
        return getattr(source.config, "sampling_rate", None)

    def quicken(self, *, graphs: bool, compile: bool | str = False) -> Self:
        """As `Generator.quicken`."""
        if self.quick is not None:
            self.quick.undo()
        models, on_gpu = {"denoiser": denoiser(self.pipeline)}, self.device.type == "cuda"
        decoder = getattr(getattr(self.pipeline, "vae", None), "decoder", None)
        if decoder is not None and self.modality != "video":  # those of clips keep frames from call to call
            models["VAE"] = decoder
        kind = check_compile(compile)
        self.quick = Quick(models, graphs=graphs and on_gpu, compile=kind, layout=on_gpu and kind is not None)
        return self

    def place(self, device: torch.device | str, placement: str) -> Self:
        """As `Generator.place`; the models are on the CPU."""
        parts = (denoiser(self.pipeline), *self.pipeline.components.values())
        models = {str(id(part)): part for part in parts if isinstance(part, torch.nn.Module)}
        self.placed = Placed(models, torch.device(device), cast(Placement, placement))
        return self

    def release(self) -> None:
        """As `Generator.release`."""
        if self.placed is not None:
            self.placed.release()

    def save_memory(self, savers: Collection[str]) -> None:
        """As `Generator.save_memory`."""
        save_memory(savers, vae=getattr(self.pipeline, "vae", None), denoiser=denoiser(self.pipeline))

    def to(self, device: torch.device | str) -> Self:
        """Moves every loaded part."""
        for pipeline in {id(one): one for one in (self.pipeline, self._text) if one is not None}.values():
            pipeline.to(device)
        self.unconditional = {name: rows.to(device) for name, rows in self.unconditional.items()}
        return self

    @torch.no_grad()  # not inference_mode: its tensors are targets of training
    def encode_text(self, captions: Sequence[str]) -> Condition:
        """B captions -> the tensors of `condition_spec`, each float[B, ...]; rows of padding are zero.

        Raises:
            ConfigError: the encoder returns fewer tensors than `spec` counts.
        """
        outputs = self._encoded(list(captions), guided=False)
        return Condition(
            {
                tensor.name: self._rows(tensor, outputs, tensor.output, tensor.mask_output)
                for tensor in self.spec.condition
            }
        )

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
        """B conditions and B seeds -> B media values.

        Args:
            condition: matches `condition_spec`.
            seeds: one a sample, of all its noise.
            steps: denoising steps.
            guidance_scale: 1 or less switches guidance off.
            on_step: called with (steps done, steps in all).
            **options: `height`, `width`, `frames`, `seconds` where they make sense, and what else the pipeline takes.

        Raises:
            ConfigError: the condition or an option does not fit, or the seeds are not one a sample.
        """
        return self.media(self.sample(condition, seeds, steps, guidance_scale, on_step, **options))

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: StepCallback | None = None,
        **options: Any,
    ) -> np.ndarray:
        """As `generate`, but what the pipeline returns: float32[B, H, W, 3], [B, F, H, W, 3], [B, N] or [B, 2, N]."""
        spec, told = self.spec, self._told(condition)
        if len(seeds) != len(condition):
            raise ConfigError(f"{len(condition)} conditions need {len(condition)} seeds, got {len(seeds)}")
        steps = self.defaults.steps if steps is None else steps
        if steps < 1:
            raise ConfigError(f"steps must be at least 1, got {steps}")
        told |= {
            "num_inference_steps": steps,
            spec.guidance: self.defaults.guidance_scale if guidance_scale is None else guidance_scale,
            # on the CPU, where a seed gives the same noise for every device
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "output_type": "np",
        }
        told |= self._options(options, set(told)) | self._reporting(on_step, steps)
        pipeline = copy(self.pipeline)  # calls leave numbers in the pipeline and in its scheduler
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        try:
            made = pipeline(**told)
        except AnyGenError:
            raise
        except ValueError as error:
            said = str(error).split("\n")[0][:300]  # some print whole tensors
            raise ConfigError(f"{spec.pipeline}: {said}") from error
        return np.asarray(getattr(made, spec.media or OUTPUTS[spec.modality]), dtype=np.float32)

    def media(self, values: np.ndarray) -> list[Any]:
        """What `sample` returns -> B media values."""
        from anygen.media import Audio, Image, Video

        if self.modality == "audio":
            if (rate := self.sampling_rate) is None:
                raise ConfigError(f"{self.spec.pipeline} does not tell its sampling rate; state it in the defaults")
            return [Audio(sound.clip(-1, 1), rate) for sound in values]
        pixels = (values * 255).round().astype(np.uint8)
        if self.modality == "video":
            return [Video(clip, self.defaults.fps) for clip in pixels]
        return [Image.from_any(picture) for picture in pixels]

    def denoising_loss(self, condition: Condition, media: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the denoiser's prediction at random times.

        Args:
            condition: matches `condition_spec`; gradients flow into it, and nowhere else if the parts are frozen.
            media: pixels float[B, 3, H, W] in [-1, 1], or a list of B images.
            generator: for the posterior sample, the noise and the times.

        Raises:
            ConfigError: the pipeline has no such loss here; says which have one.
        """
        if self.spec.predict is None:
            have = sorted({one.spec.pipeline for one in _declared() if one.spec.predict is not None})
            raise ConfigError(f"{self.spec.pipeline} has no denoising loss; pipelines that have one: {', '.join(have)}")
        if not isinstance(media, Tensor):
            arrays = [torch.from_numpy(image.array).permute(2, 0, 1) for image in media]  # uint8[3, H, W]
            media = torch.stack(arrays).float() / 127.5 - 1
        model = denoiser(self.pipeline)
        tensors = self.condition_spec.check(condition).to(model.device, model.dtype).tensors
        return pipeline_loss(self.pipeline, self.spec.predict, tensors, media, generator)

    def _told(self, condition: Condition) -> dict[str, Any]:
        """The pipeline's arguments that are made of a condition."""
        tensors, told = self.condition_spec.check(condition).tensors, {}
        model = denoiser(self.pipeline)
        for tensor in self.spec.condition:
            rows = tensors[tensor.name].to(self.device, model.dtype)
            empty = self.unconditional[tensor.name].to(rows).expand_as(rows)
            named = ((tensor.name, tensor.mask, rows), (tensor.negative, tensor.negative_mask, empty))
            for name, mask, values in named:
                told |= {name: values} if name is not None else {}
                told |= {mask: text_mask(values)} if mask is not None else {}
        if "negative_prompt" in self._call:
            told["negative_prompt"] = None  # some pipelines say "" by default, and refuse that beside embeddings
        return told

    def _options(self, options: Mapping[str, Any], taken: set[str]) -> dict[str, Any]:
        """The pipeline's arguments that a caller may choose."""
        spec, defaults = self.spec, self.defaults
        asked = {name: value for name, value in options.items() if value is not None}
        frames, seconds = asked.pop("frames", None), asked.pop("seconds", None)
        own = {name: getattr(defaults, name) for name in ("height", "width")}
        chosen = {**spec.call_options, **{name: value for name, value in own.items() if value is not None}, **asked}
        if spec.frame_rate is not None:
            chosen.setdefault(spec.frame_rate, defaults.fps)
        if (length := self._length(frames, seconds)) is not None:
            chosen[str(spec.length)] = length
        free = sorted(set(self._call) - taken - _RESERVED - {"self", "kwargs"})
        if unknown := sorted(set(chosen) - set(free)):
            raise ConfigError(f"{spec.pipeline} has no option '{unknown[0]}'; it has: {', '.join(free)}")
        return chosen

    def _length(self, frames: int | None, seconds: float | None) -> float | None:
        """Frames of a clip, or seconds of a sound, for the pipeline's own argument; None is its default."""
        spec, defaults = self.spec, self.defaults
        if spec.length is None or (frames is not None and spec.modality != "video"):
            if frames is not None or seconds is not None:
                told = "frames" if frames is not None else "seconds"
                raise ConfigError(f"{spec.pipeline} makes {spec.modality}, whose length in {told} cannot be chosen")
            return None
        if frames is not None and seconds is not None:
            raise ConfigError("the length of a clip is told in frames or in seconds, not in both")
        if seconds is not None and not 0 < seconds < math.inf:
            raise ConfigError(f"seconds must be over 0, got {seconds:g}")
        if spec.modality == "audio":
            return defaults.seconds if seconds is None else seconds
        step = spec.frame_step
        if seconds is not None:
            frames = max(0, round((seconds * defaults.fps - 1) / step)) * step + 1
        count = defaults.frames if frames is None else frames
        if count is not None and (count < 1 or (count - 1) % step):
            raise ConfigError(f"{spec.pipeline} makes clips of a multiple of {step} frames and one more, not {count}")
        return count

    def _reporting(self, on_step: StepCallback | None, steps: int) -> dict[str, Any]:
        """The pipeline's arguments by which it reports its steps."""
        if on_step is None:
            return {}
        if "callback_on_step_end" in self._call:

            def on_end(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                on_step(step + 1, len(pipeline.scheduler.timesteps))  # some schedulers take more than was asked for
                return tensors

            return {"callback_on_step_end": on_end}
        if "callback" not in self._call:
            return {}
        done = 0

        def on_callback(step: int, time: Any, latents: Tensor) -> None:
            nonlocal done
            done = min(done + 1, steps)
            on_step(done, steps)

        return {"callback": on_callback, "callback_steps": 1}

    def _encoded(self, captions: list[str], *, guided: bool) -> Sequence[Tensor]:
        """What the pipeline's encoder returns for B captions."""
        spec, pipeline = self.spec, self.text_pipeline
        if not isinstance(spec.encoder, str):
            return spec.encoder(pipeline, captions)
        method = getattr(pipeline, spec.encoder)
        known = {"prompt": captions, "device": pipeline.device, "do_classifier_free_guidance": guided}
        arguments = dict(spec.encode_options)
        for name, parameter in signature(method).parameters.items():
            if name in known:
                arguments[name] = known[name]
            elif name == "max_sequence_length" and self.defaults.max_sequence_length is not None:
                arguments[name] = self.defaults.max_sequence_length
            elif parameter.default is Parameter.empty and parameter.kind is Parameter.POSITIONAL_OR_KEYWORD:
                # `num_images_per_prompt` and its like, or more prompts, which follow the first
                arguments.setdefault(name, 1 if name.startswith("num_") else None)
        outputs = method(**arguments)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    def _rows(self, tensor: ConditionTensor, outputs: Sequence[Tensor], place: int, mask_place: int | None) -> Tensor:
        """One tensor of the condition, float[B, ...], its padding zero."""
        if max(place, mask_place or 0) >= len(outputs):
            raise ConfigError(
                f"'{tensor.name}' is declared as output {max(place, mask_place or 0)} of {self.spec.pipeline}'s "
                f"encoder, which returns {len(outputs)}, counted from 0"
            )
        rows = outputs[place]
        if mask_place is None:
            return rows
        rows = rows * outputs[mask_place].to(rows)[..., None]
        if tensor.shape is None:
            return rows
        # encoders that pad to the longest caption of a batch
        return F.pad(rows, (0, 0, 0, tensor.shape[0] - rows.shape[1]))

    @torch.no_grad()
    def _negative(self) -> dict[str, Tensor]:
        """The condition of the unconditional half: the pipeline's own where no negative prompt is given."""
        spec, empty = self.spec, {}
        outputs = {False: self._encoded([""], guided=False)}
        if any(tensor.negative_output is not None for tensor in spec.condition):
            outputs[True] = self._encoded([""], guided=True)
        for tensor in spec.condition:
            guided = tensor.negative_output is not None
            place = tensor.output if tensor.negative_output is None else tensor.negative_output
            mask_place = tensor.negative_mask_output if guided else tensor.mask_output
            empty[tensor.name] = self._rows(tensor, outputs[guided], place, mask_place)[0].clone()
        return empty


class _Stated:
    """Stands where a text part would, for pipelines that ask it for its type alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


_RESERVED = frozenset({"prompt", "return_dict", "latents", "callback", "callback_steps", "callback_on_step_end"})
"""Arguments of pipelines that are ours to give, or nobody's."""


def denoiser(pipeline: Any) -> Any:
    """The UNet or transformer of a pipeline."""
    parts = (getattr(pipeline, name, None) for name in ("unet", "transformer", "transformer_2"))
    return next(part for part in parts if part is not None)


def _evaluating(pipeline: Any) -> Any:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


def _declared(root: type[DiffusersGenerator] = DiffusersGenerator) -> list[type[DiffusersGenerator]]:
    """Every subclass that states a declaration."""
    found = [one for child in root.__subclasses__() for one in (child, *_declared(child))]
    return [one for one in found if hasattr(one, "spec")]
