"""One request the plain way, as NExT-GPT's released code answers it.

The LLM grows its cache and returns the hidden states of every step, signal tokens one by one; each diffusion pipeline
is read from disk when it is wanted, runs uncompiled with its published scheduler, and goes.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from full_size_model import SIGNALS, Size
from torch import Tensor

from anygen.generators.audioldm2 import text_mask
from anygen.model import AnyGenModel


@torch.no_grad()
def states(model: AnyGenModel, ids: list[int], text: int) -> dict[str, Tensor]:
    """The LLM alone: modality -> states float[1, S, D] after so many tokens of text."""
    base: Any = model.llm.base
    embeds = model.llm.embedding(torch.tensor([ids], device=model.device))
    count = text + sum(SIGNALS.values())
    made = base.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=model.device),
        max_new_tokens=count + 1,
        min_new_tokens=count + 1,
        do_sample=False,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    last = torch.cat([step[-1][:, -1:] for step in made.hidden_states[1:]], dim=1)[:, text:]
    return dict(zip(SIGNALS, last.split([*SIGNALS.values()], dim=1), strict=True))


@torch.no_grad()
def request(
    model: AnyGenModel, folder: Path, size: Size, ids: list[int], *, text: int, steps: int, dtype: torch.dtype
) -> dict[str, float]:
    """All of it; seconds by stage."""
    from anygen.planning import Clock

    clock = Clock()
    spoken = states(model, ids, text)
    conditions = {m: model.project(m, runs).to(dtype=dtype).tensors for m, runs in spoken.items()}
    synchronise(model.device)
    clock.lap("LLM")
    for modality, tensors in conditions.items():
        pipeline = load(folder / "generators" / modality, modality, model.device, dtype)
        synchronise(model.device)
        clock.lap("reading from disk")
        call(pipeline, modality, tensors, folder / "generators" / modality, size, steps)
        synchronise(model.device)
        clock.lap(modality)
        del pipeline
    return clock.laps


def load(folder: Path, modality: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A pipeline of diffusers, read from its folder."""
    import diffusers
    from transformers import SpeechT5HifiGan

    unets: dict[str, Any] = {
        "image": diffusers.UNet2DConditionModel,
        "video": diffusers.UNet3DConditionModel,
        "audio": diffusers.AudioLDM2UNet2DConditionModel,
    }
    schedulers: dict[str, Any] = {
        "image": diffusers.EulerDiscreteScheduler,
        "video": diffusers.DPMSolverMultistepScheduler,
        "audio": diffusers.DDIMScheduler,
    }
    parts: dict[str, Any] = {
        "unet": unets[modality].from_pretrained(folder / "unet", torch_dtype=dtype),
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype),
        "scheduler": schedulers[modality].from_pretrained(folder / "scheduler"),
        "text_encoder": None,
        "tokenizer": None,
    }
    made: Any
    if modality == "image":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        made = diffusers.StableDiffusionPipeline(**parts)
    elif modality == "video":
        made = diffusers.TextToVideoSDPipeline(**parts)
    else:
        parts |= dict.fromkeys(("feature_extractor", "text_encoder_2", "tokenizer_2", "projection_model"))
        vocoder: Any = SpeechT5HifiGan.from_pretrained(folder / "vocoder", dtype=dtype)
        made = diffusers.AudioLDM2Pipeline(**parts, language_model=None, vocoder=vocoder)
    made = made.to(device)
    if modality == "audio":  # these are asked for their type alone
        made.text_encoder_2 = made.language_model = SimpleNamespace(
            dtype=dtype, config=SimpleNamespace(model_type="t5")
        )
    made.set_progress_bar_config(disable=True)
    return made


def call(pipeline: Any, modality: str, tensors: dict[str, Tensor], folder: Path, size: Size, steps: int) -> Any:
    """One medium."""
    from safetensors.torch import load_file

    empty = {
        f"negative_{name}": rows[None].to(tensors[name])
        for name, rows in load_file(folder / "unconditional.safetensors").items()
    }
    options: dict[str, Any] = {**tensors, **empty, "num_inference_steps": steps}
    options["generator"] = torch.Generator(pipeline.device).manual_seed(0)
    if modality == "video":
        factor = 2 ** (len(size.vae) - 1)
        height, width = (side * factor for side in size.video["sample_size"])
        options |= {"num_frames": size.frames, "height": height, "width": width}
    if modality == "audio":
        options |= {
            "audio_length_in_s": size.seconds,
            "attention_mask": text_mask(tensors["prompt_embeds"]),
            "negative_attention_mask": text_mask(empty["negative_prompt_embeds"]),
        }
    return pipeline(**options)


def synchronise(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
