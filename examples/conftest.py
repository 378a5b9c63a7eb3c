"""The examples' tests run where the examples are installed, and where they are not: then as if they were.

They run in a process of their own (`pytest examples`), so that their plugins are unknown to anygen's own tests.
"""

import ast
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

EXAMPLES = Path(__file__).resolve().parent
_folder = TemporaryDirectory()


def _install() -> None:
    """Puts the folders on the path, with the entry points that their `pyproject.toml` declares."""
    there = {point.module for point in entry_points(group="anygen.plugins")}
    for project in sorted(EXAMPLES.glob("*/pyproject.toml")):
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        points = table["entry-points"]["anygen.plugins"]
        sys.path.insert(0, str(project.parent))
        if set(points.values()) <= there:
            continue
        info = Path(_folder.name) / f"{table['name'].replace('-', '_')}-{table['version']}.dist-info"
        info.mkdir()
        told = f"Metadata-Version: 2.1\nName: {table['name']}\nVersion: {table['version']}\n"
        (info / "METADATA").write_text(told)
        lines = "".join(f"{name} = {module}\n" for name, module in points.items())
        (info / "entry_points.txt").write_text(f"[anygen.plugins]\n{lines}")
    sys.path.insert(0, _folder.name)


_install()  # here, because the test modules import the packages while they are collected


def code_lines(folder: Path) -> int:
    """Lines of a package's code: without docstrings, comments and blank lines."""
    count = 0
    for path in folder.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        told = {
            line
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        lines = enumerate(text.splitlines(), start=1)
        count += sum(1 for n, line in lines if line.strip() and not line.strip().startswith("#") and n not in told)
    return count


@pytest.fixture(scope="session")
def mini() -> Path:
    """The directory of anygen-mini."""
    from anygen import hub

    return hub.resolve()


@pytest.fixture
def counted() -> object:
    """`code_lines`."""
    return code_lines
