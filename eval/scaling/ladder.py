"""Evaluator "ladder": a ladder of small runs predicts the scores of large ones (arXiv 2412.04403).

Reads config.fit.runs, fits both steps for every task, predicts every target, with and without the
laws' variants, and says how far to believe it: a leave-one-run-out interval (sampling error only),
parameters at bounds, how far the target lies outside, and how well the ladder without its largest
size predicts that size (the law's own error). Writes ladder.md, ladder.json and ladder.png, and
runs.json with the evaluations of our own runs, which config.fit.runs takes as well.
"""

from typing import NamedTuple

import numpy as np

from eval.scaling import fitting, intervals, ladder_data, ladder_laws, ladder_report
from eval.scaling.fitting import Fit
from eval.scaling.ladder_data import Run, Task
from eval.scaling.ladder_laws import evaluate, flops_law, loss_law, score_law, single_law

GONE = 1e-4  # a term with less than this share of every loss is not there
NOISE_ROWS = 10  # last evaluations whose spread is a task's noise


class Data(NamedTuple):
    """What the laws of one task see: a point a run, and every checkpoint."""

    n: np.ndarray  # [runs]
    d: np.ndarray
    c: np.ndarray
    loss: np.ndarray  # [runs] at the end
    score: np.ndarray
    losses: np.ndarray  # [checkpoints], smoothed
    scores: np.ndarray
    run_of: np.ndarray  # [checkpoints] index of the run


class Laws(NamedTuple):
    """Fits of one task."""

    task: Task
    data: Data
    loss: Fit
    score: Fit
    flops: Fit
    single: Fit | None
    start: np.ndarray  # of step 1 in refits


class Target(NamedTuple):
    """What is predicted; loss and score are NaN where nobody has measured them."""

    name: str
    n: float
    d: float
    c: float
    loss: dict[str, float]
    score: dict[str, float]


def gather(runs: list[Run], task: Task, options) -> Data:
    """The points of both steps from the runs that may be seen."""
    ends = np.array([ladder_data.final(run, task, options.last) for run in runs])
    checkpoints = [ladder_data.smoothed(run, task, options.skip, options.window) for run in runs]
    run_of = np.repeat(np.arange(len(runs)), [len(loss) for loss, _ in checkpoints])
    n, d, c = (np.array([getattr(run, key) for run in runs]) for key in ("n", "d", "c"))
    losses, scores = (np.concatenate(part) for part in zip(*checkpoints))
    return Data(n, d, c, ends[:, 0], ends[:, 1], losses, scores, run_of)


def fit(task: Task, data: Data, single: bool = True) -> Laws:
    """Both steps and their variants."""
    loss = ladder_laws.fit_loss(data.n, data.d, data.loss)
    score = ladder_laws.fit_score(data.losses, data.scores, task.chance)
    flops = ladder_laws.fit_flops(data.c, data.loss)
    one = ladder_laws.fit_single(data.n, data.d, data.score, task.chance) if single else None
    # The published start where it leads to the best minimum, as in the published intervals.
    start = np.array(ladder_laws.PUBLISHED_START)
    alone = ladder_laws.fit_loss(data.n, data.d, data.loss, starts=start)
    if alone.cost > loss.cost * (1 + fitting.SAME_COST):
        start = loss.theta
    return Laws(task, data, loss, score, flops, one, start)


def predict(laws: Laws, target: Target) -> dict[str, float]:
    """Predictions of one target: loss, chained score, score from the true loss, variants."""
    loss = evaluate(loss_law, laws.loss, target.n, target.d)
    by_flops = evaluate(flops_law, laws.flops, target.c)
    true = target.loss.get(laws.task.name, np.nan)
    out = dict(
        loss=loss,
        score=evaluate(score_law, laws.score, loss),
        score_from_true_loss=evaluate(score_law, laws.score, true),
        flops_loss=by_flops,
        flops_score=evaluate(score_law, laws.score, by_flops),
    )
    if laws.single is not None:
        out["single_score"] = evaluate(single_law, laws.single, target.n, target.d)
    return {key: float(value) for key, value in out.items()}


def refit_without(laws: Laws, kept: np.ndarray) -> tuple[Fit, Fit]:
    """Both steps on some of the runs."""
    data = laws.data
    weights = np.isin(np.arange(len(data.n)), kept).astype(float)
    loss = ladder_laws.fit_loss(data.n, data.d, data.loss, weights, laws.start)
    of = weights[data.run_of]
    return loss, ladder_laws.fit_score(data.losses, data.scores, laws.task.chance, of)


def jackknife(laws: Laws, targets: list[Target]) -> intervals.Jackknife:
    """Leave one run out of both steps: estimates [runs, targets, (loss, score)]."""

    def refit(kept):
        first, second = refit_without(laws, kept)
        loss = np.array([evaluate(loss_law, first, t.n, t.d) for t in targets])
        return np.stack([loss, evaluate(score_law, second, loss)], axis=1)

    return intervals.jackknife(refit, tuple(range(len(laws.data.n))))


def backtest(laws: Laws) -> float:
    """Mean relative error of the loss of the largest size, from the law of the smaller ones; NaN
    where too few runs are left."""
    data = laws.data
    kept = data.n < data.n.max()
    if kept.sum() <= len(ladder_laws.STEP_1):
        return float("nan")
    law = ladder_laws.fit_loss(data.n, data.d, data.loss, kept.astype(float))
    top = ~kept
    found = evaluate(loss_law, law, data.n[top], data.d[top])
    return float(np.abs(found / data.loss[top] - 1).mean())


def noise(runs: list[Run], task: Task, rows: int = NOISE_ROWS) -> tuple[float, float]:
    """Standard deviation of (loss, score) over the last evaluations of the longest, largest run;
    NaN where the run has so few that they still fall."""
    run = max(runs, key=lambda r: (r.n, r.d))
    _, loss, score = ladder_data.points(run, task)
    if len(loss) < 2 * rows:
        return float("nan"), float("nan")
    return float(np.std(loss[-rows:])), float(np.std(score[-rows:]))


def warnings(laws: Laws, target: Target, found: dict, options) -> list[str]:
    """Why the interval of a prediction should not be trusted; [] where nothing speaks against it.

    found: the prediction with `spread` (standard deviation of the loss between evaluations),
    `backtest` and the score's `interval`.
    """
    data, said = laws.data, [*laws.loss.problems, *(f"step 2: {p}" for p in laws.score.problems)]
    for term in ("size", "tokens"):
        if _share(laws, term) < GONE:
            said.append(f"the term of the {term} vanished from the law: it says nothing about them")
    reach = {k: v / top.max() for k, v, top in
             (("N", target.n, data.n), ("D", target.d, data.d))}  # fmt: skip
    far = [f"{key} is {x:.1f} times the largest seen" for key, x in reach.items()]
    if max(reach.values()) > options.reach:
        said.append(f"extrapolation: {' and '.join(far)}")
    if found["loss"] < data.losses.min():
        said.append(
            f"step 2 has seen no loss below {data.losses.min():.4g}, the target's is "
            f"{found['loss']:.4g}"
        )
    if found["spread"] > options.noise:
        said.append(
            f"noisy task: its loss moves by {found['spread']:.2g} between evaluations "
            f"(config.fit.noise={options.noise:g})"
        )
    if found["backtest"] > options.backtest:
        said.append(
            f"model error: without its largest size the ladder misses that size's loss by "
            f"{found['backtest']:.2%}"
        )
    true, interval = target.score.get(laws.task.name, np.nan), found["interval"]
    if np.isfinite(true) and not interval.low <= true <= interval.high:
        said.append(
            f"model error: the true score {true:.4g} lies outside the interval, which knows "
            "sampling error only"
        )
    return said


def _share(laws: Laws, term: str) -> float:
    """Largest share of the loss that a term of step 1 has among the runs."""
    a, b, alpha, beta, _ = laws.loss.theta
    data = laws.data
    log = a - alpha * np.log(data.n) if term == "size" else b - beta * np.log(data.d)
    return float((np.exp(log) / data.loss).max())


def targets_of(runs: list[Run], tasks: list[Task], options) -> list[Target]:
    """Targets that are runs, then those of config.fit.targets = ((name, N, D), ...)."""
    found = []
    for run in runs:
        if run.target:
            ends = {t.name: ladder_data.final(run, t, options.last) for t in tasks}
            loss, score = ({k: v[i] for k, v in ends.items()} for i in (0, 1))
            found.append(Target(run.name, run.n, run.d, run.c, loss, score))
    per_token = {run.n: run.flops_per_token for run in runs}
    for name, n, d in options.targets:
        found.append(Target(name, float(n), float(d), d * per_token.get(n, 6.0 * n), {}, {}))
    if not found:
        raise ValueError("config.fit.targets=(): no run is a target and no (name, N, D) is given")
    return found


def analyse(runs: list[Run], tasks: list[Task], options) -> tuple[list, list[Target]]:
    """[(laws, [prediction of each target])] of each task, and the targets."""
    seen = [run for run in runs if not run.target]
    if len(seen) <= len(ladder_laws.STEP_1):
        raise ValueError(
            f"config.fit.runs={options.runs!r}: {len(seen)} runs to fit, step 1 needs at least 6"
        )
    targets, out = targets_of(runs, tasks, options), []
    for task in tasks:
        laws = fit(task, gather(seen, task, options))
        knife, spread, back = jackknife(laws, targets), noise(seen, task), backtest(laws)
        predictions = []
        for i, target in enumerate(targets):
            found = predict(laws, target)
            error = knife.standard_error[i]
            loss, score = (
                intervals.Interval(*_around(found[key], of, options.level))
                for key, of in zip(("loss", "score"), error)
            )
            found |= dict(loss_error=error[0], score_error=error[1])
            found |= dict(loss_interval=loss, interval=score)
            found |= dict(spread=spread[0], score_spread=spread[1], backtest=back)
            found["warnings"] = warnings(laws, target, found, options)
            predictions.append(found)
        out.append((laws, predictions))
    return out, targets


def _around(value, error, level):
    knife = intervals.Jackknife((), np.zeros(0), np.asarray(error))
    return knife.interval(value, level)


def build(config):
    """Evaluator without a model; see the module. Each seed is a ladder of its own."""
    options = config.fit

    def evaluate_all(model, params, *, step, rng, workdir):
        tasks = ladder_data.make_tasks(options.tasks)
        runs = ladder_data.read(options, workdir, [run[0] for run in config.runs])
        ladder_data.save(workdir, runs)
        found = {
            seed: ladder_report.Ladder(of, *analyse(of, tasks, options))
            for seed, of in ladder_data.by_seed(runs).items()
        }
        return ladder_report.write(workdir, found)

    return evaluate_all
