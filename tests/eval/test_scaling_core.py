"""The shared core of the laws: fits, intervals, the reader, the report writer."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from eval.scaling import curves, fitting, intervals, report


def line(theta, x):
    return theta[0] + theta[1] * x


def line_loss(theta, x, y):
    return fitting.huber(line(theta, x) - y, 1e-3).sum()


def data(noise=0.0, seed=0):
    x = np.linspace(0, 1, 40)
    return x, 2.0 + 3.0 * x + noise * np.random.default_rng(seed).normal(size=40)


def test_huber_by_hand():
    found = fitting.huber(jnp.array([0.5, -1.0, -3.0]), 1.0)
    np.testing.assert_allclose(found, [0.125, 0.5, 2.5])


@pytest.mark.parametrize("bounds", [None, [(0, None), (0, 10)]])
def test_both_optimisers_find_a_line_despite_an_outlier(bounds):
    x, y = data()
    y[7] += 5
    starts = fitting.grid((0.5, 1.0), (1.0, 5.0))
    for fit in (
        fitting.minimise(line_loss, starts, args=(x, y), names=("a", "b"), bounds=bounds),
        fitting.curve_fit(line, x, y, starts, names=("a", "b"), bounds=bounds, delta=1e-3),
    ):
        np.testing.assert_allclose(fit.theta, [2, 3], atol=2e-4)
        assert fit.at_bound == () and fit.starts == 4 and fit.theta.dtype == np.float64
        assert fit.values.keys() == {"a", "b"}


def test_curve_fit_equals_scipys():
    from scipy.optimize import curve_fit

    x, y = data(0.3)
    bounds = [(0, 10), (None, 2.0)]  # the slope ends at its bound
    fit = fitting.curve_fit(line, x, y, [1.0, 1.0], bounds=bounds, names=("a", "b"))
    wanted, _ = curve_fit(
        lambda x, a, b: a + b * x, x, y, p0=[1.0, 1.0], bounds=([0, -np.inf], [10, 2.0])
    )
    np.testing.assert_allclose(fit.theta, wanted, rtol=1e-6)
    assert fit.at_bound == ("b",) and "b = 2 is at its bound" in fit.problems


def test_own_gradient_and_options_reach_scipy():
    def loss(theta):
        return float(theta @ theta), 2 * theta

    fit = fitting.minimise(loss, [3.0, -1.0], jac="self", bounds=[(1.0, None), (None, None)])
    np.testing.assert_allclose(fit.theta, [1, 0], atol=1e-9)
    assert fit.names == ("p0", "p1") and fit.at_bound == ("p0",)
    with pytest.raises(fitting.FitError, match="none of 1 starts converged.*LIMIT"):
        fitting.minimise(line_loss, [9.0, 9.0], args=data(), maxiter=1)


def test_a_fit_without_a_finite_value_fails_loudly():
    with pytest.raises(fitting.FitError, match="none of 2 starts"):
        fitting.minimise(lambda t: jnp.log(t[0]) + t[0], [[-1.0], [-2.0]])


def test_lonely_minimum_is_reported():
    def loss(theta):
        return jnp.sin(3 * theta[0]) + 0.1 * theta[0] ** 2

    fit = fitting.minimise(loss, [[-0.4], [1.4], [3.2]])
    assert fit.agreeing == 1 and "only 1 of 3 starts" in fit.problems[0]


def test_float64_stays_inside():
    with fitting.float64():
        assert jnp.ones(2).dtype == jnp.float64
    assert jnp.ones(2).dtype == jnp.float32


def test_bootstrap_of_a_mean_has_its_standard_error():
    x = np.random.default_rng(0).normal(size=400)
    refit = lambda index: x[index].mean()  # noqa: E731
    samples = intervals.bootstrap(refit, 400, draws=500, seed=1)
    assert samples.std() == pytest.approx(x.std() / 20, rel=0.15)
    found = intervals.interval(x.mean(), samples)
    assert found.low < found.value < found.high and found.level == 0.9
    np.testing.assert_array_equal(samples, intervals.bootstrap(refit, 400, draws=500, seed=1))
    groups = np.repeat(np.arange(4), 100)  # constant groups: only whole ones are drawn
    means = intervals.bootstrap(
        lambda index: groups[index].mean(), 400, draws=50, seed=0, groups=groups
    )
    assert np.allclose(means * 4, np.round(means * 4))


def test_blocks_keep_neighbours():
    index = intervals.blocks(np.random.default_rng(0), 100, 10)
    assert len(index) == 100 and (np.diff(index.reshape(10, 10)) == 1).all()


def test_bootstrap_refuses_when_most_refits_fail():
    def refit(index):
        raise fitting.FitError("no")

    with pytest.raises(fitting.FitError, match="5 of 5 bootstrap refits failed"):
        intervals.bootstrap(refit, 3, draws=5, seed=0)


def test_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).normal(size=12)
    groups = [f"run {i}" for i in range(12)]
    found = intervals.jackknife(lambda index: x[index].mean(), groups)
    assert found.standard_error == pytest.approx(x.std(ddof=1) / 12**0.5)
    assert found.groups == tuple(groups) and found.estimates.shape == (12,)
    low, high = found.interval(1.0, level=0.9)[1:3]
    assert high - 1.0 == pytest.approx(1.6449 * found.standard_error, rel=1e-3) and low < 1.0
    with pytest.raises(fitting.FitError, match="at least 2 groups"):
        intervals.jackknife(lambda index: 0.0, ["a", "a"])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.csv").write_text("step,lr,loss,note\n2,0.1,3.5,x\n1,0.2,4.0,\n3,0.1,,y\n")
    run = tmp_path / "group" / "seed0"
    (run / "eval").mkdir(parents=True)
    rows = [{"step": s, "loss": 5.0 / s} for s in (1, 2, 3)]
    rows.insert(1, {"step": 2, "eval/acc": 0.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 4')
    (run / "config.json").write_text('{"steps": 3}')
    for step in (5, 10):
        (run / "eval" / f"{step}.json").write_text(json.dumps({"step": step, "acc": step / 10}))
    return tmp_path


def test_reader_takes_csv_runs_folders_lists_and_patterns(folder):
    found = curves.read_curves(folder, y="loss")
    assert list(found) == ["a", "seed0"]
    a, run = found.values()
    np.testing.assert_array_equal([a.steps, a.values], [[1, 2], [4.0, 3.5]])  # sorted, no gaps
    np.testing.assert_array_equal(a.table["lr"], [0.2, 0.1])
    assert list(a.table["note"]) == ["", "x"] and a.config is None
    assert run.config == {"steps": 3} and len(run.steps) == 3
    named = f"{folder}/a.csv,{folder}/group/seed0"
    assert list(curves.read_curves(named, y="loss")) == ["a", "seed0"]
    assert len(curves.find([f"{folder}/*.csv"])) == 1
    assert curves.evaluations(folder / "group/seed0")["acc"] == 1.0
    assert curves.evaluations(folder) is None


def test_runs_of_the_same_seed_get_names_of_their_own(folder):
    other = folder / "other" / "seed0"
    other.mkdir(parents=True)
    (other / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    names = list(curves.read_curves([str(folder / "group"), str(folder / "other")], y="loss"))
    assert names == ["group/seed0", "other/seed0"]


def test_reader_mistakes_name_the_setting(folder):
    with pytest.raises(ValueError, match="config.fit.key='los': .*a.csv has only step, lr, loss"):
        curves.read_curve(folder / "a.csv", y="los")
    with pytest.raises(FileNotFoundError, match="config.fit.source='nowhere'"):
        curves.find("nowhere")
    with pytest.raises(ValueError, match="must end in one of"):
        (folder / "x.txt").write_text("1")
        curves.read_table(folder / "x.txt")


def test_bins_are_means_of_neighbours_up_to_the_end():
    steps, values = curves.bins(np.arange(1.0, 8.0), np.arange(1.0, 8.0) ** 2, 3)
    np.testing.assert_allclose(steps, [3, 6])
    np.testing.assert_allclose(values, [(4 + 9 + 16) / 3, (25 + 36 + 49) / 3])


def test_report_writes_json_markdown_and_pictures(tmp_path, capsys):
    estimate = intervals.Interval(np.float64(1.5), np.float64(1.0), np.float64(2.0), 0.9)
    table = report.markdown_table(("a", "b"), [("x", estimate), ("y", 0.123456)])
    assert table.splitlines()[2:] == ["| x | 1.5 [1, 2] |", "| y | 0.1235 |"]
    warn = report.problems({"fit of x": ("C is at its bound",), "y": ()})
    report.write(tmp_path, "Title", [table, warn, ""], dict(e=estimate, bad=np.inf, n=np.int64(3)))
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Title\n\n| a | b |") and "- fit of x: C is at its bound" in text
    assert text in capsys.readouterr().out
    loaded = json.loads((tmp_path / "report.json").read_text())
    assert loaded["e"]["low"] == 1.0 and loaded["bad"] is None and loaded["n"] == 3
    with report.figure(tmp_path / "plots/x.png") as figure:
        figure.subplots().plot([1, 2])
    assert (tmp_path / "plots/x.png").stat().st_size > 1000
