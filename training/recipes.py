"""Recipes: a YAML file names a kind of training and states everything that decides its result.

    kind: autoencoder
    out: runs/mini
    icons: data/icons
    steps: 8000

A list names recipes to be run one after the other, files beside it, each by itself or with values in place of its own:

    - 9-sound-autoencoder.yaml
    - {recipe: 10-vocoder.yaml, steps: 30000}

A recipe may take its values from another, `extends: other.yaml` (or a list, of which later ones count), and state what
differs; tables are joined key by key, and null takes a key out of a table.

`run` validates all of it before anything is loaded. A value on the command line (`steps=10`) replaces the file's; in a
list that of every recipe, or of the one that is named (`10-vocoder:steps=10`).
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import yaml

from anygen.config import Config
from anygen.errors import ConfigError, OutputError

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
    "encoder_alignment": ("anygen.training.encoder_alignment", "EncoderAlignmentRecipe"),
    "decoder_alignment": ("anygen.training.decoder_alignment", "DecoderAlignmentRecipe"),
    "instruction_tuning": ("anygen.training.instruction_tuning", "InstructionTuningRecipe"),
    "preference_tuning": ("anygen.training.preference_tuning", "PreferenceTuningRecipe"),
    "new_input": ("anygen.training.new_input", "NewInputRecipe"),
    "new_output": ("anygen.training.new_output", "NewOutputRecipe"),
}
"""Kind -> module with a function `train(recipe, out)`, and the recipe's class."""

Train = Callable[[Any, Path], dict[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One recipe, ready to be run."""

    name: str
    """The stem of its file."""
    recipe: Config
    out: Path
    """The folder that the results go to."""
    train: Train


def read(path: Path, overrides: Sequence[str] = ()) -> list[Run]:
    """Validated recipes, in the order in which they are to be run: one, or those of a list.

    Args:
        path: the YAML file.
        overrides: "key=value" or "nested.key=value", the values parsed as YAML; in a list "name:key=value", too, for
            the recipe whose file has that stem.

    Raises:
        ConfigError: no such file, not YAML, an unknown kind or key, a missing key or a wrong type; in a list an entry
            that names no recipe, or an override for none of them.
    """
    data = _load(path)
    if not isinstance(data, list):
        return [_read_one(path, data, overrides)]
    runs: list[Run] = []
    for number, entry in enumerate(data, start=1):
        values = {"recipe": entry} if isinstance(entry, str) else entry
        if not isinstance(values, dict) or not isinstance(values.get("recipe"), str):
            raise ConfigError(f"{path}: entry {number} must be a recipe's file, or 'recipe: FILE' with other values")
        file = path.parent / values["recipe"]
        own = [o.removeprefix(f"{file.stem}:") for o in overrides if _aimed(o) in (None, file.stem)]
        stated = _load(file)
        if isinstance(stated, list):
            raise ConfigError(f"{path}: entry {number}, {file.name}, is a list itself; lists hold recipes")
        replaced = {key: value for key, value in values.items() if key != "recipe"}
        runs.append(_read_one(file, stated | replaced if isinstance(stated, dict) else stated, own))
    names = [run.name for run in runs]
    if astray := [aimed for o in overrides if (aimed := _aimed(o)) is not None and aimed not in names]:
        raise ConfigError(f"{path} has no recipe '{astray[0]}'; it has {', '.join(names)}")
    return runs


def _aimed(override: str) -> str | None:
    """The recipe that an override is for; None: every one."""
    name, colon, _ = override.partition("=")[0].partition(":")
    return name if colon else None


def _load(path: Path, heirs: tuple[Path, ...] = ()) -> Any:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        told = f", which {heirs[-1]} extends" if heirs else ""
        why = "" if isinstance(error, FileNotFoundError) else f" that can be read ({error.strerror})"
        raise ConfigError(f"there is no recipe {path}{told}{why}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict) or "extends" not in data:
        return data
    if path.resolve() in heirs:
        raise ConfigError(f"{path} extends itself, by way of {heirs[-1]}")
    named = data.pop("extends")
    merged: dict[str, Any] = {}
    for name in named if isinstance(named, list) else [named]:
        if not isinstance(name, str):
            raise ConfigError(f"{path}: extends names a recipe's file, or a list of them, got {name!r}")
        base = _load(path.parent / name, (*heirs, path.resolve()))
        if not isinstance(base, dict):
            raise ConfigError(f"{path} extends {name}, which is no recipe of keys and values")
        merged = _joined(merged, base)
    return _joined(merged, data)


def _joined(base: dict[str, Any], own: dict[str, Any], *, inner: bool = False) -> dict[str, Any]:
    """`own` over `base`, tables key by key; inside a table null takes a key out."""
    joined = dict(base)
    for key, value in own.items():
        known = base.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            joined[key] = _joined(known, value, inner=True)
        elif inner and value is None:
            joined.pop(key, None)
        else:
            joined[key] = value
    return joined


def _read_one(path: Path, data: Any, overrides: Sequence[str]) -> Run:
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold keys and values, as in 'kind: autoencoder', or a list of recipes")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{override}' is not of the form key=value")
        *parents, last = key.split(".")
        try:
            given = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"'{override}': the value is not YAML ({' '.join(str(error).split())})") from None
        table = data
        for number, parent in enumerate(parents, start=1):
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ConfigError(f"'{override}': {'.'.join(parents[:number])} is {table!r}, which has no keys")
        if parents and given is None:
            table.pop(last, None)
        else:
            table[last] = given
    kind, out = data.pop("kind", None), data.pop("out", None)
    if kind not in KINDS:
        raise ConfigError(f"{path}: kind is '{kind}'; known kinds: {', '.join(KINDS)}")
    if not isinstance(out, str):
        told = "is missing:" if out is None else f"is {out!r}, not"
        raise ConfigError(f"{path}: key 'out' {told} the folder that the results go to")
    module = import_module(KINDS[kind][0])
    recipe_class: type[Config] = getattr(module, KINDS[kind][1])
    try:
        return Run(name=path.stem, recipe=recipe_class.from_dict(data), out=Path(out), train=module.train)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def run(path: Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Reads and runs a recipe or a list of them; each as it ran is kept beside its results. Raises as `read`, and
    OutputError where results cannot be written.

    Returns:
        The figures of the recipe; of a list those of each, by "name: figure".
    """
    runs, figures = read(path, overrides), dict[str, float]()
    for one in runs:
        stated = yaml.safe_dump(one.recipe.to_dict(), sort_keys=False)
        try:
            one.out.mkdir(parents=True, exist_ok=True)
            (one.out / f"{one.name}.recipe.yaml").write_text(stated, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{one.out} cannot take the results: {error.strerror} ({error.filename})") from None
        found = one.train(one.recipe, one.out)
        figures |= found if len(runs) == 1 else {f"{one.name}: {name}": value for name, value in found.items()}
        _forget()
    return figures


def dry_run(path: Path, overrides: Sequence[str] = ()) -> None:
    """Reads a recipe or a list of them and prints what each will take; nothing is trained or written. Raises as `read`,
    and for the stages on a user's data ConfigError for rows and names that do not fit."""
    made: dict[Path, str] = {}
    for one in read(path, overrides):
        module = import_module(type(one.recipe).__module__)
        earlier = made.get(Path(getattr(one.recipe, "model", "")).absolute())
        made[(one.out / "model").absolute()] = one.name
        if earlier is not None:
            print(f"{one.name}: the recipe is right; its data and parts are checked when {earlier} has made its model")
            continue
        if not hasattr(module, "trains"):
            print(f"{one.name}: the recipe is right; there is no estimate for its kind")
            continue
        from anygen.training.estimating import estimate, show

        prepare = partial(module.prepare, one.recipe)
        show(one.name, estimate(cast(Any, one.recipe), prepare, module.trains(one.recipe)))


def _forget() -> None:
    """Gives back what a run leaves on a GPU: its memory and its compiled graphs."""
    import torch

    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
