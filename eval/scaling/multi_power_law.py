"""Loss curves from learning-rate schedules: fit, predict others, compare laws, find the best.

The evaluator of configs/multi_power_law.py. Curves are read with their schedules (from a list, or
from the logged rate), three laws are fitted to some of them and predict the rest; the chosen fit
gets error bars, predicts schedules nobody ran, and gives the schedule with the least final loss.
`loss_of_schedule` is the fitted law as a differentiable jax function.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from eval.scaling import (
    curves,
    intervals,
    laws,
    lr_schedules,
    multi_power_report,
    replay,
    schedule_search,
)

RECIPES = ("converged", "published")
OVER = ("points", "curves")


class Row(NamedTuple):
    """One fitted law: what is compared."""

    label: str
    law: laws.Law
    options: laws.Options
    theta: np.ndarray
    objective: float
    problems: tuple[str, ...]
    stopped: int | None = None  # the published recipe's last step


def read(options) -> tuple[dict[str, laws.Observed], dict[str, lr_schedules.Schedule], list[str]]:
    """(observed curves by name, every listed schedule, notes) of config.fit."""
    listed = lr_schedules.read_list(options.schedules) if options.schedules else {}
    found = curves.read_curves(options.curves, y=options.key, setting="config.fit.curves")
    observed, notes = {}, []
    for name, curve in found.items():
        logged = (curve.path / "metrics.jsonl").is_file() or curve.path.suffix == ".jsonl"
        first = options.first if options.first >= 0 else int(logged)
        schedule = listed.get(name)
        if schedule is None:
            schedule, every = _logged_schedule(name, curve, options, first, logged)
            if every > 1:
                notes.append(
                    f"schedule of {name}: straight lines between logged rates, {every} steps apart"
                )
        index = curve.steps.astype(int) - first
        least = max(schedule.warmup, options.skip)
        kept = (index >= least) & (index < len(schedule.lrs))
        index, losses = (x[kept] for x in (index, curve.values))
        index, losses = curves.bins(index, losses, options.bins)
        if len(index) < 8:
            raise ValueError(
                f"config.fit.curves: {name} has {len(index)} points between step {least} (warm-up, "
                f"config.fit.skip) and {len(schedule.lrs)}, its schedule's end; 8 are needed"
            )
        observed[name] = laws.Observed(name, schedule, np.round(index).astype(int), losses)
    return observed, listed, notes


def _logged_schedule(name, curve, options, first, logged):
    """The Schedule that the log itself shows, and how many steps lie between its rows."""
    column = options.lr_key or ("train/lr" if logged else "lr")
    try:
        rates = curves.read_curve(curve.path, y=column, key="config.fit.lr_key")
    except ValueError as error:
        raise ValueError(
            f"no schedule for {name}: config.fit.schedules={options.schedules!r} does not list it, "
            f"and {error}"
        ) from error
    index = rates.steps.astype(int) - first
    steps = int(max(index[-1], curve.steps[-1] - first)) + 1
    made = lr_schedules.from_log(name, index, rates.values, steps)
    return made, int(np.median(np.diff(index))) if len(index) > 1 else 0


def choose(observed: dict, options) -> tuple[list[laws.Observed], list[laws.Observed]]:
    """(curves to fit, curves to predict) by config.fit.fit and config.fit.predict."""
    unknown = [n for n in (*options.fit, *options.predict) if n not in observed]
    if unknown:
        raise ValueError(
            f"config.fit: no curve is called {unknown[0]!r}; there are {', '.join(observed)}"
        )
    fitted = [observed[n] for n in options.fit or observed]
    names = options.predict or tuple(n for n in observed if n not in options.fit and options.fit)
    return fitted, [observed[n] for n in names]


def fit_all(fitted: list[laws.Observed], options) -> list[Row]:
    """Every law of config.fit.laws, the multi-power law by each of config.fit.recipes."""
    rows = []
    for name in options.laws:
        if name not in laws.LAWS:
            raise ValueError(f"config.fit.laws={name!r}: allowed are {', '.join(laws.LAWS)}")
        law = laws.LAWS[name]
        if law is laws.MULTI_POWER:
            rows += [_multi_power_row(recipe, fitted, options) for recipe in options.recipes]
            continue
        decays = options.momentum if law is laws.MOMENTUM else (0.999,)
        for decay in decays:
            label = f"momentum, λ={decay:g}" if law is laws.MOMENTUM else name
            chosen = laws.Options(decay=decay)
            found = laws.fit(law, fitted, chosen)
            rows.append(Row(label, law, chosen, found.theta, found.cost, found.problems))
    return rows


def _multi_power_row(recipe: str, fitted, options) -> Row:
    chosen = laws.Options(
        form=options.form, least_beta=options.least_beta, most_gamma=options.most_gamma
    )
    if recipe == "converged":
        found = laws.fit(laws.MULTI_POWER, fitted, chosen)
        label = "multi-power, converged"
        return Row(label, laws.MULTI_POWER, chosen, found.theta, found.cost, found.problems)
    if recipe != "published":
        raise ValueError(f"config.fit.recipes={recipe!r}: allowed are {', '.join(RECIPES)}")
    chosen = chosen._replace(form="code")  # the recipe has no other
    merge = max(1, max(len(o.schedule.lrs) for o in fitted) // 3000)  # 8 of the paper's 24,000
    found = replay.replay(fitted, merge=merge)
    objective = laws.objective(laws.MULTI_POWER, found.theta, fitted, chosen._replace(merge=merge))
    label = "multi-power, published recipe"
    notes = (
        f"stopped after {found.stopped} steps, which is its regularisation; not converged",
        "its refits stop elsewhere, so its intervals need not hold the estimate",
    )
    return Row(label, laws.MULTI_POWER, chosen, found.theta, objective, notes, found.stopped)


def predict(row: Row, schedule: lr_schedules.Schedule, index) -> np.ndarray:
    """Losses at updates `index`, every drop by itself."""
    return laws.predict(row.law, row.theta, schedule, index, row.options)


def last_losses(row: Row, theta, schedules) -> np.ndarray:
    """Predicted loss at the end of each schedule."""
    return np.array(
        [laws.predict(row.law, theta, s, [len(s.lrs) - 1], row.options)[0] for s in schedules]
    )


def error_bars(row: Row, fitted, schedules, *, draws: int, over: str, seed: int) -> np.ndarray:
    """[draws, p + s] refitted parameters and final losses of `schedules`.

    over "points": residuals are resampled in blocks of neighbours, all curves pooled; "curves":
    whole curves are drawn with replacement.
    """
    if over not in OVER:
        raise ValueError(f"config.fit.over={over!r} must be one of {', '.join(OVER)}")
    log_fitted = [np.log(predict(row, o.schedule, o.index)) for o in fitted]
    residuals = np.concatenate([np.log(o.losses) - f for o, f in zip(fitted, log_fitted)])
    ends = np.cumsum([len(f) for f in log_fitted])[:-1]

    def refit(index):
        if over == "points":
            parts = np.split(residuals[index], ends)
            again = [o._replace(losses=np.exp(f + e)) for o, f, e in zip(fitted, log_fitted, parts)]
            weights = None
        else:
            again, weights = fitted, [float((index == i).sum()) for i in range(len(fitted))]
        theta = _refit(row, again, weights)
        return np.concatenate([theta, last_losses(row, theta, schedules)])

    count = len(residuals) if over == "points" else len(fitted)
    block = intervals.default_block(len(residuals)) if over == "points" else 1
    return intervals.bootstrap(refit, count, draws=draws, seed=seed, block=block)


def _refit(row: Row, observed, weights) -> np.ndarray:
    """The row's law again by its recipe, from where it ended, drops merged coarsely."""
    if row.stopped is not None:
        longest = max(len(o.schedule.lrs) for o in observed)
        return replay.replay(observed, weights=weights, merge=max(1, longest // 100)).theta
    start = np.maximum(row.theta, 1e-9)
    return laws.fit(
        row.law, observed, row.options, starts=start, weights=weights, coarse=100, fine=100
    ).theta


def leave_one_out(row: Row, fitted, schedules) -> tuple[dict[str, dict], Any]:
    """({left-out curve: scores of its prediction}, jackknife of the final losses)."""
    names, scored = [o.name for o in fitted], {}

    def refit(index):
        kept = set(index.tolist())
        theta = _refit(row, fitted, [float(i in kept) for i in range(len(fitted))])
        left = next(o for i, o in enumerate(fitted) if i not in kept)
        again = row._replace(theta=theta)
        scored[left.name] = laws.scores(predict(again, left.schedule, left.index), left.losses)
        return last_losses(row, theta, schedules)

    found = intervals.jackknife(refit, names)
    return scored, found


def loss_of_schedule(theta, *, warmup_sum: float, peak: float) -> Callable:
    """rates [n] after the warm-up -> predicted final loss: differentiable, for any search."""
    return lambda rates: laws.final_loss(jnp.asarray(theta), rates, peak=peak, before=warmup_sum)


def optimise(row: Row, fitted, options) -> schedule_search.Search:
    """The schedule search of config.fit.optimise, its warm-up that of the longest fitted curve."""
    o, longest = options.optimise, max(fitted, key=lambda f: len(f.schedule.lrs))
    schedule = longest.schedule
    steps = o.steps or min(len(f.schedule.lrs) for f in fitted)
    return schedule_search.search(
        row.theta,
        schedule.lrs[: schedule.warmup],
        steps=steps,
        peak=schedule.peak,
        least=o.least,
        decay=o.decay,
        updates=o.updates,
    )


def build(config):
    """Evaluator: fits config.fit.curves, writes report.md, report.json, plots and the schedule."""
    options = config.fit

    def evaluate(model, params, *, step, rng, workdir):
        workdir = Path(workdir)
        observed, listed, notes = read(options)
        fitted, unseen = choose(observed, options)
        peaks = {round(o.schedule.peak, 12) for o in fitted}
        if len(peaks) > 1:
            notes.append(
                "peaks differ between fitted curves: the law does not transfer between them"
            )
        rows = fit_all(fitted, options)
        tables = {
            row.label: {o.name: predict(row, o.schedule, o.index) for o in (*fitted, *unseen)}
            for row in rows
        }
        chosen = _chosen(rows, options.use)
        schedules = {o.name: o.schedule for o in (*fitted, *unseen)}
        schedules |= {n: s for n, s in listed.items() if n not in schedules and options.what_if}
        result = dict(
            fitted=fitted, unseen=unseen, rows=rows, tables=tables, chosen=chosen, notes=notes,
            schedules=schedules, finals=last_losses(chosen, chosen.theta, schedules.values()),
        )  # fmt: skip
        if options.optimise.updates and chosen.law is laws.MULTI_POWER:
            result["search"] = found = optimise(chosen, fitted, options)
            result["best_final"] = last_losses(chosen, chosen.theta, [found.schedule])[0]
            lr_schedules.write_rates(workdir / "schedule.csv", result["search"].schedule.lrs)
        if options.bootstrap:
            result["samples"] = error_bars(
                chosen, fitted, schedules.values(), draws=options.bootstrap, over=options.over,
                seed=config.seed,
            )  # fmt: skip
        if options.leave_out and len(fitted) > 1:
            result["left_out"] = leave_one_out(chosen, fitted, schedules.values())
        return multi_power_report.write(workdir, options, result)

    return evaluate


def _chosen(rows: list[Row], use: str) -> Row:
    for row in rows:
        if use in row.label:
            return row
    raise ValueError(
        f"config.fit.use={use!r} must be part of one of {'; '.join(r.label for r in rows)}"
    )
