"""What a model's directory will take in memory, at each precision, before anything is loaded. Read without torch.

Weights are counted from the headers of the files and are exact, as far as the files are here: encoders and what is
trained in float32, the LLM and the generators in the precision's type; at 8 and 4 bits the LLM's linear layers alone
are quantised. Text encoders count where a generator has to load them. On top come the keys and values of
`presets.CONTEXT` tokens, and an estimate of what is computed in between: the generators' decoders at full resolution,
of which half a dozen tensors live at once. Those of all generators count, as they take turns and keep memory of their
own (`anygen.together`).
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anygen.model_config import AnyGenConfig, SourcedPartConfig
from anygen.model_info import folder_of
from anygen.preset_parts import BLOCK, PRECISIONS, Precision
from anygen.presets import CONTEXT, Need
from anygen.weight_files import Header, headers

TEXT_PARTS = ("text_encoder", "projection_model", "language_model", "safety_checker", "image_encoder")
"""Folders of a generator, by the beginning of their names, that answering does not load."""
FRAMES_AT_ONCE = 8
"""Frames of a clip that are decoded together (`anygen.generators.zeroscope`)."""
ALIVE = 6
"""Tensors of a decoder's last stage that live at once, its convolution's workspace counted."""
LEAST_WORKING = 2**20
POLICIES = ("resident", "auto", "model_offload", "sequential")
"""Of `anygen.offload`, from the fastest to the smallest."""
_WIDE: dict[Precision, int] = {p: 4 if p == "fp32" else 2 for p in PRECISIONS}


@dataclass(frozen=True, slots=True)
class ModelNeed:
    """What a model takes."""

    needs: tuple[Need, ...]
    """By role, the generators' among them as "image generator" and so on."""
    largest: Mapping[str, dict[Precision, int]]
    """Modality -> the largest of its generator's models."""

    def of(self, role: str, precision: Precision) -> int:
        """Bytes; 0 where it is not known."""
        return next((need.bytes[precision] or 0 for need in self.needs if need.role == role), 0)

    def base(self, precision: Precision) -> int:
        """Bytes of all but the generators."""
        return sum(n.bytes[precision] or 0 for n in self.needs if not n.role.endswith(" generator"))

    def generators(self, precision: Precision) -> dict[str, int]:
        """Modality -> bytes."""
        return {modality: self.of(f"{modality} generator", precision) for modality in self.largest}

    def total(self, precision: Precision, offload: str = "resident") -> int:
        """Bytes that are taken at the most under a policy of `anygen.offload`."""
        makers = self.generators(precision)
        held = {
            "resident": sum(makers.values()),
            "auto": max(makers.values(), default=0),
            "after_use": max(makers.values(), default=0),
            "model_offload": max((sizes[precision] for sizes in self.largest.values()), default=0),
            "sequential": 0,
        }
        return self.base(precision) + held[offload]

    @property
    def unknown(self) -> list[str]:
        """The roles of what is not on this machine yet."""
        return [need.role for need in self.needs if any(size is None for size in need.bytes.values())]


def model_need(directory: Path, *, wanted: Collection[str] | None = None) -> ModelNeed:
    """Reads a model's directory.

    Args:
        directory: with `anygen.json`.
        wanted: the modalities that are made; by default all.

    Raises:
        ConfigError: its configuration does not fit.
        CheckpointError: a weight file or a directory is missing or damaged.
    """
    config = AnyGenConfig.load(directory / "anygen.json")
    llm = folder_of(config.llm, directory, "LLM")
    words = [h for path in directory.glob("vocabulary*.safetensors") for h in headers(path)]
    needs = [_llm(llm, words)]
    encoders = {m: _encoder(c.encoder, directory, m) for m, c in config.inputs.items()}
    needs.append(_same("encoders", None if None in encoders.values() else 4 * sum(map(int, _known(encoders)))))
    trained = [
        header
        for pattern in ("projectors*.safetensors", "signal_tokens*.safetensors", "adapter/*.safetensors")
        for path in directory.glob(pattern)
        for header in headers(path)
    ]
    needs.append(
        _same("projectors, signal rows, adapter", sum((8 if h.dtype == "I64" else 4) * h.numbers for h in trained))
    )
    largest, working = {}, 0
    for modality, making in config.outputs.items():
        if wanted is not None and modality not in wanted:
            continue
        folder = folder_of(making.generator.source, directory, f"{modality} generator")
        models = _generator(folder) if folder.is_dir() else None
        sizes: dict[Precision, int | None] = {
            p: None if models is None else _WIDE[p] * sum(models.values()) for p in PRECISIONS
        }
        needs.append(Need(role=f"{modality} generator", bytes=sizes))
        largest[modality] = {p: _WIDE[p] * max((models or {"": 0}).values()) for p in PRECISIONS}
        working += _decoding(folder, modality, making.generator.options)
    keys = _keys(llm)
    needs.append(Need(role=f"keys and values of {CONTEXT:,} tokens", bytes={p: keys * _WIDE[p] for p in PRECISIONS}))
    needs.append(Need(role="working memory", bytes={p: max(working, LEAST_WORKING) * _WIDE[p] for p in PRECISIONS}))
    return ModelNeed(tuple(needs), largest)


def _llm(folder: Path, words: list[Header]) -> Need:
    if not folder.is_dir():
        return Need(role="LLM", bytes=dict.fromkeys(PRECISIONS))
    tensors = [header for path in folder.glob("*.safetensors") for header in headers(path)]

    def is_row(header: Header) -> bool:
        return "embed_tokens" in header.name or "lm_head" in header.name

    rows = sum(header.numbers for header in words or filter(is_row, tensors))
    linear = sum(header.numbers for header in tensors if not is_row(header))
    told: dict[Precision, int | None] = {
        "fp32": 4 * (rows + linear),
        "bf16": 2 * (rows + linear),
        "8-bit": 2 * rows + linear,
        "4-bit": 2 * rows + linear // 2 + 4 * linear // BLOCK,
    }
    return Need(role="LLM", bytes=told)


def _encoder(part: SourcedPartConfig, directory: Path, modality: str) -> int | None:
    """Numbers; of an ImageBind those of the one trunk that is loaded."""
    folder = folder_of(part.source, directory, f"{modality} encoder")
    if not folder.is_dir():
        return None
    tensors = [header for path in folder.rglob("*.safetensors") for header in headers(path)]
    if part.name == "imagebind":
        asked = part.options.get("modality", "image")
        trunk = "vision" if asked in ("image", "video") else asked
        tensors = [header for header in tensors if f".{trunk}." in header.name]
    return sum(header.numbers for header in tensors)


def _generator(folder: Path) -> dict[str, int]:
    """Model -> its numbers, of those that answering loads."""
    shared: dict[str, str] = _json(folder / "shared.json")
    whole = not (folder / "unconditional.safetensors").exists()  # the empty caption has to be encoded
    models: dict[str, int] = {}
    places = {path.name: path for path in folder.iterdir() if path.is_dir()}
    places |= {name: folder / path for name, path in shared.items()}
    for name, place in places.items():
        if whole or not name.startswith(TEXT_PARTS):
            models[name] = sum(header.numbers for path in place.glob("*.safetensors") for header in headers(path))
    if (spatial := models.pop("spatial", None)) is not None:  # layers of the UNet that lie elsewhere
        models["unet"] = models.get("unet", 0) + spatial
    models["own"] = sum(header.numbers for path in folder.glob("*.safetensors") for header in headers(path))
    return models


def _keys(llm: Path) -> int:
    """Numbers in the keys and values of `CONTEXT` tokens."""
    config = _json(llm / "config.json")
    config = config.get("text_config", config)
    heads = config.get("num_attention_heads", 0)
    width = config.get("head_dim") or config.get("hidden_size", 0) // max(1, heads)
    return 2 * CONTEXT * config.get("num_hidden_layers", 0) * (config.get("num_key_value_heads") or heads) * width


def _decoding(folder: Path, modality: str, options: Mapping[str, Any]) -> int:
    """Numbers that are alive while a picture or some frames are decoded; an estimate."""
    shared: dict[str, str] = _json(folder / "shared.json")
    vae = _json(folder / shared.get("vae", "vae") / "config.json")
    denoiser = _json(folder / "unet" / "config.json") or _json(folder / "transformer" / "config.json")
    channels, side = vae.get("block_out_channels"), denoiser.get("sample_size")
    if not channels or modality == "audio" or not side:
        return 0
    told = _json(folder / "sampling.json") | dict(options)
    factor = 2 ** (len(channels) - 1)
    height, width = (side, side) if isinstance(side, int) else side
    pixels = (told.get("height") or height * factor) * (told.get("width") or width * factor)
    frames = FRAMES_AT_ONCE if modality == "video" else 1
    return ALIVE * frames * pixels * channels[min(1, len(channels) - 1)]


def _same(role: str, size: int | None) -> Need:
    return Need(role=role, bytes=dict.fromkeys(PRECISIONS, size))


def _known(sizes: Mapping[str, int | None]) -> list[int]:
    return [size for size in sizes.values() if size is not None]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
