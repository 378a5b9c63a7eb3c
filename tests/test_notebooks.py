"""Every notebook runs from its first cell to its last, on the model that ships."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIMIT = 300
"""Seconds a cell may take on a busy machine before the kernel is stopped."""
PARAMETERS = {"STEPS": "1"}
"""What the test puts into the cell tagged "parameters": one step is enough."""
MORE = {"04_teach_it_a_new_sense": {"COUNT": "16"}}
"""Notebook -> further names that are shortened there."""
SHOWS = {"02_any_to_any": ("<video", "<audio"), "03_what_the_model_sees": ("<svg", "<audio")}
"""Notebook -> what it shows beside pictures."""


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, embedded_default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    if path.stem in SHOWS and (lacks := sorted({"video", "audio"} - set(_outputs(embedded_default)))):
        pytest.skip(f"the embedded default of this checkout makes no {' and no '.join(lacks)}")
    notebook = nbformat.read(path, as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in (PARAMETERS | MORE.get(path.stem, {})).items():
        assert f"{name} = " in parameters.source
        parameters.source += f"\n{name} = {value}"
    examples = [str(project.parent) for project in sorted((ROOT / "examples").glob("*/pyproject.toml"))]
    given = filter(None, [os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *examples, *given]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    folder = tmp_path / "folder"
    folder.mkdir()
    NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": str(folder)}}).execute()
    said = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    grumbles = [output.text for output in said if output.get("name") == "stderr" and output.text.strip()]
    assert not [text for text in grumbles if "IProgress not found" not in text]  # that one is tqdm's, about Jupyter
    shown = "".join(output.get("data", {}).get("text/html", "") for output in said)
    assert [tag for tag in ("<img", *SHOWS.get(path.stem, ())) if tag not in shown] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_what_it_printed(path: Path) -> None:
    import nbformat

    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not [cell for cell in cells if cell.outputs or cell.execution_count is not None]


def _outputs(directory: Path) -> list[str]:
    from anygen.model_config import AnyGenConfig

    return list(AnyGenConfig.load(directory / "anygen.json").outputs)
