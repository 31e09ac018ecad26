"""The example notebook, executed by a Jupyter kernel as a reader runs it."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.server import REPOSITORY

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NOTEBOOK = REPOSITORY / "docs" / "examples" / "python-api.ipynb"


def results(notebook):
    """The plain text of the last value of each code cell, without cells that have none."""
    return [
        output["data"]["text/plain"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]


def test_the_notebook_runs_from_top_to_bottom(workspace):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    client = NotebookClient(
        notebook, timeout=380, kernel_name="python3", resources={"metadata": {"path": workspace}}
    )
    client.execute()
    _, accuracy, _, predicted, _, live, feedback, study = results(notebook)
    assert 0.6 < float(accuracy) < 1
    assert "dtype=object" in predicted
    assert 0.6 < float(live) < 1
    assert "'counted': True" in feedback
    assert "valid_accuracy" in study
    assert (workspace / "runs").is_dir()
