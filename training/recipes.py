"""Recipes: a YAML file names a kind of training and states everything that decides its result.

    kind: autoencoder
    out: runs/mini
    icons: data/icons
    steps: 8000

`run` validates all of it before anything is loaded. A value on the command line (`steps=10`) replaces the file's.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from anygen.config import Config
from anygen.errors import ConfigError

KINDS: dict[str, tuple[str, str]] = {
    "autoencoder": ("anygen.training.autoencoder", "AutoencoderRecipe"),
    "diffusion": ("anygen.training.diffusion", "DiffusionRecipe"),
    "contrastive": ("anygen.training.contrastive", "ContrastiveRecipe"),
    "alignment": ("anygen.training.alignment", "AlignmentRecipe"),
    "instruction": ("anygen.training.instruction", "InstructionRecipe"),
    "sound_autoencoder": ("anygen.training.sound_autoencoder", "SoundAutoencoderRecipe"),
    "sound_diffusion": ("anygen.training.sound_diffusion", "SoundDiffusionRecipe"),
    "video_diffusion": ("anygen.training.video_diffusion", "VideoDiffusionRecipe"),
    "vocoder": ("anygen.training.vocoder", "VocoderRecipe"),
}
"""Kind -> module with a function `train(recipe, out)`, and the recipe's class."""

Train = Callable[[Any, Path], dict[str, float]]


def read(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, Path, Train]:
    """A validated recipe, its output folder, and the function that runs it.

    Args:
        path: the YAML file.
        overrides: "key=value" or "nested.key=value", the values parsed as YAML.

    Raises:
        ConfigError: no such file, not YAML, an unknown kind or key, a missing key or a wrong type.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe {path}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold keys and values, as in 'kind: autoencoder'")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{override}' is not of the form key=value")
        *parents, last = key.split(".")
        table = data
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = yaml.safe_load(value)
    kind, out = data.pop("kind", None), data.pop("out", None)
    if kind not in KINDS:
        raise ConfigError(f"{path}: kind is '{kind}'; known kinds: {', '.join(KINDS)}")
    if not isinstance(out, str):
        raise ConfigError(f"{path}: key 'out' is missing: the folder that the results go to")
    module = import_module(KINDS[kind][0])
    recipe_class: type[Config] = getattr(module, KINDS[kind][1])
    try:
        return recipe_class.from_dict(data), Path(out), module.train
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def run(path: Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Reads and runs a recipe; the recipe as it ran is kept beside the results. Raises as `read`."""
    recipe, out, train = read(path, overrides)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{path.stem}.recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
    return train(recipe, out)
