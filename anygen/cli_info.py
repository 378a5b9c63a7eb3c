"""`anygen info`: a model's parts, or what anygen wrote into a file that it saved."""

import argparse
import json
from pathlib import Path

from anygen.errors import CheckpointError, MediaError


def info(options: argparse.Namespace) -> int:
    """Runs the command."""
    what = options.what
    if what is not None and Path(what).is_file():
        return _file(Path(what), as_json=options.json)
    from anygen import hub
    from anygen.model_info import describe

    directory = hub.resolve(what)
    if not (directory / "anygen.json").is_file():
        raise CheckpointError(f"{directory} is not an anygen model: it has no anygen.json")
    found = describe(directory)
    print(json.dumps(found.to_dict()) if options.json else found)
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
