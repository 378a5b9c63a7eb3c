"""Imports run one way: components know the ground floor, the roof knows everything but training.

    training  ->  roof of anygen  ->  encoders, projectors, generators  ->  ground floor of anygen

The modules are read, not run, so that an import inside a function counts too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPONENTS = ("encoders", "projectors", "generators")
GROUND = {
    "anygen.clips",
    "anygen.compiling",
    "anygen.component",
    "anygen.config",
    "anygen.environment",
    "anygen.errors",
    "anygen.features",
    "anygen.files",
    "anygen.graphs",
    "anygen.hub",
    "anygen.image",
    "anygen.kept",
    "anygen.manifest",
    "anygen.media",
    "anygen.media_base",
    "anygen.messages",
    "anygen.metadata",
    "anygen.model_config",
    "anygen.preset_parts",
    "anygen.presets",
    "anygen.progress",
    "anygen.registry",
    "anygen.smollm2",
    "anygen.sources",
    "anygen.stepwise",
    "anygen.wheels",
}
"""Every other module of anygen/ is the roof."""

AT_USE_ONLY = {
    "av": "needed for clips alone, and not on every machine that trains",
    "gguf": "needed once, by the conversion",
    "huggingface_hub": "0.5 s",
    "OpenEXR": "not among the requirements",
    "platformdirs": "needed by the cache alone",
    "pydantic": "0.2 s",
    "resvg_py": "not among the requirements",
    "soundfile": "needed for sound files alone, and not on every machine that trains",
}
"""Packages that are imported inside the function that needs them, everywhere, and why."""


def modules() -> dict[str, Path]:
    """Every module of ours by the name it is imported under."""
    found = {f"anygen.{path.stem}": path for path in (ROOT / "anygen").glob("*.py")}
    for folder in (*COMPONENTS, "training"):
        found |= {f"anygen.{folder}.{path.stem}": path for path in (ROOT / folder).glob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in sorted(found.items())}


MODULES = modules()


def imported(path: Path, *, at_import: bool = False) -> Iterator[str]:
    """What a file imports: all of it, or only what runs when the file itself is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            # `from anygen import hub` names a module by its second half
            yield from {f"{package}.{a.name}" if f"{package}.{a.name}" in MODULES else package for a in node.names}
        inner = at_import and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        )
        if not inner:
            todo += ast.iter_child_nodes(node)


def folder_of(module: str) -> str:
    """ "encoders", …, "training", "ground" or "roof"."""
    second = module.split(".")[1] if "." in module else ""
    if second in (*COMPONENTS, "training"):
        return second
    return "ground" if module in GROUND else "roof"


def ours(path: Path, *, at_import: bool = False) -> set[str]:
    return {name for name in imported(path, at_import=at_import) if name.split(".")[0] == "anygen"}


def test_the_ground_floor_exists_as_listed() -> None:
    assert set(MODULES) >= GROUND


@pytest.mark.parametrize("module", [name for name in MODULES if folder_of(name) == "ground"])
def test_the_ground_floor_knows_nothing_above_it(module: str) -> None:
    assert {folder_of(name) for name in ours(MODULES[module])} <= {"ground"}


@pytest.mark.parametrize("module", [name for name in MODULES if folder_of(name) in COMPONENTS])
def test_a_component_knows_the_ground_floor_and_its_own_folder(module: str) -> None:
    allowed = {"ground", folder_of(module)}
    assert {name for name in ours(MODULES[module]) if folder_of(name) not in allowed} == set()


@pytest.mark.parametrize("module", [name for name in MODULES if folder_of(name) == "roof"])
def test_the_roof_does_not_know_training_unless_a_command_starts_it(module: str) -> None:
    at_import = module.startswith("anygen.cli")  # its train, eval and data commands import training when called
    assert {name for name in ours(MODULES[module], at_import=at_import) if folder_of(name) == "training"} == set()


@pytest.mark.parametrize("module", MODULES)
def test_packages_that_may_be_absent_or_are_slow_are_imported_at_use(module: str) -> None:
    first = {name.split(".")[0] for name in imported(MODULES[module], at_import=True)}
    assert first & set(AT_USE_ONLY) == set()


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_absolute_and_name_the_package(module: str) -> None:
    bare = {name for name in imported(MODULES[module]) if name.split(".")[0] in (*COMPONENTS, "training")}
    assert bare == set(), "import these as anygen.<folder>"


LIGHT = [
    "anygen",
    "anygen.cli",
    "anygen.hub",
    "anygen.media",
    "anygen.messages",
    "anygen.presets",
    "anygen.registry",
]


def test_the_light_modules_import_nothing_heavy() -> None:
    names = [name for name in LIGHT if name in MODULES]
    heavy = {"torch", "transformers", "diffusers", "peft", "accelerate", "scipy", "pydantic", "huggingface_hub"}
    code = (
        f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\nprint({heavy} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (run.stdout.strip(), run.stderr) == ("set()", "")
