"""The packages under `examples/` pass their own tests, in a process where they are plugins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path.parent.name for path in (ROOT / "examples").glob("*/pyproject.toml"))


def test_there_are_examples_for_both_sides() -> None:
    assert PACKAGES == ["anygen-melody", "anygen-pointcloud"]


@pytest.mark.parametrize("package", PACKAGES)
def test_an_example_passes_its_tests(package: str, embedded_default: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"examples/{package}/tests"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_an_example_is_a_package_of_its_own(package: str) -> None:
    folder = ROOT / "examples" / package
    assert (folder / "README.md").is_file() and list((folder / "tests").glob("test_*.py"))
    for weights in folder.rglob("*.safetensors"):
        assert weights.stat().st_size < 2_000_000
