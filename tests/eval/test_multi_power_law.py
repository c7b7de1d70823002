"""Multi-power law, momentum law and schedule search: acceptance checks 1 to 8 by number."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.common import load_config
from configs.multi_power_law import fit_config
from eval.scaling import (
    curves,
    fitting,
    laws,
    lr_schedules,
    multi_power_law,
    multi_power_seeds,
    replay,
    schedule_search,
)
from training.schedules import make_schedule

ROOT = Path(__file__).resolve().parents[2]
LISTED = ROOT / "eval/scaling/published_schedules.json"
PUBLISHED = {  # L0 A alpha B C beta gamma
    "25": (3.04045406, 0.52468604, 0.50786857, 363.78751622, 2.06560812, 0.58279013, 0.64142257),
    "400": (2.37474466, 0.65421216, 0.42878731, 523.42464371, 2.02462735, 0.59350493, 0.63472457),
}
AVERAGES = {  # MAE RMSE PredE WorstE R2
    "25": (0.003760, 0.004652, 0.001102, 0.004095, 0.998802),
    "400": (0.004836, 0.007305, 0.001680, 0.009948, 0.997763),
}
FIT = ("cosine_24000", "constant_24000", "wsdcon_9")
SIZES = ("25", "400")


@pytest.fixture(scope="module", autouse=True)
def optimised_code():
    """Fits run thousands of evaluations: here compiling well costs less than it saves."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def observed(public_data):
    """{size: {curve: Observed}} of the public curves."""
    folder = public_data("multi_power_law")

    def read(size):
        options = options_for(folder / f"csv_{size}")
        return multi_power_law.read(options)[0]

    return {size: read(size) for size in SIZES}


def options_for(folder, **changes):
    return ConfigDict(fit_config(curves=str(folder), schedules=str(LISTED), fit=FIT) | changes)


def split(by_name):
    fitted = [by_name[n] for n in FIT]
    return fitted, [o for n, o in by_name.items() if n not in FIT]


def averages(law, theta, group, options):
    rows = [
        laws.scores(laws.predict(law, theta, o.schedule, o.index, options), o.losses) for o in group
    ]
    return np.array(list(laws.mean_scores(rows).values())), rows


@pytest.mark.parametrize("size", SIZES)
def test_check_1_published_parameters_give_the_published_scores(observed, size):
    fitted, unseen = split(observed[size])
    assert len(fitted) == 3 and len(unseen) == 6
    found, rows = averages(laws.MULTI_POWER, PUBLISHED[size], unseen, laws.Options())
    np.testing.assert_allclose(found, AVERAGES[size], atol=1e-6)
    if size == "25":
        by_name = {o.name: row for o, row in zip(unseen, rows)}
        assert by_name["cosine_72000"]["MAE"] == pytest.approx(0.007445, abs=1e-6)
        assert by_name["cosine_72000"]["R2"] == pytest.approx(0.996623, abs=1e-6)
        assert by_name["wsd_20000_24000"]["MAE"] == pytest.approx(0.003408, abs=1e-6)
        assert by_name["wsd_20000_24000"]["R2"] == pytest.approx(0.999217, abs=1e-6)


def test_check_1_against_plain_numpy(observed):
    """One point of the law written out as its authors' code has it."""
    o = observed["25"]["wsdld_20000_24000"]
    floor, scale, alpha, drop, speed, beta, gamma = PUBLISHED["25"]
    lrs, t = o.schedule.lrs, int(o.index[-1])
    k, cum = np.arange(1, t + 1), np.cumsum(lrs)
    effect = 1 - (1 + speed * lrs[k] ** -gamma * (cum[t] - cum[k - 1])) ** -beta
    wanted = floor + scale * cum[t] ** -alpha + drop * ((lrs[k] - lrs[k - 1]) * effect).sum()
    found = laws.predict(laws.MULTI_POWER, PUBLISHED["25"], o.schedule, o.index)
    assert found[-1] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("size, stop, objective", [("25", 100, 2.786e-4), ("400", 90, 4.078e-4)])
def test_check_2_and_5_replay_of_the_published_recipe(observed, size, stop, objective):
    """Parameters to 1e-4, the step it stops at, and the published averages to 1e-5, all from the
    curves alone: neither start nor step is given."""
    fitted, unseen = split(observed[size])
    found = replay.replay(fitted, merge=8)
    np.testing.assert_allclose(found.theta, PUBLISHED[size], rtol=1e-4)
    assert found.stopped == stop and found.objective == pytest.approx(objective, rel=5e-4)
    reached, _ = averages(laws.MULTI_POWER, found.theta, unseen, laws.Options())
    np.testing.assert_allclose(reached, AVERAGES[size], atol=1e-5)


@pytest.mark.parametrize("size, most", [("25", 0.0045), ("400", 0.0063)])
def test_check_3_converged_and_regularised(observed, size, most):
    fitted, unseen = split(observed[size])
    found = laws.fit(laws.MULTI_POWER, fitted)
    official = laws.objective(laws.MULTI_POWER, PUBLISHED[size], fitted, laws.Options(merge=24))
    assert found.cost < official
    reached, _ = averages(laws.MULTI_POWER, found.theta, unseen, laws.Options(merge=8))
    assert reached[0] <= most
    assert found.at_bound == ("beta",) and "beta = 0.5 is at its bound" in found.problems


def test_check_4_momentum_rows_and_a_table_from_one_command(public_data, tmp_path, capsys):
    wanted = {  # (size, lambda): MAE, RMSE
        ("25", 0.995): (0.004563, 0.006018),
        ("25", 0.999): (0.004771, 0.006223),
        ("400", 0.999): (0.006457, 0.008541),
    }
    for size in SIZES:
        options = options_for(
            public_data("multi_power_law", f"csv_{size}"), laws=("momentum", "chinchilla"),
            momentum=(0.995, 0.999), use="0.999", bootstrap=0, leave_out=False,
        )  # fmt: skip
        evaluate = multi_power_law.build(ConfigDict(dict(fit=options, seed=0)))
        evaluate(None, None, step=0, rng=None, workdir=tmp_path / size)
        table = capsys.readouterr().out
        assert "| momentum, λ=0.999 | " in table and "| chinchilla | " in table
        found = json.loads((tmp_path / size / "report.json").read_text())["laws"]
        for (at, decay), (mae, rmse) in wanted.items():
            if at == size:
                average = found[f"momentum, λ={decay}"]["average"]
                assert average["MAE"] == pytest.approx(mae, rel=0.02)
                assert average["RMSE"] == pytest.approx(rmse, rel=0.02)
        assert found["chinchilla"]["average"]["MAE"] > 2 * mae  # it does not know the schedule


FINAL = {"25": 3.14968, "400": 2.53322}
RIVALS = {"25": (3.20720, 3.15801), "400": (2.60164, 2.54400)}  # cosine, WSD with exponential decay


@pytest.mark.parametrize("size", SIZES)
def test_check_6_schedule_search(public_data, size):
    theta, rising = PUBLISHED[size], np.linspace(0, 3e-4, 2160)
    found = schedule_search.search(theta, rising, steps=24000, peak=3e-4, updates=2000)
    lrs = found.schedule.lrs
    assert found.loss <= FINAL[size] + 1e-4
    assert (np.diff(lrs[2160:]) <= 0).all() and len(lrs) == 24000
    assert found.flat_until >= 20_500 and lrs[-1] < 0.02 * 3e-4
    loss = multi_power_law.loss_of_schedule(theta, warmup_sum=rising.sum(), peak=3e-4)
    listed = lr_schedules.read_list(LISTED)
    official = np.load(public_data("multi_power_law", f"optimized_schedule_{size}.npy"))
    with fitting.float64():
        assert float(loss(official)) == pytest.approx(FINAL[size], abs=1e-5)
        names = ("cosine_24000", "wsd_20000_24000", "wsdld_20000_24000")
        rivals = [float(loss(listed[name].lrs[2160:])) for name in names]
        np.testing.assert_allclose(rivals[:2], RIVALS[size], atol=1e-5)
        assert found.loss < min(rivals)


@pytest.mark.parametrize("size", SIZES)
def test_check_6_the_closed_form_that_trainings_take(size):
    """Decay over the last tenth like (1 - x)^1.5: within 4e-4 of the published optimum."""
    config = load_config(
        "configs/llama.py", "steps=24000", "optimizer.lr=3e-4", "schedule.name=wsd",
        "schedule.shape=sqrt_cube", "schedule.warmup=2160", "schedule.decay=2400",
        "schedule.final=0.005",
    )  # fmt: skip
    lrs = np.asarray(make_schedule(config)(jnp.arange(24_000)), np.float64)[2160:]
    assert (np.diff(lrs) <= 0).all() and lrs[-1] == pytest.approx(1.5e-6)
    half = 0.005 + 0.995 * 0.5**1.5
    assert lrs[-1201] == pytest.approx(3e-4 * half, rel=1e-3)
    loss = multi_power_law.loss_of_schedule(
        PUBLISHED[size], warmup_sum=np.linspace(0, 3e-4, 2160).sum(), peak=3e-4
    )
    with fitting.float64():
        assert float(loss(lrs)) == pytest.approx(FINAL[size], abs=4e-4)


def test_check_6_gradient_equals_differences():
    theta, rng = PUBLISHED["25"], np.random.default_rng(0)
    with fitting.float64():
        drops = jnp.asarray(rng.uniform(0, 2e-7, 1000))
        loss = lambda d: schedule_search.objective(d, jnp.asarray(theta), 3e-4, 1e-10, 0.3)  # noqa: E731
        gradient = np.asarray(jax.grad(loss)(drops))
        for i in (0, 137, 500, 998, 999):
            step = 1e-9
            up, down = (float(loss(drops.at[i].add(s))) for s in (step, -step))
            assert gradient[i] == pytest.approx((up - down) / (2 * step), rel=1e-5)


def test_search_keeps_its_constraints():
    options = dict(steps=600, peak=1e-2, updates=1500)
    theta, rising = (1.6, 2.1, 0.22, 40.0, 0.09, 0.5, 1.0), np.linspace(0, 1e-2, 60)
    free = schedule_search.search(theta, rising, **options)
    held = schedule_search.search(theta, rising, least=2e-3, decay=0.1, **options)
    assert held.schedule.lrs[60:].min() >= 2e-3 > free.schedule.lrs[-1]
    assert (held.schedule.lrs[60 : 60 + 486] == 1e-2).all() and free.loss < held.loss
    assert (np.diff(held.schedule.lrs[60:]) <= 0).all()
    for wrong in (dict(least=0.02), dict(decay=0.0), dict(steps=61)):
        with pytest.raises(ValueError, match="a schedule search needs warmup=60 < steps="):
            schedule_search.search(theta, rising, **(options | wrong))


@pytest.mark.parametrize("form", laws.FORMS)
def test_check_7_constant_rate_causality_and_precision(form):
    theta = PUBLISHED["25"]
    options, index = laws.Options(form=form), np.arange(300, 3000, 100)
    shared = dict(steps=3000, peak=3e-4, warmup=200, final=3e-5)
    make = lambda **spec: lr_schedules.make(spec["name"], shared | spec)  # noqa: E731
    constant, cosine = make(name="constant"), make(name="cosine")
    flat = laws.predict(laws.MULTI_POWER, theta, constant, index, options)
    power = theta[0] + theta[1] * np.cumsum(constant.lrs)[index] ** -theta[2]
    if form == "paper":  # a constant rate earns nothing
        np.testing.assert_allclose(flat, power, rtol=1e-14)
    else:  # the warm-up's rise costs up to B times the peak, and no more
        assert ((flat > power) & (flat < power + theta[3] * 3e-4)).all()
    # The same rates up to t give the same losses up to t.
    longer = make(name="wsd", decay=1000)
    early = index < 2000
    np.testing.assert_allclose(
        laws.predict(laws.MULTI_POWER, theta, longer, index[early], options),
        flat[early],
        rtol=1e-12,
    )
    for law, p in ((laws.MULTI_POWER, theta), (laws.MOMENTUM, (3.1, 0.5, 0.5, 1.9))):
        known = laws.predict(law, p, cosine, index[:9], options)
        np.testing.assert_allclose(laws.predict(law, p, cosine, index, options)[:9], known)
    first = 1 if form == "code" else 200
    exact = laws.predict(laws.MULTI_POWER, theta, cosine, index, options)
    single = laws.curve(
        jnp.float32(jnp.array(theta)), jnp.float32(cosine.lrs), jnp.asarray(index), first=first
    )
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, exact, atol=1e-4)


@pytest.mark.parametrize("name, most", [("cosine_24000", 1e-5), ("wsd_20000_24000", 1e-4)])
def test_merged_drops_change_little(observed, name, most):
    o = observed["25"][name]
    exact, merged = (
        laws.predict(laws.MULTI_POWER, PUBLISHED["25"], o.schedule, o.index, laws.Options(merge=m))
        for m in (1, 24)
    )
    # The first point lies one update after the warm-up: its last drops have hardly acted yet.
    assert 0 < np.abs(merged - exact)[1:].max() < most


def test_check_7_the_differentiable_law_is_the_fitted_one():
    theta, schedule = PUBLISHED["400"], lr_schedules.make(
        "x", dict(name="cosine", steps=900, peak=3e-4, warmup=100, final=0.0)
    )  # fmt: skip
    wanted = laws.predict(laws.MULTI_POWER, theta, schedule, [899], laws.Options(form="paper"))
    loss = multi_power_law.loss_of_schedule(
        theta, warmup_sum=schedule.lrs[:100].sum(), peak=schedule.peak
    )
    with fitting.float64():
        assert float(loss(schedule.lrs[100:])) == pytest.approx(float(wanted[0]), abs=1e-12)
    rate = schedule_search.as_optax(schedule)
    found = jax.vmap(rate)(jnp.arange(905))
    np.testing.assert_allclose(found[:900], schedule.lrs, rtol=1e-6)
    assert float(found[904]) == float(found[899])


THETA = (1.6, 2.1, 0.22, 40.0, 0.09, 0.6, 0.8)
SHORT = {  # curves of a made-up model: names, lengths and rates of no published one
    "steady": dict(name="constant"),
    "halfway": dict(name="piecewise", boundaries=[300], rates=[3e-3]),
    "falling": dict(name="cosine", final=1e-3),
    "late": dict(name="wsd", final=5e-4, decay=150, fall="power", power=1.5),
}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """CSVs with a list of schedules, and the same as runs with logged rates."""
    root, rng = tmp_path_factory.mktemp("curves"), np.random.default_rng(0)
    listed = dict(peak=1e-2, warmup=40, steps=700, schedules=SHORT | {"nobody": SHORT["late"]})
    (root / "list.json").write_text(json.dumps(listed))
    for name, schedule in lr_schedules.read_list(root / "list.json").items():
        if name == "nobody":
            continue
        index = np.arange(40, 700, 20)
        loss = laws.predict(laws.MULTI_POWER, THETA, schedule, index)
        loss *= np.exp(5e-4 * rng.normal(size=len(index)))
        rows = "".join(f"{i},{x}\n" for i, x in zip(index, loss))
        (root / "csv").mkdir(exist_ok=True)
        (root / "csv" / f"{name}.csv").write_text("step,value\n" + rows)
        run = root / "runs" / name
        run.mkdir(parents=True)
        log = [{"step": i + 1, "train/lr": float(r)} for i, r in enumerate(schedule.lrs)]
        log += [{"step": int(i) + 1, "eval/loss": float(x)} for i, x in zip(index, loss)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return root


def test_check_5_any_folder_any_list(made_up, tmp_path):
    """Fits three made-up curves, predicts the fourth and one nobody ran, with intervals."""
    config = ConfigDict(dict(seed=0, fit=fit_config(
        curves=str(made_up / "csv"), schedules=str(made_up / "list.json"), key="value",
        fit=("steady", "halfway", "falling"), recipes=("converged",), momentum=(0.99,),
        bootstrap=8, optimise=dict(steps=0, updates=500, least=0.0, decay=1.0),
    )))  # fmt: skip
    metrics = multi_power_law.build(config)(None, None, step=0, rng=None, workdir=tmp_path)
    assert metrics["PredE"] < 0.005 and metrics["left_out_PredE"] < 0.02
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["finals"]["nobody"]["predicted"] == report["finals"]["late"]["predicted"]
    interval = report["finals"]["nobody"]["interval"]
    assert interval["low"] < interval["high"] and "observed" not in report["finals"]["nobody"]
    assert set(report["left_out"]) == {"steady", "halfway", "falling"}
    best = report["optimised"]["predicted"]
    assert best["optimised"] == min(best.values()) and set(SHORT) < set(best)
    rates = lr_schedules.read_rates(tmp_path / "schedule.csv")
    assert len(rates) == 700 and rates.max() == pytest.approx(1e-2)
    for name in ("report.md", "curves.png", "schedule.png"):
        assert (tmp_path / name).stat().st_size > 500
    assert "from_file" in (tmp_path / "report.md").read_text()


def test_logged_rates_are_the_schedule(made_up):
    options = ConfigDict(fit_config(curves=str(made_up / "runs"), key="eval/loss"))
    observed, _, notes = multi_power_law.read(options)
    listed = lr_schedules.read_list(made_up / "list.json")
    assert set(observed) == set(SHORT) and notes == []
    for name, o in observed.items():
        np.testing.assert_allclose(o.schedule.lrs, listed[name].lrs)
        assert o.schedule.warmup in (39, 40) and o.index[0] == 40


def test_curves_as_what_is_resampled(made_up):
    options = ConfigDict(
        fit_config(curves=str(made_up / "csv"), schedules=str(made_up / "list.json"), key="value")
    )
    fitted, _ = multi_power_law.choose(multi_power_law.read(options)[0], options)
    found = laws.fit(laws.MOMENTUM, fitted)
    row = multi_power_law.Row("m", laws.MOMENTUM, laws.Options(), found.theta, found.cost, ())
    schedules = [fitted[0].schedule]
    samples = multi_power_law.error_bars(row, fitted, schedules, draws=6, over="curves", seed=0)
    assert samples.shape == (6, 5) and samples[:, -1].std() > 0
    with pytest.raises(ValueError, match="config.fit.over='runs' must be one of points, curves"):
        multi_power_law.error_bars(row, fitted, schedules, draws=1, over="runs", seed=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(curves="nowhere"), "config.fit.curves='nowhere'"),
        (dict(key="los"), "config.fit.key='los'.*step, value"),
        (dict(schedules="no.json"), "config.fit.schedules='no.json'"),
        (dict(schedules=""), "no schedule for .*config.fit.lr_key='lr'.*step, value"),
        (dict(fit=("cosin",)), "no curve is called 'cosin'; there are falling"),
        (dict(laws=("power",)), "config.fit.laws='power': allowed are multi-power"),
        (dict(recipes=("best",)), "config.fit.recipes='best': allowed are converged"),
        (dict(use="nothing", laws=("chinchilla",)), "config.fit.use='nothing' must be part"),
        (dict(skip=650), "config.fit.curves: .* has . points between step 650"),
    ],
)
def test_mistakes_name_the_key(made_up, tmp_path, changes, message):
    good = dict(
        curves=str(made_up / "csv"), schedules=str(made_up / "list.json"), key="value",
        bootstrap=0, leave_out=False,
    )  # fmt: skip
    config = ConfigDict(dict(seed=0, fit=fit_config(**(good | changes))))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        multi_power_law.build(config)(None, None, step=0, rng=None, workdir=tmp_path)


@pytest.mark.parametrize(
    "spec, message",
    [
        (dict(name="cosin"), "name='cosin' must be one of constant, cosine"),
        (dict(name="cosine"), "'x' .cosine. lacks 'final'"),
        (dict(name="wsd", final=0.0, decay=9, fall="exponential"), "final must be > 0"),
        (dict(name="constant", warmup=99), "0 <= warmup=99 < steps=50"),
        (dict(name="file", path="no.npy"), "no such schedule"),
    ],
)
def test_schedule_mistakes_name_the_curve(spec, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        lr_schedules.make("x", dict(steps=50, peak=1.0) | spec)


RESULTS = ROOT / "docs/results/multi_power_law"


def test_check_8_the_committed_runs(tmp_path):
    """The log of the real runs: every claim, the curves behind it, and a fit done again."""
    seeds = {}
    log = json.loads((RESULTS / "curves.json").read_text())
    report = json.loads((RESULTS / "report.json").read_text())
    assert len(log) == 3 and report["seeds"].keys() == log.keys()
    for seed, runs in log.items():
        row = report["seeds"][seed]
        assert row["relative_error"][report["chosen"]] < 0.01 and row["order_right"]
        assert row["gains"]["cosine"] > 0
        for name, run in runs.items():
            assert len(run["step"]) == len(run["loss"]) == 30 and run["step"][-1] == 1200
            assert run["loss"][-1] == pytest.approx(row["finals"][name], abs=1e-5)
        seeds[seed] = runs
    runs = seeds["seed0"]
    for name, run in runs.items():
        rows = [{"step": s, "train/lr": r} for s, r in zip(run["rate_step"], run["rate"])]
        rows += [{"step": s, "loss": x} for s, x in zip(run["step"], run["loss"])]
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    options = ConfigDict(
        fit_config(
            curves=str(tmp_path), fit=("constant", "cosine", "two_stage"),
            predict=("wsd", "late_stage"), recipes=("converged",), laws=("multi-power",),
        )
    )  # fmt: skip
    fitted, unseen = multi_power_law.choose(multi_power_law.read(options)[0], options)
    row = multi_power_law.fit_all(fitted, options)[0]
    errors = [
        laws.scores(multi_power_law.predict(row, o.schedule, o.index), o.losses)["PredE"]
        for o in unseen
    ]
    wanted = report["seeds"]["seed0"]["relative_error"][report["chosen"]]
    assert np.mean(errors) == pytest.approx(wanted, rel=0.02)


@pytest.mark.slow
def test_check_8_the_runs_themselves(tmp_path):
    """python main.py --config=configs/multi_power_law.py, 21 minutes of CPU."""
    from eval.fit import run as fit
    from training import loop, runs

    config = load_config("configs/multi_power_law.py")
    tasks = dict(train=loop.train, fit=fit)
    runs.run(config, tmp_path, lambda job, folder: tasks[job.task](job, folder))
    seeds = multi_power_seeds.collect(tmp_path, [run[0] for run in config.runs])
    found = multi_power_seeds.summary(seeds)
    for claim in ("unseen schedules within 1 %", "their order right", "optimised below cosine"):
        assert all(found["claims"][claim])
    assert len(curves.find(str(tmp_path))) == 18
