"""The committed notebook runs from data_results/ alone, and shows what it did when it was committed."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


def test_the_notebook_runs_and_is_committed_with_its_outputs():
    notebook = nbformat.read(ROOT / "Analysis.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    figures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(figures) >= 4
    assert all(output.metadata["image/png"].get("alt") for output in figures)  # what a screen reader says
