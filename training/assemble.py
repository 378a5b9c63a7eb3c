"""Puts the trained parts of a mini model together as one model directory with a manifest."""

import shutil
from pathlib import Path

from anygen.errors import CheckpointError

PARTS = {"generator": "generators/image", "imagebind": "encoders/imagebind"}
"""What the recipes write -> where the model directory has it."""


def assemble(runs: Path, out: Path) -> Path:
    """Copies `runs/{model,generator,imagebind}` into `out`, weights and all, and writes the manifest last.

    A model card (`README.md`) that lies in `out` stays; everything else there is replaced.

    Raises:
        CheckpointError: a recipe has not been run yet.
    """
    from anygen.manifest import write_manifest

    for part in ("model", *PARTS):
        if not (runs / part).is_dir():
            raise CheckpointError(f"{runs / part} is missing: run the recipe that makes it first")
    card = (out / "README.md").read_text(encoding="utf-8") if (out / "README.md").exists() else None
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(runs / "model", out, ignore=shutil.ignore_patterns("README.md"))
    for part, place in PARTS.items():
        shutil.copytree(runs / part, out / place)
    if card is not None:
        (out / "README.md").write_text(card, encoding="utf-8")
    write_manifest(out)
    return out
