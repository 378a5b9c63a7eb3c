"""What the recipes for a plugin's modality share: rows of data, questions to a model, and its saving.

Shapes: M media, T feature tokens, C feature width.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anygen import hub
from anygen.decoding import Answer, DecodingConfig, collect, decode
from anygen.encoders.base import Encoder
from anygen.errors import CheckpointError, ConfigError
from anygen.generators.base import Generator
from anygen.loading import choose_device, choose_dtype
from anygen.media import media_type
from anygen.messages import Message
from anygen.model import AnyGenModel
from anygen.prompts import Example, pad
from anygen.saving import save_model
from anygen.training.loop import is_main, wait

CHECKPOINTS = "checkpoints"
"""Folder of a run."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Encoded media with their captions."""

    features: Tensor
    """float32[M, T, C], on the CPU."""
    captions: list[str]
    """M."""

    def save(self, path: Path) -> Path:
        """Writes one safetensors file, half precision, the captions as JSON in its header; `read_pairs` reads it."""
        from safetensors.torch import save_file

        told = {"captions": json.dumps(self.captions)}
        save_file({"features": self.features.half().contiguous()}, path, metadata=told)
        return path


def read_pairs(path: Path, encoder: Encoder, batch_size: int = 32) -> Pairs:
    """Media and captions, encoded once.

    Args:
        path: lines of JSON, `{MODALITY: file, "caption": words}` with files beside it; or what `Pairs.save` wrote.
        encoder: of that modality.
        batch_size: media that are encoded together.

    Raises:
        ConfigError: there is no such file, or lines in it do not fit; names them.
        MediaError: a medium cannot be read.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path} with media and captions")
    if path.suffix == ".safetensors":
        return _load_pairs(path, encoder)
    files, captions = read_rows(path, encoder.modality)
    media = [media_type(encoder.modality).from_path(file) for file in files]
    made: list[Tensor] = []
    with torch.no_grad():
        for first in range(0, len(media), batch_size):
            tensors = encoder.preprocess(media[first : first + batch_size])
            features = encoder(**{name: value.to(encoder.device) for name, value in tensors.items()})
            if not bool(features.mask.all()):
                raise ConfigError(f"media of {encoder.modality} have different numbers of tokens; models need one")
            made.append(features.values.float().cpu())
    return Pairs(torch.cat(made), captions)


def read_rows(path: Path, modality: str) -> tuple[list[Path], list[str]]:
    """The files and captions of a JSONL file.

    Raises:
        ConfigError: lines do not fit, or there is none; names them.
    """
    files, captions, faults = [], [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            files.append(path.parent / row[modality])
            captions.append(" ".join(row["caption"].split()))
        except (ValueError, KeyError, TypeError, AttributeError):
            faults.append(str(number))
    if faults or not files:
        where = f"lines {', '.join(faults[:8])} do not fit" if faults else "it is empty"
        raise ConfigError(f'{path}: {where}; wanted on each line: {{"{modality}": "FILE", "caption": "WORDS"}}')
    return files, captions


def _load_pairs(path: Path, encoder: Encoder) -> Pairs:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            features = file.get_tensor("features").float()
            captions = json.loads((file.metadata() or {})["captions"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold features that Pairs.save wrote ({error})") from None
    if features.shape[-1] != encoder.feature_dim:
        raise ConfigError(f"{path} has features {tuple(features.shape)}, the encoder's width is {encoder.feature_dim}")
    return Pairs(features, captions)


def read_captions(path: Path) -> list[str]:
    """The different captions of a text file, one a line, in their order.

    Raises:
        ConfigError: there is no such file, it is not UTF-8, or it has fewer than two captions.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path} with captions") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from None
    captions = list(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip()))
    if len(captions) < 2:
        raise ConfigError(f"{path} has {len(captions)} captions, one a line; at least 2 are needed")
    return captions


def load(name: str) -> AnyGenModel:
    """The model to be given a modality, on the first device that is there, frozen, with its encoders."""
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # of several processes each has its own
    device = choose_device(None)
    model = AnyGenModel.from_pretrained(hub.resolve(name), dtype=choose_dtype(None, device), device=device)
    return model.requires_grad_(False)


def collate(
    model: AnyGenModel, examples: Sequence[Example], *, media: Mapping[str, Tensor], conditions: Mapping[str, Any]
) -> dict[str, Any]:
    """Examples -> the arguments of `AnyGenModel.forward`; modalities without media or conditions are left out."""
    ids, mask = pad([example.ids for example in examples], 0)
    labels, _ = pad([example.labels for example in examples], -100)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if media:
        batch["media"] = dict(media)
    if conditions:
        batch["conditions"] = dict(conditions)
    return batch


@torch.no_grad()
def answers(
    model: AnyGenModel,
    conversations: Sequence[Sequence[Message]],
    media: Mapping[str, Tensor] | None = None,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 24,
) -> list[Answer]:
    """What the model says, greedily, to conversations with at most one medium each.

    Args:
        model: in evaluation mode.
        conversations: each ends with the user's message.
        media: modality -> float[M, T, C]; conversation number k has feature k, of one modality.
        batch_size: conversations that go through together.
        max_new_tokens: the longest answer.
    """
    said: list[Answer] = []
    for first in range(0, len(conversations), batch_size):
        batch = conversations[first : first + batch_size]
        prompts = [model.prompts.prompt(list(messages)) for messages in batch]
        given = {name: values[first : first + batch_size].to(model.device) for name, values in (media or {}).items()}
        config = DecodingConfig(max_new_tokens=max_new_tokens)
        events = decode(model, prompts, media=given, config=config, seeds=[0] * len(prompts))
        said += collect(events, len(prompts))
    return said


def words_of(answer: Answer) -> str:
    """The words of an answer."""
    return " ".join(" ".join(part for part in answer.parts if isinstance(part, str)).split())


def finish(
    model: AnyGenModel, out: Path, generators: Mapping[str, Generator] | None = None, name: str | None = None
) -> Path:
    """Writes `out/model`, with all parts that the model it came from had, and what was added; of several processes the
    first one writes, and the others wait."""
    model.settings = replace(model.settings, name=name or model.settings.name)
    if is_main():
        save_model(out / "model", model.eval(), generators or {}, overwrite=True)
    wait()
    return out / "model"


def forget_checkpoints(out: Path) -> None:
    """Of a run that is finished, and has nothing to go on with."""
    if is_main():
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
