"""Model ladders: the published fits to four digits, other targets, synthetic recovery, warnings.

Names carry the number of the acceptance check in the specification of arXiv 2412.04403.
"""

import csv
import json
import shutil

import numpy as np
import pytest
from scipy.optimize import curve_fit, minimize

from configs.common import load_config
from configs.loading import ROOT
from eval.scaling import fitting, ladder, ladder_data, ladder_laws, ladder_report

# Step 1 (a, b, alpha, beta, E); loss true, predicted; step 2 (a, L0, k, b); score true, chained,
# from the true loss, through FLOPs; standard error of the chained score.
PUBLISHED = {
    "MMLU": ((3.6394, 4.6061, 0.2262, 0.2361, 0.4541), (0.7770, 0.7869),
             (-0.7421, 0.6160, 4.8334, 1.0), (49.01, 48.38, 49.14, 46.66), 4.76),
    "HellaSwag": ((2.4187, 4.1005, 0.1955, 0.2565, 0.5019), (0.6732, 0.6713),
                  (-0.7301, 0.7667, 12.7417, 0.9921), (81.35, 82.52, 82.21, 79.78), 1.58),
    "ARC-C": ((13.4631, 3.6492, 0.7877, 0.1970, 0.6546), (0.7424, 0.7941),
              (-0.7777, 0.7086, 5.9106, 1.0), (61.95, 51.50, 57.25, 55.24), 9.97),
    "ARC-E": ((11.2824, 8.2834, 0.6610, 0.4195, 0.5582), (0.5330, 0.6038),
              (-0.6463, 0.7407, 4.1298, 1.0), (84.55, 76.59, 80.76, 79.15), 3.93),
    "PIQA": ((6.0055, 2.3184, 0.3978, 0.1533, 0.7217), (0.9088, 0.8903),
             (-0.4586, 0.9630, 5.0330, 1.0), (82.05, 81.22, 80.18, 81.21), 0.96),
    "CSQA": ((4.0405, 2.3894, 0.2350, 0.1111, 0.0), (0.8069, 0.7123),
             (-0.8556, 1.1313, 2.2085, 1.0), (72.65, 75.71, 71.92, 75.96), 0.95),
    "SocialIQA": ((7.0909, 8.9743, 0.4473, 0.4768, 0.9489), (0.9629, 1.0045),
                  (-0.5985, 0.8938, 7.1644, 0.9995), (59.93, 58.74, 62.76, 57.55), 2.03),
    "OpenBookQA": ((11.3661, 4.9225, 0.6865, 0.2607, 1.1981), (1.2683, 1.2848),
                   (-0.7906, 1.0813, 4.3097, 1.0), (49.40, 44.17, 45.35, 45.84), 5.16),
}  # fmt: skip
SIZES = {"190M": 190_354_176, "370M": 371_262_464, "760M": 758_220_288, "1B": 1_279_395_840}


def options(listed="", folder="", **more):
    config = load_config(f"configs/ladder.py:fit,runs={listed or 'x.json'},folder={folder}")
    with config.unlocked():
        config.fit.update(**more)
    return config.fit


@pytest.fixture(scope="module")
def folder(public_data):
    return public_data("model_ladders")


@pytest.fixture(scope="module")
def published(folder):
    """{task: (laws, prediction)} of the 7B target, and the means over tasks."""
    chosen = options(folder / "final_7b_only.json", folder / "ladder-runs")
    tasks = ladder_data.make_tasks(chosen.tasks)
    found, targets = ladder.analyse(ladder_data.read(chosen), tasks, chosen)
    means = ladder_report.errors(found, targets)
    return {laws.task.name: (laws, p[0], targets[0]) for laws, p in found}, means


@pytest.mark.parametrize("task", PUBLISHED)
def test_check_1_both_steps_to_the_published_digits(published, task):
    step_1, losses, step_2, scores, _ = PUBLISHED[task]
    laws, found, target = published[0][task]
    np.testing.assert_allclose(laws.loss.theta, step_1, atol=2e-3)
    np.testing.assert_allclose(laws.score.theta, step_2, atol=2e-3)
    np.testing.assert_allclose((target.loss[task], found["loss"]), losses, atol=1e-4)
    percent = 100 * np.array((target.score[task], found["score"], found["score_from_true_loss"]))
    np.testing.assert_allclose(percent, scores[:3], atol=0.02)
    assert len(laws.data.losses) == 1401 and len(laws.data.loss) == 16


def test_check_1_and_2_means_over_the_tasks(published):
    means = published[1]
    assert means["score_points"] == pytest.approx(3.82, abs=0.005)
    assert 100 * means["score_relative_error"] == pytest.approx(5.85, abs=0.005)
    assert means["flops_score_points"] == pytest.approx(3.27, abs=0.005)
    assert 100 * means["flops_score_relative_error"] == pytest.approx(5.09, abs=0.005)
    assert 100 * means["loss_relative_error"] == pytest.approx(5.2, abs=0.06)
    assert 100 * means["score_from_true_loss_relative_error"] == pytest.approx(3.7, abs=0.06)
    # Section 5, sign (i): two steps beat one.
    assert means["score_points"] < means["single_score_points"]


@pytest.mark.parametrize("task", PUBLISHED)
def test_check_2_flops_variant(published, task):
    found = published[0][task][1]
    assert 100 * found["flops_score"] == pytest.approx(PUBLISHED[task][3][3], abs=0.02)


def test_check_7_jackknife_over_runs(published):
    """Errors to 0.1 points; the truth inside for 6 of 8, and the report says why of the others."""
    outside = []
    for task, (*_, error) in PUBLISHED.items():
        _, found, target = published[0][task]
        assert 100 * found["score_error"] == pytest.approx(error, abs=0.1)
        low, high = found["loss_interval"][1:3]
        reach = 1.6449 * found["loss_error"]  # 90 %
        np.testing.assert_allclose(
            (low, high), found["loss"] + np.array((-reach, reach)), rtol=1e-4
        )
        said = " ".join(found["warnings"])
        if not found["interval"].low <= target.score[task] <= found["interval"].high:
            outside.append(task)
            assert "model error: the true score" in said and "sampling error only" in said
        assert "D is 15.4 times the largest seen" in said
    assert outside == ["ARC-E", "CSQA"]
    assert "E = 0 is at its bound" in published[0]["CSQA"][1]["warnings"]


def by_scipy(rows, target, loss, score, chance):
    """(parameters of step 1, chained score) by scipy alone, as the authors' code does it."""
    n, d, y, x, acc = [], [], [], [], []
    mean = lambda v: np.array([np.mean(v[max(0, i - 4) : i + 1]) for i in range(len(v))])  # noqa: E731
    for size, table in rows:
        one, two = (np.array([float(r[k]) for r in table]) for k in (loss, score))
        n, y = [*n, float(size)], [*y, one[-5:].mean()]
        d.append(tokens(table[-1]))
        skip = int(np.ceil(0.1 * len(table)))
        x, acc = [*x, *mean(one[skip:])], [*acc, *mean(two[skip:])]
    n, d, y = map(np.array, (n, d, y))

    def objective(p):
        first, second = np.exp(p[0] - p[2] * np.log(n)), np.exp(p[1] - p[3] * np.log(d))
        r = np.log(first + second + p[4]) - np.log(y)
        value = np.where(abs(r) <= 1e-3, r * r / 2, 1e-3 * (abs(r) - 5e-4)).sum()
        g = np.clip(r, -1e-3, 1e-3) / (first + second + p[4])
        parts = g * first, g * second, -g * first * np.log(n), -g * second * np.log(d), g
        return value, np.array([part.sum() for part in parts])

    p = minimize(objective, (3, 6, 0.1, 0.2, 1.0), jac=True, method="L-BFGS-B",
                 bounds=[(0, None)] * 5,
                 options=dict(ftol=0, gtol=1e-10, maxiter=10**6, maxfun=10**6)).x  # fmt: skip
    curve = lambda v, a, l0, k, b: a / (1 + np.exp(-k * (v - l0))) + b  # noqa: E731
    inf = np.inf
    q, _ = curve_fit(curve, [*x, 0.0], [*acc, 1.0], (chance - 1, 0.9, 3, 1),
                     bounds=((-1, 0, 0, 0), (0, inf, inf, 1)), maxfev=10**5)  # fmt: skip
    n_t, d_t = target
    return p, curve(
        np.exp(p[0] - p[2] * np.log(n_t)) + np.exp(p[1] - p[3] * np.log(d_t)) + p[4], *q
    )


def tokens(row):
    given = row.get("throughput/total_tokens")
    return float(given) if given else float(row["_step"]) * float(row["batch_size_in_tokens"])


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", ["the 7B run's stable phase", "a rung as target"])
def test_check_3_other_targets_equal_scipy(folder, tmp_path, kind):
    """Other names, another order of files, other N, D and rows: as a reference of scipy alone."""
    source, listed = folder / "ladder-runs", {}
    names = [(s, m) for s in SIZES for m in ("10xC", "5xC", "2xC", "1xC")]
    if kind == "a rung as target":
        names = [(s, m) for s, m in names if s != "1B"]
        target, n = "1B-5xC.csv", SIZES["1B"]
    else:
        target, n = "peteish7_medlr_eval_full.csv", 7_300_000_000
    for i, (size, m) in enumerate(names):
        shutil.copy(source / f"{size}-{m}.csv", tmp_path / f"run{i}.csv")
        listed[f"rung {i}"] = dict(paths=[f"elsewhere/run{i}.csv"], mode="train", n=SIZES[size])
    shutil.copy(source / target, tmp_path / "large.csv")
    listed["large"] = dict(paths=["large.csv"], mode="eval", n=n)
    (tmp_path / "runs.json").write_text(json.dumps(listed))
    chosen = options(tmp_path / "runs.json")
    tasks = ladder_data.make_tasks([t for t in chosen.tasks if t[0] in ("HellaSwag", "PIQA")])
    runs = ladder_data.read(chosen)
    seen = [run for run in runs if not run.target]
    goal = ladder.targets_of(runs, tasks, chosen)[0]
    rows = [(SIZES[s], read_csv(source / f"{s}-{m}.csv")) for s, m in names]
    last = read_csv(source / target)
    for task in tasks:
        laws = ladder.fit(task, ladder.gather(seen, task, chosen), single=False)
        found = ladder.predict(laws, goal)
        loss, score = task.losses[0][0], task.scores[0][0]
        d = max(map(tokens, last))
        _, reference = by_scipy(rows, (n, d), loss, score, task.chance)
        assert goal.d == d and 100 * found["score"] == pytest.approx(100 * reference, abs=0.02)
        true = np.mean([float(r[score]) for r in last[-5:]])
        assert goal.score[task.name] == pytest.approx(true, abs=1e-12)


THETA = np.array([4.6, 6.1, 0.28, 0.3, 0.55])


def known(n, d):
    return (
        np.exp(THETA[0] - THETA[2] * np.log(n)) + np.exp(THETA[1] - THETA[3] * np.log(d)) + THETA[4]
    )


def synthetic(noise, seed, sizes, multipliers):
    n, m = (x.reshape(-1) for x in np.meshgrid(sizes, multipliers, indexing="ij"))
    draw = np.random.default_rng(seed).normal(size=len(n))
    return n, 20 * n * m, known(n, 20 * n * m) * np.exp(noise * draw)


def test_check_5_recovery_of_known_parameters():
    """0.3 % noise, two decades of sizes: exponents within 10 %, ten times N and D within 1 %.

    The published design of 16 runs cannot give that: its exponents scatter by 10 to 40 % at this
    noise (docs/results/ladder.md), whatever the starts.
    """
    wide = np.geomspace(2e7, 2e9, 8), np.geomspace(0.5, 64, 8)
    for seed in range(5):
        n, d, y = synthetic(0.003, seed, *wide)
        fit = ladder_laws.fit_loss(n, d, y)
        assert (np.abs(fit.theta[2:4] / THETA[2:4] - 1) < 0.1).all(), fit
        far = 10 * n.max(), 10 * d.max()
        assert ladder_laws.evaluate(ladder_laws.loss_law, fit, *far) == pytest.approx(
            known(*far), rel=0.01
        )
    exact = ladder_laws.fit_loss(*synthetic(0.0, 0, list(SIZES.values()), (1, 2, 5, 10)))
    np.testing.assert_allclose(exact.theta, THETA, rtol=1e-4)


def test_noise_screening_equals_the_published_table(folder):
    """Standard deviation of the last ten evaluations of the largest, longest run."""
    published = {row["Task"]: float(row["Loss SD"])
                 for row in read_csv(folder / "figures" / "variance.csv")}  # fmt: skip
    chosen = options(folder / "final_7b_only.json", folder / "ladder-runs")
    seen = [run for run in ladder_data.read(chosen) if not run.target]
    names = dict(zip(PUBLISHED, ("MMLU", "HellaSwag", "ARC-Challenge", "ARC-Easy", "PIQA",
                                 "CommonsenseQA", "Social IQa", "OpenBookQA")))  # fmt: skip
    for task in ladder_data.make_tasks(chosen.tasks):
        ours = ladder.noise(seen, task)[0]
        assert ours == pytest.approx(published[names[task.name]], rel=1e-9)


def test_c4_loss_as_the_intermediate(published, folder):
    """Section 5, sign (ii), that the chained error is larger through C4's loss, is not reproduced:
    it is on half of the tasks, and smaller in the mean (docs/results/ladder.md)."""
    config = load_config(f"configs/ladder.py:fit,runs={folder / 'final_7b_only.json'},loss=c4")
    config.fit.folder = str(folder / "ladder-runs")
    runs = ladder_data.read(config.fit)
    seen, tasks = [r for r in runs if not r.target], ladder_data.make_tasks(config.fit.tasks)
    goal, worse, errors = ladder.targets_of(runs, tasks, config.fit)[0], 0, []
    for task in tasks:
        laws = ladder.fit(task, ladder.gather(seen, task, config.fit), single=False)
        through = abs(ladder.predict(laws, goal)["score"] - goal.score[task.name])
        own = abs(published[0][task.name][1]["score"] - goal.score[task.name])
        worse += through > own
        errors.append(100 * through)
    assert worse == 4 and np.mean(errors) == pytest.approx(2.00, abs=0.05)


def test_a_folder_of_two_families_is_not_one_ladder(tmp_path):
    """Largest size of the named family held out, the other left out; without a name refused."""
    made = {"a/llama": "configs/ladder.py:31k", "b/llama": "configs/ladder.py:49k",
            "c/xlstm": "configs/densing.py:xlstm"}  # fmt: skip
    for name, spec in made.items():
        config = load_config(spec)
        config.model.vocab_size = 512
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(config.to_json_best_effort())
        rows = [{"step": s, "train/loss": 1.0, "eval/ranked/order_bpb": 2 / s} for s in (5, 10)]
        log = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(log)

    def read(family="", where=tmp_path):
        return ladder_data.read(
            load_config(f"configs/ladder.py:fit,runs={where},family={family}").fit
        )

    with pytest.raises(ValueError, match="config.fit.family='': the runs are of llama, xlstm; "):
        read()
    with pytest.raises(ValueError, match="config.fit.family='hymba': the runs are of llama, xl"):
        read("hymba")
    runs = read("llama")
    assert [(run.name, run.target) for run in runs] == [("a/llama", False), ("b/llama", True)]
    assert [run.name for run in read("xlstm")] == ["c/xlstm"]
    ladder_data.save(tmp_path / "saved", runs)  # one family: no name needed
    for run, again in zip(runs, read(where=tmp_path / "saved"), strict=True):
        assert (run.name, run.n, run.c, run.target) == (again.name, again.n, again.c, again.target)
        assert again.table["eval/ranked/order_bpb"].tolist() == [0.4, 0.2]
    with pytest.raises(ValueError, match="config.fit.family='': the runs are of hymba, llama, xl"):
        read(where=ROOT / "docs" / "results" / "ladder")


def test_mistakes_are_named(folder, tmp_path):
    listed = folder / "final_7b_only.json"
    with pytest.raises(FileNotFoundError, match="config.fit.runs='absent.json' must be"):
        ladder_data.read(options("absent.json"))
    with pytest.raises(FileNotFoundError, match="190M-1xC.csv.*config.fit.folder=''"):
        ladder_data.read(options(listed))
    chosen = options(
        listed, folder / "ladder-runs", tasks=(("x", (("a", 1.0),), (("b", 1.0),), 0.5),)
    )
    runs = ladder_data.read(chosen)
    with pytest.raises(
        ValueError, match="config.fit.tasks: run 'peteish7_eval_anneal' has no column 'a'"
    ):
        ladder.analyse(runs, ladder_data.make_tasks(chosen.tasks), chosen)
    (tmp_path / "bad.json").write_text('{"x": {"paths": []}}')
    with pytest.raises(ValueError, match="'x' needs n, paths and mode"):
        ladder_data.read(options(tmp_path / "bad.json"))
    with pytest.raises(ValueError, match="unknown config argument loss 'c5'"):
        load_config("configs/ladder.py:fit,runs=a.json,loss=c5")
    with pytest.raises(fitting.FitError, match="5 parameters and 3 runs"):
        ladder_laws.fit_loss([1.0, 2, 3], [1.0, 2, 3], [1.0, 2, 3])
