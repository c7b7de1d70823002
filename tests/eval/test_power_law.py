"""Power-law fits: known coefficients come back, and the error messages name the key."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from eval.scaling import power_law

TRUE = power_law.PowerLaw(1.7, 9.0, 0.42)


def curve(noise=0.0, points=60, seed=0):
    steps = np.geomspace(20, 20_000, points)
    rng = np.random.default_rng(seed)
    return steps, TRUE(steps) * np.exp(noise * rng.normal(size=points))


def test_exact_points_give_exact_coefficients():
    law = power_law.fit(*curve())
    np.testing.assert_allclose(law, TRUE, rtol=1e-5)


def test_outliers_hardly_move_the_fit():
    steps, losses = curve()
    losses[[10, 30, 45]] *= 1.5
    np.testing.assert_allclose(power_law.fit(steps, losses), TRUE, rtol=0.05)


def test_bootstrap_interval_covers_the_truth():
    steps, losses = curve(noise=0.01)
    law = power_law.fit(steps, losses)
    samples = power_law.bootstrap(steps, losses, law, draws=60, seed=1)
    low, high = np.quantile(samples, (0.02, 0.98), axis=0)
    assert (low < TRUE).all() and (high > TRUE).all()
    again = power_law.bootstrap(steps, losses, law, draws=60, seed=1)
    np.testing.assert_array_equal(samples, again)


def test_fit_refuses_what_has_no_logarithm():
    with pytest.raises(ValueError, match="positive steps and losses"):
        power_law.fit([1, 2, 3, 4], [1.0, 0.5, 0.0, 0.2])


def test_thin_takes_means_in_log_bins():
    steps, values = power_law.thin(np.arange(1.0, 1001.0), np.ones(1000), 20)
    assert len(steps) <= 20 and (np.diff(steps) > 0).all() and (values == 1).all()


def write_run(path, noise=0.01):
    steps, losses = curve(noise, points=300)
    rows = [{"step": int(s), "train/loss": x} for s, x in zip(steps, losses)]
    rows.insert(5, {"step": 31, "eval/captioning/test_loss": 3.0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fit_config(path, **options):
    defaults = dict(
        source=str(path), key="train/loss", skip=20, points=80, held_out=0.2, bootstrap=20,
        forecast=4.0,
    )  # fmt: skip
    return ConfigDict(dict(seed=0, fit=defaults | options))


def test_evaluator_reads_a_run_and_forecasts(tmp_path):
    write_run(tmp_path / "metrics.jsonl")
    evaluate = power_law.build(fit_config(tmp_path / "metrics.jsonl"))
    metrics = evaluate(None, None, step=0, rng=None, workdir=tmp_path / "out")
    assert metrics["exponent"] == pytest.approx(TRUE.exponent, rel=0.15)
    assert metrics["held_out_error"] < 0.02
    assert metrics["forecast"] == pytest.approx(TRUE(metrics["forecast_step"]), rel=0.03)
    assert metrics["forecast_low"] <= metrics["forecast"] <= metrics["forecast_high"]
    assert (tmp_path / "out" / "power_law.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(source="absent.jsonl"), "config.fit.source='absent.jsonl'"),
        (dict(key="train/nothing"), "config.fit.key='train/nothing'.*train/loss"),
        (dict(skip=19_000), "config.fit.skip=19000"),
    ],
)
def test_mistakes_name_the_key(tmp_path, options, message):
    write_run(tmp_path / "metrics.jsonl")
    evaluate = power_law.build(fit_config(tmp_path / "metrics.jsonl", **options))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(None, None, step=0, rng=None, workdir=tmp_path)


@pytest.mark.parametrize("size", ["csv_25", "csv_400"])
def test_constant_rate_curves_are_forecast_within_one_percent(public_data, size):
    path = public_data("multi_power_law", size, "constant_24000.csv")
    curve = np.genfromtxt(path, delimiter=",", names=True)
    steps, losses = power_law.thin(curve["step"], curve["loss"], 60)
    shown = int(len(steps) * 0.8)
    law = power_law.fit(steps[:shown], losses[:shown])
    error = np.abs(law(steps[shown:]) / losses[shown:] - 1)
    assert error.mean() < 0.01 and 0.3 < law.exponent < 1.5
