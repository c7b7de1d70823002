"""The notebooks in docs/colab run from top to bottom, without flags, outside the checkout."""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


def execute(name, folder, monkeypatch) -> tuple[str, int]:
    """What the cells printed, and how many pictures they showed."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "docs" / "colab" / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    client = NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = [o.text for o in outputs if o.output_type == "stream" and o.name == "stdout"]
    shown = [o for o in outputs if o.output_type == "display_data" and "image/png" in o.data]
    return "".join(printed), len(shown)


def test_uniflud_trains_samples_answers_and_exports(tmp_path, monkeypatch):
    printed, shown = execute("uniflud.ipynb", tmp_path, monkeypatch)
    workdir = tmp_path / "runs" / "uniflud-debug"
    assert (workdir / "export" / "model.safetensors").stat().st_size > 100_000
    assert "finished: 20 steps" in printed and "caption ja" in printed
    assert shown >= 4  # curves, contact sheets, own captions, the picture asked about


def test_infinity_trains_and_shows_pictures_grow(tmp_path, monkeypatch):
    printed, shown = execute("infinity.ipynb", tmp_path, monkeypatch)
    assert "finished: 20 steps" in printed and "bits/train_accuracy" in printed
    assert "(4, 4, 32, 32, 3) ['1x1', " in printed  # scales, captions, pixels
    assert shown >= 3  # contact sheets, the growing pictures
