"""The README keeps its word: what it lists is there, what it shows runs. Its commands are taken from it, not copied."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image
import pytest

if TYPE_CHECKING:
    from anygen.pipeline import AnyGenPipeline

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
FIRST, SECOND = 'pip install -e . && anygen generate "Draw a red apple"', "pip install -e '.[dev]' && pytest"


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(document), flags=re.MULTILINE | re.DOTALL)


def commands(document: str) -> Iterator[list[str]]:
    """The arguments of every `anygen …` in shell blocks and in the text."""
    text = re.sub(r"^```.*?^```", "", read(document), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks(document, "bash") for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *re.findall(r"`(anygen [^`]+)`", text)]:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, words = True, [[]]
        for word in lexer:
            if set(word) <= set("&|;<>"):
                words.append([])
            else:
                words[-1].append(word)
        yield from (arguments for name, *arguments in filter(None, words) if name == "anygen")


def folders() -> set[str]:
    """The root's folders, without hidden ones and those that git ignores."""
    ignored = [line.strip("/") for line in read(".gitignore").splitlines() if line.endswith("/")]
    found = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    return {name for name in found if not any(fnmatch(name, pattern) for pattern in ignored)}


def tree() -> list[tuple[int, str, str]]:
    """(indent, name, clause) of every line of the file tree."""
    lines = next(
        block for block in blocks("README.md", "text") if re.search(r"^anygen/ ", block, re.MULTILINE)
    ).splitlines()
    found = [re.fullmatch(r"([\s│├└─]*)(\S+)\s*(.*)", line) for line in lines if line.strip(" │")]
    return [(len(line[1]), line[2], line[3].strip("# —–-")) for line in found if line]


def test_the_first_commands_are_the_promised_ones() -> None:
    shell = "\n".join(blocks("README.md", "bash"))
    assert FIRST in shell and SECOND in shell


def test_the_file_tree_names_every_folder_with_a_clause() -> None:
    outermost = min(indent for indent, _, _ in tree())
    named = [name.removesuffix("/") for indent, name, _ in tree() if indent == outermost and name.endswith("/")]
    assert sorted(named) == sorted(folders())
    assert [name for _, name, clause in tree() if not clause] == []


def test_the_file_tree_names_nothing_else() -> None:
    above: list[tuple[int, Path]] = []
    for indent, name, _ in tree():
        above = [(other, path) for other, path in above if other < indent]
        path = (above[-1][1] if above else ROOT) / name
        assert path.exists(), f"{name} is in the README's tree, and nowhere else"
        above.append((indent, path))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_understood(document: str) -> None:
    from anygen.cli import _parsed

    for arguments in commands(document):
        try:
            _parsed(arguments)
        except SystemExit as exit:
            assert exit.code == 0, f"{document}: anygen {shlex.join(arguments)}"


def test_the_commands_are_found() -> None:
    assert ["generate", "Draw a red apple"] in list(commands("README.md"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    text = re.sub(r"^```.*?^```", "", read(document), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(<?([^)>\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    paths = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    assert [path for path in paths if path and not ((ROOT / document).parent / path).exists()] == []


@pytest.mark.parametrize("document", ["README.md", "docs/quickstart.md"])
def test_the_python_example_runs(
    document: str, quick_default: "AnyGenPipeline", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(document, "python")
    exec(compile(example, document, "exec"), {})


def test_the_first_command_draws_a_picture(embedded_default: Path, tmp_path: Path) -> None:
    from anygen.media import read_metadata

    arguments = next(arguments for arguments in commands("README.md") if "Draw a red apple" in arguments)
    run = subprocess.run(
        [sys.executable, "-m", "anygen", *arguments, *(["--json"] if "--json" not in arguments else [])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    answer = json.loads(run.stdout)
    assert set(answer) == {"text", "content", "seed", "timings"}
    (path,) = (tmp_path / part["path"] for part in answer["content"] if part["type"] == "image")
    with PIL.Image.open(path) as picture:
        assert (picture.format, picture.size) == ("PNG", (128, 128))
    told = read_metadata(path)
    assert (told["prompt"], told["seed"], told["model"]) == ("Draw a red apple", answer["seed"], "anygen-mini")
