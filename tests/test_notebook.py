"""docs/colab/uniflud.ipynb runs from top to bottom, without flags, outside the checkout."""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


def test_notebook_trains_samples_answers_and_exports(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "docs" / "colab" / "uniflud.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    client = NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    workdir = tmp_path / "runs" / "uniflud-debug"
    assert (workdir / "export" / "model.safetensors").stat().st_size > 100_000
    printed = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and output.name == "stdout"
    ]
    shown = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "display_data" and "image/png" in output.data
    ]
    assert "finished: 20 steps" in "".join(printed)
    assert "caption ja" in "".join(printed)
    assert len(shown) >= 4  # curves, contact sheets, own captions, the picture asked about
