import sys
from pathlib import Path

import pytest

from anygen import registry
from anygen.errors import ConfigError, UnknownComponentError
from anygen.registry import lookup, names, register


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it, and plugins are looked for again."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(registry, "_plugins_loaded", False)


def plugin(folder: Path, code: str) -> None:
    """A user's installed package with an entry point of our group."""
    (folder / "smell_plugin_of_a_user.py").write_text(code)
    info = folder / "smell_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: smell-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[anygen.plugins]\nsmell = smell_plugin_of_a_user\n")


def test_a_decorated_class_is_found_by_its_name() -> None:
    @register("encoder", "nose")
    class Nose: ...

    assert lookup("encoder", "nose") is Nose
    assert "nose" in names("encoder") and "nose" not in names("generator")


@pytest.mark.parametrize("kind", ["encoder", "input_projector", "output_projector", "generator"])
def test_every_built_in_name_leads_to_a_class_of_that_name(kind: registry.Kind) -> None:
    for name, target in registry._builtin(kind).items():
        found = lookup(kind, name)
        assert f"{found.__module__}:{found.__qualname__}" == target


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(UnknownComponentError) as raised:
        lookup("input_projector", "lineer")
    assert str(raised.value).startswith("there is no input_projector called 'lineer' (did you mean 'linear'?); known: ")
    assert "entry point group 'anygen.plugins'" in str(raised.value)
    with pytest.raises(UnknownComponentError, match=r"there is no encoder called 'zzz'; known: imagebind"):
        lookup("encoder", "zzz")


def test_names_and_kinds_cannot_be_taken_twice_or_invented() -> None:
    with pytest.raises(ConfigError, match="the input_projector name 'linear' is taken by anygen.projectors.input:Lin"):
        register("input_projector", "linear")(type("Mine", (), {}))
    with pytest.raises(ConfigError, match="unknown kind of part 'nose'; known: encoder, input_projector, "):
        register("nose", "mine")  # type: ignore[arg-type]
    cls = type("Mine", (), {})
    assert register("encoder", "mine")(register("encoder", "mine")(cls)) is cls, "a module run twice is no conflict"


def test_a_users_package_is_imported_when_its_name_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin(
        tmp_path,
        "from anygen.registry import register\n@register('generator', 'perfume')\nclass Perfume: ...\n",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    lookup("input_projector", "linear")
    assert "smell_plugin_of_a_user" not in sys.modules, "a built-in name needs no plugin"
    assert lookup("generator", "perfume").__name__ == "Perfume"
    assert "perfume" in names("generator")
    sys.modules.pop("smell_plugin_of_a_user")


def test_a_broken_plugin_is_named_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path, "import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"the plugin 'smell' \(smell_plugin_of_a_user\) cannot be imported: No mod"
        ):
            lookup("encoder", "zzz")
