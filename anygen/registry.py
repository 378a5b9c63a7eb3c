"""One registry for every kind of part: anygen's own, and those of a user's package.

anygen's own parts stand in one table a folder (`COMPONENTS` in `encoders/__init__.py` and so on), as
"module:attribute", so that looking one up imports that one module. A user's package registers its parts with the
decorator, and is imported through an entry point of the group `anygen.plugins` the first time a name is not found.
"""

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar

from anygen.errors import ConfigError, UnknownComponentError

Kind = Literal["encoder", "input_projector", "output_projector", "generator"]
T = TypeVar("T")

PLUGIN_GROUP = "anygen.plugins"
_FOLDERS: dict[str, str] = {
    "encoder": "anygen.encoders",
    "input_projector": "anygen.projectors",
    "output_projector": "anygen.projectors",
    "generator": "anygen.generators",
}
_registered: dict[tuple[str, str], Any] = {}
_plugins_loaded = False


def register(kind: Kind, name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: makes a part known under `name`.

    Raises:
        ConfigError: `kind` is none of ours, or the name is taken by another class.
    """
    if kind not in _FOLDERS:
        raise ConfigError(f"unknown kind of part '{kind}'; known: {', '.join(_FOLDERS)}")

    def decorate(cls: type[T]) -> type[T]:
        taken = _registered.get((kind, name)) or _builtin(kind).get(name)
        own = f"{cls.__module__}:{cls.__qualname__}"
        if taken is not None and taken is not cls and taken != own:
            owner = taken if isinstance(taken, str) else f"{taken.__module__}:{taken.__qualname__}"
            raise ConfigError(f"the {kind} name '{name}' is taken by {owner}; choose another for {own}")
        _registered[kind, name] = cls
        return cls

    return decorate


def lookup(kind: Kind, name: str) -> type[Any]:
    """The class registered under `name`; plugins are loaded only when anygen's own tables do not have it.

    Raises:
        UnknownComponentError: nobody registered that name; lists the known ones.
    """
    if (kind, name) not in _registered:
        if (target := _builtin(kind).get(name)) is not None:
            module, attribute = target.split(":")
            _registered[kind, name] = getattr(import_module(module), attribute)
        else:
            load_plugins()
    if (found := _registered.get((kind, name))) is None:
        known = names(kind)
        near = get_close_matches(name, known, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise UnknownComponentError(
            f"there is no {kind} called '{name}'{hint}; known: {', '.join(known) or 'none'}. "
            f"A part from another package needs that package installed (entry point group '{PLUGIN_GROUP}')."
        )
    return found


def names(kind: Kind) -> list[str]:
    """All names of that kind, anygen's own and the plugins'."""
    load_plugins()
    return sorted({name for k, name in _registered if k == kind} | set(_builtin(kind)))


def name_of(kind: Kind, cls: type[Any]) -> str:
    """The name under which a class is registered.

    Raises:
        UnknownComponentError: it is under none; says how to register it.
    """
    target = f"{cls.__module__}:{cls.__qualname__}"
    for name, found in {**_builtin(kind), **{name: c for (k, name), c in _registered.items() if k == kind}}.items():
        if found is cls or found == target:
            return name
    raise UnknownComponentError(f"{target} is not registered; decorate it with @register('{kind}', NAME)")


def is_known(kind: Kind, name: str) -> bool:
    """Whether `lookup` finds it; a part of anygen's own is not imported for that."""
    if (kind, name) not in _registered and name not in _builtin(kind):
        load_plugins()
    return (kind, name) in _registered or name in _builtin(kind)


def plugin_class(kind: Kind, name: str) -> type[Any] | None:
    """The class of a part that a plugin brought; None for anygen's own and for what nobody registered."""
    return None if name in _builtin(kind) else _registered.get((kind, name))


def load_plugins() -> None:
    """Imports every installed entry point of the group `anygen.plugins`, once.

    Raises:
        ConfigError: one of them cannot be imported; names it.
    """
    global _plugins_loaded
    if _plugins_loaded:
        return
    for point in entry_points(group=PLUGIN_GROUP):
        try:
            point.load()
        except Exception as error:
            raise ConfigError(
                f"the plugin '{point.name}' ({point.value}) cannot be imported: {error}; repair or uninstall it"
            ) from error
    _plugins_loaded = True


def _builtin(kind: str) -> dict[str, str]:
    return import_module(_FOLDERS[kind]).COMPONENTS.get(kind, {})
