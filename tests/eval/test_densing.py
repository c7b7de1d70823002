"""The Densing Law: closed forms, recovery, the shared table's trend, the ladder route.

Names carry the number of the acceptance check in the specification of arXiv 2412.04315.
"""

import csv
import datetime
import json
import math

import numpy as np
import pytest

from configs.common import load_config
from configs.densing_reference import REFERENCE
from eval.scaling import (
    densing,
    densing_ladder,
    densing_report,
    densing_trend,
    fitting,
    ladder_data,
    sizes,
)

GIVEN = densing.TwoStep(400, 0.34, 410, 0.28, -0.75, 6, 0.7, 1, 1e12)
COUNTS = {  # parameters of the reference models without embeddings
    "0.005b": 5_247_232,
    "0.03b": 31_470_080,
    "0.1b": 106_196_736,
    "0.2b": 245_416_960,
    "0.4b": 476_852_480,
    "0.8b": 828_225_024,
}
RATIOS = (10, 15, 20, 30, 40, 60)
FRONTIER = (
    (0, 0.14993, "llama-30b"), (144, 0.24875, "Llama-2-13b"), (160, 0.80146, "Qwen-7B"),
    (199, 0.83032, "phi-1_5"), (213, 0.94527, "Qwen-14B"), (215, 1.21047, "Mistral-7B-v0.1"),
    (251, 1.46356, "Yi-6B"), (291, 1.71179, "phi-2"), (437, 3.99204, "DeepSeek-V2"),
)  # fmt: skip


def test_check_1_closed_forms_and_round_trip():
    assert GIVEN.loss(7e9) == pytest.approx(0.358745399, abs=1e-8)
    assert GIVEN.score(7e9) == pytest.approx(0.914273169, abs=1e-8)
    for n in (1e8, 1e9, 7e9, 7e10):
        assert GIVEN.size(GIVEN.score(n)).size == pytest.approx(n, rel=1e-9)


def test_check_1_nothing_raises_at_the_ends():
    """Within 1e-12 of the ceiling, at it, beyond it, at chance, below it: a number and a flag."""
    free = GIVEN._replace(b=0.0)  # no floor of the loss: the ceiling is the score's alone
    near = [1 - 10.0**-k for k in range(3, 13)]
    losses = [free.l - (math.log(s - 0.25) - math.log(1 - s)) / free.gamma for s in near]
    reachable = [i for i, x in enumerate(losses) if x > 0]
    sizes = [free.size(near[i]).size for i in reachable]
    assert sizes == sorted(sizes) and all(map(math.isfinite, sizes))
    for s in (1 - 1e-12, 1.0, 1.3):
        assert GIVEN.size(s) == (math.inf, densing.CEILING)
    for s in (0.25, 0.1, -1.0):
        assert GIVEN.size(s) == (0.0, densing.CHANCE)
    # Precise where 1 - S has lost most digits of a direct quotient.
    steep = GIVEN._replace(b=0.0, gamma=60.0)
    loss = steep.l - (math.log1p(-0.25 - 1e-12) - math.log(1e-12)) / 60.0
    expected = (loss / 400) ** (-1 / 0.34)
    assert steep.size(1 - 1e-12).size == pytest.approx(expected, rel=1e-5)


def runs_of_the_published_grid(noise=0.0, seed=0):
    n = np.repeat(list(COUNTS.values()), len(RATIOS)).astype(float)
    d = n * np.tile(RATIOS, len(COUNTS))
    draw = np.random.default_rng(seed).normal(size=len(n))
    return n, d, (400 * n**-0.34 + 410 * d**-0.28) * np.exp(noise * draw)


def test_check_2_recovery_on_the_published_grid():
    n, d, y = runs_of_the_published_grid()
    assert len(n) == 36
    found = densing.fit_loss(n, d, y).theta
    np.testing.assert_allclose(
        (np.exp(found[0]), found[1], np.exp(found[2]), found[3]), (400, 0.34, 410, 0.28), rtol=1e-3
    )
    for seed in range(4):
        fit = densing.fit_loss(*runs_of_the_published_grid(0.005, seed))
        far, tokens = 8 * n.max(), d.max()
        with fitting.float64():
            got = float(densing.loss_law(fit.theta, far, tokens))
        assert got == pytest.approx(400 * far**-0.34 + 410 * tokens**-0.28, rel=0.01)


@pytest.mark.parametrize("name", COUNTS)
def test_check_3_parameter_counts_of_the_reference_models(name):
    """By the formula, and of the model that the config trains, without its tied embedding."""
    assert REFERENCE.keys() == COUNTS.keys() and REFERENCE[name].n == COUNTS[name]
    for ratio in (min(RATIOS), max(RATIOS)):
        config = load_config(f"configs/densing.py:{name},multiplier={ratio / 20}")
        counted = sizes.count(json.loads(config.to_json_best_effort()))
        assert counted.total - config.model.vocab_size * config.model.llama.width == COUNTS[name]
        per_step = config.batch_size * config.data.length
        assert 0 <= config.steps * per_step - ratio * COUNTS[name] < per_step
        assert config.schedule.name == "wsd" and config.model.llama.head_dim == 64


@pytest.fixture(scope="module")
def table(public_data):
    folder = public_data("densing_law")
    return folder / "base_llm_benchmark_eval_until_2024-05.csv", folder / "release_dates.csv"


def options(table, dates, **more):
    config = load_config(f"configs/densing.py:fit,table={table},dates={dates}")
    with config.unlocked():
        config.fit.update(**more)
    return config.fit


def test_check_4_trend_of_the_shared_table(table):
    chosen = options(*table)
    models = densing_report.read(chosen)
    found = densing_report.measure(models, chosen)
    np.testing.assert_allclose(found.reference[:3], (0.604002, 0.665726, 1.259459), rtol=1e-4)
    assert math.sqrt(2 * found.fit.cost / 8) == pytest.approx(0.01008, abs=1e-5)
    trend, slope, slopes = densing_report.trend_of(models, found, chosen)
    assert len(found.index) == 51 and len(trend.frontier) == len(FRONTIER)
    for i, (day, density, name) in zip(trend.frontier, FRONTIER):
        assert models.days[found.index[i]] == day
        assert name in models.names[found.index[i]]
        assert found.values[i] == pytest.approx(density, abs=1e-4)
    assert trend.a == pytest.approx(0.007943, rel=1e-3)
    assert trend.b == pytest.approx(-1.8256, abs=1e-3)
    assert trend.r2 == pytest.approx(0.8927, abs=1e-4)
    assert trend.doubling == pytest.approx(87.3, abs=0.1)
    assert len(slopes) == 2000
    assert np.median(slopes) == pytest.approx(0.0073, abs=2e-4)
    np.testing.assert_allclose((slope.low, slope.high), (0.0059, 0.0093), atol=2e-4)
    twice = densing_report.doubling(slope)
    np.testing.assert_allclose((twice.low, twice.high), (75, 117), atol=1.5)


def appended(table, tmp_path, rows):
    """The shared files with more rows (name, family, size, MMLU, date), in another order."""
    scores, dates = (list(csv.DictReader(path.open(newline=""))) for path in table)
    for name, family, size, mmlu, date in rows:
        new = dict.fromkeys(scores[0], "")
        new |= {"Model": name, "Model Family": family, "Model Size (B)": size, "MMLU": mmlu}
        scores.insert(0, new)
        dates.append({"model": name, "release_date": date, "basis": "test"})
    paths = tmp_path / "scores.csv", tmp_path / "dates.csv"
    for path, content in zip(paths, (scores, dates)):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, content[0].keys())
            writer.writeheader()
            writer.writerows(content)
    return paths


def test_check_5_newer_models_and_saturated_ones(table, tmp_path):
    """New families and dates change frontier and slope; what is above the ceiling is flagged."""
    new = (
        ("x/dense-3b", "X", 3.0, 0.70, "2024-09-19"),
        ("x/strong-72b", "X", 72.0, 0.86, "2024-09-19"),
        ("y/at-chance", "Y", 1.0, 0.2505, "2024-10-01"),
        ("z/too-early", "Z", 1.0, 0.5, "2022-05-01"),
        ("w/no-score", "W", 1.0, "", "2024-10-01"),
    )
    chosen = options(*appended(table, tmp_path, new), draws=50)
    config = load_config("configs/densing.py:fit")
    with config.unlocked():
        config.fit = chosen
    metrics = densing_report.build(config)(None, None, step=0, rng=None, workdir=tmp_path)
    models = densing_report.read(chosen)
    found = densing_report.measure(models, chosen)
    at = dict(zip(models.names[found.index], zip(found.values, found.flags)))
    assert at["x/strong-72b"] == (math.inf, densing.CEILING)
    assert at["y/at-chance"] == (0.0, densing.CHANCE)
    assert "z/too-early" not in at and "w/no-score" not in at
    trend, _, _ = densing_report.trend_of(models, found, chosen)
    last = models.names[found.index[trend.frontier[-1]]]
    assert last == "x/dense-3b" and trend.a != pytest.approx(0.007943, rel=1e-3)
    day = (datetime.date(2024, 9, 19) - datetime.date(2023, 2, 24)).days
    assert models.days[found.index[trend.frontier[-1]]] == day
    assert metrics["saturated"] == 1 and metrics["frontier"] == len(trend.frontier)
    text = (tmp_path / "densing.md").read_text()
    assert "x/strong-72b | 0.86 | inf | above reference ceiling" in text
    assert "## Sensitivity" in text and "active" in text
    assert (tmp_path / "densing.png").stat().st_size > 1000


def test_check_6_ladder_route(public_data):
    folder = public_data("model_ladders")
    runs, files = folder / "final_7b_only.json", folder / "ladder-runs"
    chosen = load_config(f"configs/densing.py:fit,runs={runs},folder={files}").fit
    rows = densing_ladder.measure(
        ladder_data.read(chosen.ladder), ladder_data.make_tasks(chosen.ladder.tasks), chosen
    )
    published = {  # at 1e12 tokens, at the target's own
        "MMLU": (2.9323, 1.1777), "HellaSwag": (1.3691, 0.7707), "PIQA": (154.7, 2.4623),
        "CSQA": (0.9205, 0.3520), "SocialIQA": (3.3358, 1.9940),
    }  # fmt: skip
    own = 3_945_065_873_408
    found = {(r["task"], r["d0"]): r for r in rows}
    for task, densities in published.items():
        for d0, density in zip((1e12, float(own)), densities):
            assert found[task, d0]["density"] == pytest.approx(density, rel=1e-3)
    for task in ("ARC-C", "ARC-E", "OpenBookQA"):
        row = found[task, 1e12]
        assert row["density"] == math.inf and row["flag"] == densing.CEILING


def test_check_7_monotone_inverse_and_free_of_units():
    scores = np.linspace(0.3, 0.9, 40)
    for reference in (GIVEN, densing.Family(0.6, 0.7, 1.26, 0.25)):
        sizes = [densing.density(reference, s, 2.0).size for s in scores]
        assert (np.diff(sizes[: sizes.index(math.inf)] if math.inf in sizes else sizes) > 0).all()
        one, ten = (densing.density(reference, 0.6, n).size for n in (1.0, 10.0))
        assert one == pytest.approx(10 * ten, rel=1e-12)
    n = np.array([0.5, 1.8, 4, 7, 14, 32, 72])
    rng = np.random.default_rng(0)
    score = 0.25 + 0.6 / (1 + np.exp(-0.7 * (np.log(n) - 1.2))) + 0.01 * rng.normal(size=7)
    billions, single = (densing.fit_family(unit * n, score, 0.25)[0] for unit in (1.0, 1e9))
    for s in (0.4, 0.6, 0.7):
        expected = densing.density(billions, s, 7.0).size
        assert densing.density(single, s, 7e9).size == pytest.approx(expected, rel=1e-6)


def test_envelope_rules_by_hand():
    days = [0, 5, 5, 9, 12, 20]
    values = [1.0, 2.0, 3.0, 2.5, math.inf, 4.0]
    assert densing_trend.fit(days, values).frontier.tolist() == [0, 2, 5]
    assert densing_trend.fit(days, values, "every day").frontier.tolist() == [0, 2, 3, 5]
    assert densing_trend.fit(days, values, "all").frontier.tolist() == [0, 1, 2, 3, 5]
    line = densing_trend.fit([0, 5, 20], [1.0, 3.0, 4.0])
    slope, level = np.polyfit([0, 5, 20], np.log([1.0, 3.0, 4.0]), 1)
    np.testing.assert_allclose((line.a, line.b), (slope, level), rtol=1e-10)
    rising = np.exp(0.01 * np.arange(40))
    slopes = densing_trend.bootstrap(np.arange(40), rising, draws=100, seed=0)
    np.testing.assert_allclose(slopes, 0.01, rtol=1e-9)
    rng = np.random.default_rng(3)
    dated, dense = np.sort(rng.integers(0, 12, 25)), np.exp(rng.normal(size=25))
    slopes = densing_trend.bootstrap(dated, dense, draws=20, seed=5)
    for drawn, slope in zip(np.random.default_rng(5).integers(0, 25, (20, 25)), slopes):
        x, y = [], []
        for day in sorted(set(dated[drawn])):
            top = max(np.log(dense[i]) for i in drawn if dated[i] == day)
            if not y or top > y[-1]:
                x, y = [*x, day], [*y, top]
        assert slope == pytest.approx(np.polyfit(x, y, 1)[0], rel=1e-9)
    with pytest.raises(fitting.FitError, match="two different days"):
        densing_trend.fit([1, 1], [1.0, 2.0])


def test_mistakes_are_named(table, tmp_path):
    config = load_config("configs/densing.py:fit")
    with pytest.raises(ValueError, match="config.fit.table='' and config.fit.ladder.runs=''"):
        densing_report.build(config)(None, None, step=0, rng=None, workdir=tmp_path)
    chosen = options(*table)
    models = densing_report.read(chosen)
    with pytest.raises(ValueError, match="config.fit.reference='Qwen9'.*Qwen1.5"):
        densing_report.measure(models, chosen, family="Qwen9")
    with pytest.raises(ValueError, match="config.fit.metrics='MMMU': the table has .*MMLU"):
        densing_report.measure(models, chosen, metrics=("MMMU",))
    with pytest.raises(ValueError, match="config.fit.dates='': the table has no column"):
        densing_report.read(options(table[0], ""))
    bad = appended(table, tmp_path, [("a/b", "A", 1.0, 0.5, "May 2024")])
    with pytest.raises(ValueError, match="'May 2024' is no date like 2024-05-31"):
        densing_report.read(options(*bad))
