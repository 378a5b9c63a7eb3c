"""A model knows which packages its parts are from, and says which are missing."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from anygen import registry
from anygen.cli import main
from anygen.errors import UnknownComponentError
from anygen.model_config import AnyGenConfig
from anygen.plugins import check_parts, installed, package_of, with_plugins

CODE = """
from anygen.registry import register
@register("encoder", "nose")
class Nose: ...
@register("generator", "perfume")
class Perfume: ...
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package with a plugin; afterwards all is as before."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    (tmp_path / "a_plugin_for_smells.py").write_text(CODE)
    info = tmp_path / "smell_plugin-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: smell-plugin\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[anygen.plugins]\nsmell = a_plugin_for_smells\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("a_plugin_for_smells", None)


@pytest.fixture
def smelling(tiny_config: AnyGenConfig) -> AnyGenConfig:
    """The tiny model's configuration with parts of the package in it."""
    image = tiny_config.modalities["image"]
    assert image.input is not None and image.output is not None
    read = replace(image.input, encoder=replace(image.input.encoder, name="nose"))
    made = replace(image.output, generator=replace(image.output.generator, name="perfume"))
    return replace(tiny_config, modalities=tiny_config.modalities | {"image": replace(image, input=read, output=made)})


def test_the_package_of_a_part_is_found_and_anygens_own_have_none(package: Path) -> None:
    nose = registry.lookup("encoder", "nose")
    assert package_of(nose) == "smell-plugin" and package_of(AnyGenConfig) is None
    (plugin,) = [plugin for plugin in installed() if plugin.package == "smell-plugin"]
    assert (plugin.name, plugin.version, plugin.module) == ("smell", "1.2", "a_plugin_for_smells")


def test_a_configuration_names_the_packages_that_it_needs(package: Path, smelling: AnyGenConfig) -> None:
    registry.load_plugins()
    written = with_plugins(smelling)
    assert written.plugins == {"smell-plugin": ("encoder nose", "generator perfume")}
    assert AnyGenConfig.from_dict(written.to_dict()) == written
    check_parts(written)
    image = smelling.modalities["image"]
    assert with_plugins(replace(written, modalities={"image": replace(image, output=None)})).plugins == {
        "smell-plugin": ("encoder nose",)
    }, "a part that is gone is not asked for"


def test_a_package_that_is_not_installed_is_named_with_what_it_brings(
    smelling: AnyGenConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_plugins_loaded", True)
    written = replace(smelling, plugins={"smell-plugin": ("encoder nose", "generator perfume")})
    with pytest.raises(UnknownComponentError) as raised:
        check_parts(written)
    assert str(raised.value) == (
        "the model tiny needs parts that are not here: the plugin 'smell-plugin' is not installed, which brings the "
        "encoder 'nose' of image and generator 'perfume' of image: pip install smell-plugin"
    )
    assert with_plugins(written).plugins == written.plugins, "what is not here is not forgotten"
    with pytest.raises(UnknownComponentError, match="encoder 'nose' of image: pip install smell-plugin"):
        check_parts(written, generators=False)


def test_an_installed_package_that_lost_a_part_and_parts_of_nobody_are_told(
    package: Path, smelling: AnyGenConfig
) -> None:
    (package / "a_plugin_for_smells.py").write_text(CODE.replace('"nose"', '"snout"'))
    written = replace(smelling, plugins={"smell-plugin": ("encoder nose",)})
    with pytest.raises(
        UnknownComponentError, match="'smell-plugin' brings no encoder 'nose' of image, but is installed in version 1.2"
    ):
        check_parts(written)
    with pytest.raises(UnknownComponentError, match="nobody registered the encoder 'nose' of image; known: imagebind"):
        check_parts(smelling)


def test_info_lists_plugins_and_modalities(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--plugins"]) == 0
    told = capsys.readouterr().out
    assert "smell-plugin 1.2 (a_plugin_for_smells) brings encoder nose, generator perfume" in told
    assert "audio: .wav, .flac, .ogg (anygen-mm)" in told
    assert main(["info", "--plugins", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {
        "package": "smell-plugin",
        "version": "1.2",
        "module": "a_plugin_for_smells",
        "brings": [
            "encoder nose",
            "generator perfume",
        ],
    } in found["plugins"]
    assert main(["info", "--plugins", "anygen-mini"]) == 2
    assert "--plugins lists them all; leave out the name" in capsys.readouterr().err


def test_info_of_a_model_tells_what_it_needs_without_it(
    tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(tiny_directory, tmp_path / "model")
    config = AnyGenConfig.load(tmp_path / "model/anygen.json")
    replace(config, plugins={"smell-plugin": ("encoder nose",)}).save(tmp_path / "model/anygen.json")
    (tmp_path / "model/manifest.json").unlink()
    assert main(["info", str(tmp_path / "model")]) == 0
    assert "needs smell-plugin (not installed)" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["pointcloud", "=chair.ply", "pointcloud="])
def test_media_of_any_modality_have_a_form(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["generate", "What is this?", "--media", given])
    assert raised.value.code == 2
    assert f"'{given}' is not of the form MODALITY=FILE, such as pointcloud=chair.ply" in capsys.readouterr().err


def test_media_of_a_modality_that_the_model_does_not_read_are_refused(
    tiny_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "What is this?", "--media", "smell=rose.txt", "--model", str(tiny_directory)]) == 2
    assert "the model cannot read smell; it reads text, image" in capsys.readouterr().err
