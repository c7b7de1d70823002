"""The report of `runs`: newest evaluations, grouped by name, spread over seeds."""

import json

import pytest
from ml_collections import ConfigDict

from eval import EVALUATORS


def config_of(runs=(), **table):
    table = dict(metrics=("",)[:0], title="lambda sweep") | table
    return ConfigDict(dict(runs=runs, evaluation=dict(table=table)))


@pytest.fixture
def workdir(tmp_path):
    for lam, values in (("0.05", (0.2, 0.3)), ("0.005", (0.4, 0.6)), ("1", (0.1, 0.1))):
        for seed, value in enumerate(values):
            folder = tmp_path / f"lam_{lam}" / f"seed{seed}" / "eval"
            folder.mkdir(parents=True)
            old = {"step": 5, "accuracy/top1": 0.0}
            new = {"step": 10, "accuracy/top1": value, "accuracy/top1_chance": 1 / 64}
            new |= {"captioning/loss": 1.0 - value, "captioning/seconds": 3.0}
            (folder / "5.json").write_text(json.dumps(old))
            (folder / "10.json").write_text(json.dumps(new))
    return tmp_path


def report(config, workdir):
    metrics = EVALUATORS["ablation_table"](config)(None, None, step=0, rng=None, workdir=workdir)
    return metrics, json.loads((workdir / "report.json").read_text())


def test_means_and_spreads_over_seeds(workdir):
    metrics, data = report(config_of(), workdir)
    assert metrics == {"groups": 3.0, "runs": 6.0}
    assert list(data["groups"]) == ["lam_0.005", "lam_0.05", "lam_1"]  # by value
    cell = data["groups"]["lam_0.005"]["accuracy/top1"]
    assert cell["mean"] == pytest.approx(0.5) and cell["std"] == pytest.approx(0.02**0.5)
    assert set(data["groups"]["lam_1"]) == {"accuracy/top1", "captioning/loss"}
    assert data["levels"] == {"chance": {"accuracy/top1": pytest.approx(1 / 64)}}
    text = (workdir / "report.md").read_text()
    assert "| lam_0.005 | 2 | 0.5 ± 0.14 | 0.5 ± 0.14 |" in text and "*chance*" in text
    assert (workdir / "report.png").stat().st_size > 1000


def test_order_of_the_config_is_kept(workdir):
    runs = (("lam_1/seed0", "c", ()), ("lam_0.05/seed1", "c", ()))
    _, data = report(config_of(runs, metrics=("captioning/loss",)), workdir)
    assert list(data["groups"]) == ["lam_1", "lam_0.05"]
    assert data["groups"]["lam_1"]["captioning/loss"]["std"] is None


def test_mistakes_name_the_run_or_the_metric(workdir, tmp_path):
    with pytest.raises(FileNotFoundError, match="'lam_7/seed0'.*no eval"):
        report(config_of((("lam_7/seed0", "c", ()),)), workdir)
    with pytest.raises(ValueError, match="metrics='kid/kid': runs have accuracy/top1"):
        report(config_of(metrics=("kid/kid",)), workdir)


def test_what_training_logged_last_is_a_column(workdir):
    """Of runs that log it; the report's own choice of columns leaves it out."""
    for lam, usage in (("0.05", (0.5, 0.7)), ("1", (0.9, 0.9))):
        for seed, value in enumerate(usage):
            rows = [{"step": i, "train/loss": 1.0, "train/usage": value * i / 2} for i in (1, 2)]
            rows.append({"step": 2, "eval/accuracy/top1": 0.1})
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (workdir / f"lam_{lam}/seed{seed}/metrics.jsonl").write_text(lines)
    _, data = report(config_of(metrics=("accuracy/top1", "train/usage")), workdir)
    assert data["groups"]["lam_0.05"]["train/usage"]["mean"] == pytest.approx(0.6)
    assert data["groups"]["lam_0.005"]["train/usage"] is None
    assert "| lam_0.005 | 2 | 0.5 ± 0.14 |  |" in (workdir / "report.md").read_text()
    (workdir / "lam_1/seed1/metrics.jsonl").unlink()  # no group whole: an empty panel
    (workdir / "lam_0.05/seed1/metrics.jsonl").unlink()
    _, data = report(config_of(metrics=("train/usage",)), workdir)
    assert {g["train/usage"] for g in data["groups"].values()} == {None}
    report(config_of(), workdir)
    assert "train/" not in (workdir / "report.md").read_text()
