"""run_all: keys, files, the printed table, interruption, the task `fit`."""

import json

import jax
import pytest
from ml_collections import ConfigDict

from eval import EVALUATORS, fit, run


@pytest.fixture
def fakes(monkeypatch):
    def accuracy(config):
        return lambda model, params, *, step, rng, workdir: {
            "accuracy": params + step, "accuracy_chance": 0.25, "note": jax.numpy.float32(1.5)
        }  # fmt: skip

    monkeypatch.setitem(EVALUATORS, "first", accuracy)
    monkeypatch.setitem(EVALUATORS, "second", accuracy)


def everything(tmp_path, evals=("first", "second"), **kwargs):
    config = ConfigDict(dict(evals=evals, seed=0))
    return run.run_all(config, None, 2.0, step=7, rng=jax.random.key(0), workdir=tmp_path, **kwargs)


def test_results_are_flat_written_and_printed(fakes, tmp_path, capsys):
    results = everything(tmp_path)
    assert results["first/accuracy"] == 9.0 and results["second/note"] == 1.5
    stored = json.loads((tmp_path / "eval" / "7.json").read_text())
    assert stored == {"step": 7, **results}
    assert all(isinstance(v, int | float) for v in stored.values())
    printed = capsys.readouterr().out
    line = next(x for x in printed.splitlines() if "accuracy" in x)
    assert line.split() == ["accuracy", "9", "chance", "0.25"]
    assert "seconds" not in printed and [p.name for p in (tmp_path / "eval").iterdir()] == [
        "7.json"
    ]


def test_interruption_between_evaluators_writes_nothing(fakes, tmp_path):
    answers = iter([False, True])
    results = everything(tmp_path, interrupted=lambda: next(answers))
    assert "first/accuracy" in results and "second/accuracy" not in results
    assert not (tmp_path / "eval").exists()


def test_unknown_names_are_refused_before_anything_runs(fakes, tmp_path):
    with pytest.raises(ValueError, match="config.evals='third': allowed are captioning, "):
        everything(tmp_path, evals=("first", "third"))


def test_task_fit_needs_an_evaluator(tmp_path):
    with pytest.raises(ValueError, match=r"config.evals=\(\)"):
        fit.run(ConfigDict(dict(evals=(), seed=0)), tmp_path)
