"""Which packages have plugins, what a model needs of them, and what to say when one is missing. Read without torch.

A package's plugin is an entry point of the group `anygen.plugins` that names a module; importing the module registers
what it brings. `extension.py` has what such a module declares.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any, cast

from anygen.errors import UnknownComponentError
from anygen.media import media_type, modalities
from anygen.model_config import AnyGenConfig
from anygen.registry import PLUGIN_GROUP, Kind, is_known, load_plugins, names, plugin_class


@dataclass(frozen=True, slots=True)
class Plugin:
    """One entry point of an installed package."""

    name: str
    package: str
    version: str
    module: str


def installed() -> list[Plugin]:
    """Every plugin of this environment; none is imported."""
    found = []
    for point in entry_points(group=PLUGIN_GROUP):
        package = (point.dist.name, point.dist.version) if point.dist is not None else ("", "")
        found.append(Plugin(point.name, *package, point.module))
    return sorted(found, key=lambda plugin: (plugin.package, plugin.name))


def package_of(cls: type[Any]) -> str | None:
    """The package whose plugin brought a class; None if no installed plugin did."""
    root = cls.__module__.partition(".")[0]
    return next((plugin.package for plugin in installed() if plugin.module.partition(".")[0] == root), None)


def parts_of(config: AnyGenConfig, *, generators: bool = True) -> Iterator[tuple[Kind, str, str]]:
    """(kind, name, modality) of every registered part that a model is made of."""
    for modality, reading in config.inputs.items():
        yield "encoder", reading.encoder.name, modality
        if reading.shares is None:
            yield "input_projector", reading.projector.name, modality
    for modality, making in config.outputs.items():
        yield "output_projector", making.projector.name, modality
        if generators:
            yield "generator", making.generator.name, modality


def with_plugins(config: AnyGenConfig) -> AnyGenConfig:
    """The configuration with the packages that its parts come from; what is not loaded here is left as it was."""
    brought = {part: package for package, parts in config.plugins.items() for part in parts}
    known = {f"{kind} {name}" for kind, name, _ in parts_of(config)}
    for kind, name, _ in parts_of(config):
        cls = plugin_class(kind, name)
        if cls is not None and (package := package_of(cls)) is not None:
            brought[f"{kind} {name}"] = package
    packages: dict[str, tuple[str, ...]] = {}
    for part, package in sorted(brought.items()):
        if part in known:
            packages[package] = (*packages.get(package, ()), part)
    return replace(config, plugins=packages)


def check_parts(config: AnyGenConfig, *, generators: bool = True) -> None:
    """Refuses a model whose parts are not all here, before anything is loaded.

    Args:
        config: of the model.
        generators: whether those are needed, too.

    Raises:
        UnknownComponentError: names the parts, what they are for, and the packages to install.
        ConfigError: an installed plugin cannot be imported.
    """
    lacking: dict[str | None, list[str]] = {}
    owners = {part: package for package, parts in config.plugins.items() for part in parts}
    for kind, name, modality in parts_of(config, generators=generators):
        if not is_known(kind, name):
            lacking.setdefault(owners.get(f"{kind} {name}"), []).append(f"{kind} '{name}' of {modality}")
    if not lacking:
        return
    told = []
    for package, parts in lacking.items():
        what = " and ".join(parts)
        if package is None:
            known = names(cast(Kind, parts[0].split()[0]))
            told.append(f"nobody registered the {what}; known: {', '.join(known)}")
            continue
        try:
            told.append(f"the plugin '{package}' brings no {what}, but is installed in version {version(package)}")
        except PackageNotFoundError:
            told.append(f"the plugin '{package}' is not installed, which brings the {what}: pip install {package}")
    raise UnknownComponentError(f"the model {config.name} needs parts that are not here: {'; '.join(told)}")


def describe_installed() -> dict[str, Any]:
    """What `anygen info --plugins` tells, in JSON types.

    Raises:
        ConfigError: a plugin cannot be imported.
    """
    load_plugins()
    kinds: tuple[Kind, ...] = ("encoder", "input_projector", "output_projector", "generator")
    brought: dict[str, list[str]] = {}
    for kind in kinds:
        for name in names(kind):
            cls = plugin_class(kind, name)
            if cls is not None and (package := package_of(cls)) is not None:
                brought.setdefault(package, []).append(f"{kind} {name}")
    return {
        "plugins": [
            {"package": p.package, "version": p.version, "module": p.module, "brings": brought.get(p.package, [])}
            for p in installed()
        ],
        "modalities": {
            modality: {"files": list(cls.suffixes), "package": package_of(cls) or "anygen-mm"}
            for modality, cls in {modality: media_type(modality) for modality in modalities()}.items()
        },
    }
