"""`anygen info`: a model's parts, a preset's, or what anygen wrote into a file that it saved."""

import argparse
import json
from pathlib import Path

from anygen.errors import CheckpointError, ConfigError, MediaError


def info(options: argparse.Namespace) -> int:
    """Runs the command."""
    what = options.what
    if options.plugins:
        if what is not None or options.memory or options.presets:
            raise ConfigError("--plugins lists them all; leave out the name, --presets and --memory")
        return _plugins(as_json=options.json)
    if options.presets:
        if what is not None or options.memory:
            raise ConfigError("--presets lists them all; leave out the name and --memory")
        from anygen.cli_presets import list_presets

        return list_presets(as_json=options.json)
    if what is not None and Path(what).is_file():
        return _file(Path(what), as_json=options.json)
    from anygen.presets import PRESETS

    if what in PRESETS and not Path(what).is_dir():
        from anygen.cli_presets import show_preset

        return show_preset(PRESETS[what], memory=options.memory, as_json=options.json)
    from anygen import hub
    from anygen.model_info import describe

    directory = hub.resolve(what)
    if not (directory / "anygen.json").is_file():
        raise CheckpointError(f"{directory} is not an anygen model: it has no anygen.json")
    if options.memory:
        from anygen.cli_presets import show_need
        from anygen.memory_need import model_need

        return show_need(model_need(directory), directory.resolve().name, as_json=options.json)
    found = describe(directory)
    print(json.dumps(found.to_dict()) if options.json else found)
    return 0


def _plugins(*, as_json: bool) -> int:
    from anygen.plugins import describe_installed

    found = describe_installed()
    if as_json:
        print(json.dumps(found))
        return 0
    for plugin in found["plugins"]:
        brings = ", ".join(plugin["brings"]) or "nothing"
        print(f"{plugin['package']} {plugin['version']} ({plugin['module']}) brings {brings}")
    if not found["plugins"]:
        print("no plugins are installed; docs/new-modality.md tells how to write one")
    print()
    for modality, told in found["modalities"].items():
        print(f"{modality}: {', '.join(told['files'])} ({told['package']})")
    return 0


def _file(path: Path, *, as_json: bool) -> int:
    from anygen.media import read_metadata

    written = read_metadata(path)
    if not written:
        raise MediaError(f"{path} holds nothing that anygen wrote")
    if as_json:
        print(json.dumps(written))
    else:
        width = max(map(len, written))
        for key, value in written.items():
            print(f"{key.ljust(width)}  {value}")
    return 0
