"""Every example in a docstring does what it says, on the model that ships."""

import ast
import doctest
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import pytest

import anygen

if TYPE_CHECKING:
    from anygen.pipeline import AnyGenPipeline

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("encoders", "projectors", "generators", "training")
SOURCES = {f"anygen.{path.stem}".removesuffix(".__init__"): path for path in (ROOT / "anygen").glob("*.py")} | {
    f"anygen.{folder}.{path.stem}".removesuffix(".__init__"): path
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.py")
}
READS = {"anygen.media": "apple.png", "anygen.messages": "guitar.png", "anygen.chat": "guitar.png"}
"""Module -> the picture that its listing finds beside it."""


def listing(path: Path) -> str:
    """The Python at the head of a module: the paragraphs of its docstring that parse, if anything is called there."""
    head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    code = "\n\n".join(paragraphs(head))
    return code if any(isinstance(node, ast.Call) for node in ast.walk(ast.parse(code))) else ""


def paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n")[1:]:
        try:
            ast.parse(code := textwrap.dedent(paragraph))
        except SyntaxError:
            continue
        yield code


SESSIONS = sorted(name for name, path in SOURCES.items() if ">>>" in path.read_text(encoding="utf-8"))
LISTINGS = {name: code for name, path in sorted(SOURCES.items()) if (code := listing(path))}


@pytest.fixture
def names(quick_default: "AnyGenPipeline", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What every example may use; its files go into a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return {"pipe": quick_default, "dataclass": dataclass} | {name: getattr(anygen, name) for name in anygen.__all__}


@pytest.mark.parametrize("module", SESSIONS)
def test_what_an_example_shows_is_what_comes_out(module: str, names: dict[str, Any]) -> None:
    code = import_module(module)
    runner, said = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), []
    examples = doctest.DocTestFinder().find(code, extraglobs=names)
    assert sum(runner.run(example, out=said.append).attempted for example in examples) > 0
    assert not said, "".join(said)


@pytest.mark.parametrize("module", LISTINGS)
def test_the_listing_at_the_head_of_a_module_runs(module: str, names: dict[str, Any]) -> None:
    if module in READS:
        PIL.Image.new("RGB", (8, 8), "red").save(READS[module])
    exec(compile(LISTINGS[module], module, "exec"), vars(import_module(module)) | names)


@pytest.mark.parametrize("name", [name for name in anygen.__all__ if name != "__version__"])
def test_every_public_name_shows_an_example(name: str) -> None:
    assert ">>>" in (inspect.getdoc(getattr(anygen, name)) or ""), f"anygen.{name} needs an example in its docstring"


def test_the_heads_of_the_modules_are_found() -> None:
    assert {"anygen", "anygen.media", "anygen.messages"} <= set(LISTINGS)
