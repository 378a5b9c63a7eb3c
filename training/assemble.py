"""Puts the trained parts of a mini model together as one model directory with a manifest."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from anygen.component import read_safetensors
from anygen.errors import CheckpointError

logger = logging.getLogger("anygen.training")

MODEL, ENCODER = "model", "imagebind"
GENERATORS = {"image": "clips/generator", "video": "video/generator", "audio": "sound/generator"}
"""Output modality -> where its recipe writes the generator."""
SHARED = {
    "vae": "../image/vae",
    "text_encoder": "../image/text_encoder",
    "tokenizer": "../image/tokenizer",
    "spatial": "../image/unet",
}
"""Parts of the video generator that are the image generator's, the spatial layers of its UNet among them."""
MOST_BYTES, MOST_BYTES_A_FILE = 120 << 20, 16 << 20


def assemble(runs: Path, out: Path, places: Mapping[str, str] | None = None) -> int:
    """Joins the parts below `runs` in `out`, weights and all, and writes the manifest last.

    The model's configuration says which generators it needs. The video generator is written without the parts that it
    has from the image generator. A model card (`README.md`) that lies in `out` stays; everything else there is
    replaced, once all is there and fits.

    Args:
        runs: where the recipes wrote `model`, `imagebind` and the generators.
        out: the model's directory.
        places: "model", "imagebind" or an output modality -> another place below `runs`.

    Returns:
        Bytes of all files.

    Raises:
        CheckpointError: a recipe has not been run yet, the video generator was trained on other parts than the image
            generator's, or the whole or one of its files is too large.
    """
    from anygen.manifest import write_manifest
    from anygen.model import CONFIG
    from anygen.model_config import AnyGenConfig

    found = {MODEL: MODEL, ENCODER: ENCODER} | GENERATORS | dict(places or {})
    given = {part: _there(runs / found[part]) for part in (MODEL, ENCODER)}
    config = AnyGenConfig.load(given[MODEL] / CONFIG)
    given |= {modality: _there(runs / found[modality]) for modality in config.outputs}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(given[MODEL], temporary, ignore=shutil.ignore_patterns("README.md"))
        shutil.copytree(given[ENCODER], temporary / "encoders/imagebind")
        for modality in sorted(config.outputs, key="video".__eq__):  # what is shared has to be there first
            place = temporary / "generators" / modality
            if modality == "video" and "image" in config.outputs:
                _write_sharing(given[modality], given["image"], place)
            else:
                shutil.copytree(given[modality], place)
        if (card := out / "README.md").exists():
            shutil.copy2(card, temporary)
        write_manifest(temporary)
        total = _size(temporary)
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("%s: %.1f MiB with %s", out, total / 2**20, ", ".join(config.outputs))
    return total


def _there(directory: Path) -> Path:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is missing: run the recipe that makes it first")
    return directory


def _write_sharing(video: Path, image: Path, place: Path) -> None:
    """Writes the video generator with its shared parts left to the image generator.

    The image generator's decoder may have been trained further: latents and captions are what has to be the same.
    """
    from anygen.generators.clip_unet import as_spatial, is_temporal
    from anygen.generators.zeroscope import ZeroscopeGenerator

    latents = ("encoder.", "quant_conv.")
    for part, stem, kept in (
        ("vae", "diffusion_pytorch_model", latents),
        ("text_encoder", "model", ("",)),
        ("unet", "diffusion_pytorch_model", ("",)),
    ):
        own, other = (
            {
                k: v
                for k, v in read_safetensors(folder / part, stem).items()
                if k.startswith(kept) and not is_temporal(k)
            }
            for folder in (video, image)
        )
        other = as_spatial(other, own)
        if own.keys() != other.keys() or not all(torch.equal(own[key].half(), other[key].half()) for key in own):
            raise CheckpointError(
                f"the video generator in {video} was trained on another {part} than that of the image generator in "
                f"{image}: train it on that one, so that they share it"
            )
    generator = ZeroscopeGenerator.from_pretrained(video, dtype=torch.float16)
    generator.save_pretrained(place, shared=SHARED)


def _size(directory: Path) -> int:
    """Bytes of all files, refused if they are too many."""
    sizes = {path: path.stat().st_size for path in directory.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        parts: dict[str, int] = {}
        for path, size in sizes.items():
            relative = path.relative_to(directory).parts
            name = "/".join(relative[: min(2, len(relative) - 1)]) or path.name
            parts[name] = parts.get(name, 0) + size
        largest = sorted(parts.items(), key=lambda item: -item[1])[:6]
        raise CheckpointError(
            f"the model has {total / 2**20:.1f} MiB, at most {MOST_BYTES >> 20} may be shipped; the largest parts: "
            + ", ".join(f"{name} {size / 2**20:.1f}" for name, size in largest)
        )
    largest_file = max(sizes, key=lambda path: sizes[path])
    if sizes[largest_file] > MOST_BYTES_A_FILE:
        raise CheckpointError(
            f"{largest_file.relative_to(directory)} has {sizes[largest_file] / 2**20:.1f} MiB, "
            f"at most {MOST_BYTES_A_FILE >> 20} go into one file: save it in shards"
        )
    return total
