"""Evaluator "densing_runs": density of this codebase's own families against its own ladder.

The reference is the ladder's family without its largest size: L = a N^-alpha + b D^-beta fitted to
held-out bits per byte at the end of its runs. Every other run is measured: the size that the
reference would need for the same loss after the same tokens, over its own size. The held-out size
should come back as it is. Writes densing.md, densing.json, densing.png and runs.json.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.scaling import densing, fitting, ladder, ladder_data, ladder_laws, report
from eval.scaling.ladder_data import Run, Task


class Measured(NamedTuple):
    """One run on the reference's axis."""

    name: str
    family: str
    n: float
    d: float
    loss: float
    same: densing.Effective  # size after the run's own tokens
    common: densing.Effective  # size after the common number of tokens
    tokens: densing.Effective  # that the reference needs at the run's own size
    by_score: dict[str, densing.Effective]  # by a task's score after the run's own tokens


class Seed(NamedTuple):
    """The reference of one seed and what it measures."""

    law: fitting.Fit
    error: float  # mean relative error of the law on its own runs
    points: np.ndarray  # [runs, (n, d, loss)] of the reference
    d0: float
    measured: list[Measured]


def reference_at(law: fitting.Fit, d0: float, losses, score: fitting.Fit | None = None):
    """The two-step reference of fitted laws at d0 tokens."""
    log_a, alpha, log_b, beta = map(float, law.theta)
    c, middle, gamma, d = map(float, score.theta) if score else (-1.0, 0.0, 1.0, 1.0)
    a, b = np.exp(log_a), np.exp(log_b)
    return densing.TwoStep(a, alpha, b, beta, c, gamma, middle, d, d0, losses=losses)


def measure(runs: list[Run], tasks: Sequence[Task], options) -> Seed:
    """Fit the reference on the runs that are no targets, measure all others.

    The last task's loss is the one that sizes are read from.
    """
    *scored, text = tasks
    family = [run for run in runs if run.family == options.reference]
    if not family:
        known = ", ".join(dict.fromkeys(run.family for run in runs))
        raise ValueError(f"config.fit.reference={options.reference!r}: the runs are of {known}")
    seen = [run for run in ladder_data.held_out(family, options.held_out) if not run.target]
    names = {run.name for run in seen}
    points = np.array([(r.n, r.d, ladder_data.final(r, text, options.last)[0]) for r in seen])
    if len(points) < 6:
        raise ValueError(
            f"config.fit.reference={options.reference!r}: {len(points)} runs to fit, needs 6"
        )
    law = densing.fit_loss(*points.T)
    fitted = ladder_laws.evaluate(densing.loss_law, law, points[:, 0], points[:, 1])
    seen_losses = (float(points[:, 2].min()), float(points[:, 2].max()))
    scores = {t.name: _score_law(seen, t, text, options) for t in scored}
    d0 = options.d0 or float(np.exp(np.log(points[:, 1]).mean()))
    measured = []
    for run in runs:
        if run.name in names:
            continue
        loss = ladder_data.final(run, text, options.last)[0]
        by_score = {}
        for task in scored:
            score = ladder_data.final(run, task, options.last)[1]
            reference = reference_at(law, run.d, seen_losses, scores[task.name])
            by_score[task.name] = reference.size(score)
        reference = reference_at(law, run.d, seen_losses)
        same, needed = reference.size_of_loss(loss), reference.tokens_of_loss(loss, run.n)
        common = reference_at(law, d0, seen_losses).size_of_loss(loss)
        measured.append(
            Measured(run.name, run.family, run.n, run.d, loss, same, common, needed, by_score)
        )
    error = float(np.abs(fitted / points[:, 2] - 1).mean())
    return Seed(law, error, points, d0, measured)


def _score_law(seen: list[Run], task: Task, text: Task, options) -> fitting.Fit:
    """Step 2 from the loss of the text to the task's score, on the reference's checkpoints."""
    mixed = task._replace(losses=text.losses)
    data = ladder.gather(seen, mixed, options)
    return ladder_laws.fit_score(data.losses, data.scores, task.chance)


def _vanished(seed: Seed) -> list[str]:
    """A law without one of its terms says nothing about sizes, or nothing about tokens."""
    log_a, alpha, log_b, beta = seed.law.theta
    n, d, loss = seed.points.T
    terms = {"size": log_a - alpha * np.log(n), "tokens": log_b - beta * np.log(d)}
    return [
        f"the term of the {name} vanished: densities by it mean nothing"
        for name, log in terms.items()
        if (np.exp(log) / loss).max() < ladder.GONE
    ]


def _law_text(seed: Seed) -> str:
    v = seed.law.values
    return (
        f"L = {np.exp(v['ln a']):.4g} N^-{v['alpha']:.4f} + {np.exp(v['ln b']):.4g} "
        f"D^-{v['beta']:.4f}, {len(seed.points)} runs, mean error {seed.error:.2%}"
    )


_spread = functools.partial(report.spread, mean=".3f", deviation=".3f")


def write(workdir, seeds: dict[str, Seed], tasks, reference: str) -> dict[str, float]:
    """The report; returns flat metrics, means over seeds."""
    first = next(iter(seeds.values()))
    text = [f"- {name or 'the run'}: {_law_text(seed)}" for name, seed in seeds.items()]
    sections = ["Reference law, bits per byte at the end of each run:\n\n" + "\n".join(text)]
    rows, held, metrics, flags = [], [], {}, {}
    for m in first.measured:
        of = [x for seed in seeds.values() for x in seed.measured if x.name == m.name]
        ratio = [x.same.size / x.n for x in of]
        row = [m.name, f"{m.n:,.0f}", f"{m.d:,.0f}", _spread([x.loss for x in of]), _spread(ratio),
               _spread([x.common.size / x.n for x in of]),
               _spread([x.tokens.size / x.d for x in of])]  # fmt: skip
        for task in tasks[:-1]:
            row.append(_spread([x.by_score[task.name].size / x.n for x in of]))
        rows.append(row)
        metrics[f"{m.name}/density"] = float(np.mean(ratio))
        if m.family == reference:
            sizes = [x.same.size for x in of]
            error = [100 * (r - 1) for r in ratio]
            held.append([m.name, f"{m.n:,.0f}", _spread(sizes), _spread(error)])
            metrics[f"{m.name}/size_error"] = float(np.mean(np.abs(error))) / 100
        for name, x in zip(seeds, of):
            if x.same.flag:
                flags.setdefault(x.same.flag, []).append(f"{m.name} {name}".strip())
    if held:
        columns = ("held-out run", "N", "size from its loss", "error, %")
        sections.append("## The held-out size\n\n" + report.markdown_table(columns, held))
    columns = ("run", "N", "tokens D", "bits per byte", "density at D",
               f"density at {first.d0:,.0f} tokens", "tokens the reference needs, over D",
               *(f"by the score of {t.name}" for t in tasks[:-1]))  # fmt: skip
    sections.append("## Densities\n\nMean ± standard deviation over seeds; 1: as good as the "
                    "reference's size.\n\n" + report.markdown_table(columns, rows))  # fmt: skip
    sections.append(report.problems(flags))
    said = {f"law {k}".strip(): [*s.law.problems, *_vanished(s)] for k, s in seeds.items()}
    sections.append(report.problems(said))
    data = {name or "run": dict(law=s.law.values, error=s.error, d0=s.d0,
                                measured=[m._asdict() for m in s.measured])
            for name, s in seeds.items()}  # fmt: skip
    report.write(workdir, "Density of our own families", sections, data, name="densing")
    _plot(Path(workdir) / "densing.png", first)
    return metrics | {"law_error": float(np.mean([s.error for s in seeds.values()]))}


def _plot(path, seed: Seed) -> None:
    with report.figure(path, size=(6, 4.5)) as figure:
        axes = figure.subplots()
        grid = np.geomspace(seed.points[:, 0].min(), 1.5 * max(m.n for m in seed.measured), 60)
        budgets = sorted({round(d / n) for n, d, _ in seed.points})
        for i, ratio in enumerate(budgets):
            loss = ladder_laws.evaluate(densing.loss_law, seed.law, grid, ratio * grid)
            axes.plot(grid, loss, color=f"C{i}", lw=1, label=f"law, {ratio} tokens a parameter")
            of = np.round(seed.points[:, 1] / seed.points[:, 0]) == ratio
            axes.plot(seed.points[of, 0], seed.points[of, 2], "o", ms=4, color=f"C{i}")
        marks = dict(zip(dict.fromkeys(m.family for m in seed.measured), "*^sDv"))
        for m in seed.measured:
            colour = f"C{int(np.argmin([abs(r - m.d / m.n) for r in budgets]))}"
            axes.plot(m.n, m.loss, marks[m.family], color=colour, mec="black", ms=8)
        for family, mark in marks.items():
            axes.plot([], [], mark, color="white", mec="black", label=f"measured: {family}")
        axes.set(xscale="log", xlabel="parameters N", ylabel="held-out bits per byte")
        axes.legend(fontsize=7)


def build(config):
    """Evaluator without a model; see the module."""
    options = config.fit

    def evaluate(model, params, *, step, rng, workdir):
        tasks = ladder_data.make_tasks(options.tasks)
        names = [run[0] for run in config.runs]
        runs = ladder_data.read(options, workdir, names, one_family=False)
        ladder_data.save(workdir, runs)
        found = {seed: measure(of, tasks, options)
                 for seed, of in ladder_data.by_seed(runs).items()}  # fmt: skip
        return write(workdir, found, tasks, options.reference)

    return evaluate
