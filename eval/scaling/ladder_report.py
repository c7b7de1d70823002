"""Report of the evaluator "ladder": tables, JSON and one plot of both steps."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.scaling import report
from eval.scaling.ladder_laws import STEP_1, STEP_2, evaluate, loss_law, score_law

EXPLAINED = (
    "Loss is bits per byte of the right answer, `predicted` by step 1; `chained`: step 2 of that "
    "loss. Intervals are a leave-one-run-out jackknife's and know sampling error only. "
    "`from true loss`: step 2 alone. `FLOPs`: the loss from the compute alone. Scores in percent."
)


class Ladder(NamedTuple):
    """Runs, [(laws, [prediction of each target])] of each task, targets."""

    runs: list
    found: list
    targets: list


def percent(value: float) -> float:
    """A share in percent."""
    return 100.0 * float(value)


def errors(found, targets) -> dict[str, float]:
    """Means over tasks and targets whose score is known: points and percent of the score."""
    sums: dict[str, list] = {}
    for laws, predictions in found:
        for target, p in zip(targets, predictions):
            name = laws.task.name
            for kind, key, true in (
                ("loss", "loss", target.loss.get(name)),
                ("flops_loss", "flops_loss", target.loss.get(name)),
                ("score", "score", target.score.get(name)),
                ("score_from_true_loss", "score_from_true_loss", target.score.get(name)),
                ("flops_score", "flops_score", target.score.get(name)),
                ("single_score", "single_score", target.score.get(name)),
            ):
                if true is not None and key in p:
                    sums.setdefault(f"{kind}_relative_error", []).append(abs(p[key] / true - 1))
                    if kind.endswith("score"):
                        sums.setdefault(f"{kind}_points", []).append(100 * abs(p[key] - true))
            true = target.score.get(name)
            if true is not None:
                inside = p["interval"].low <= true <= p["interval"].high
                sums.setdefault("inside_interval", []).append(float(inside))
    return {key: float(np.mean(values)) for key, values in sums.items()}


def _score_interval(interval):
    return interval._replace(**{k: percent(getattr(interval, k)) for k in ("value", "low", "high")})


def _target_table(found, targets, i: int) -> str:
    target, rows = targets[i], []
    for laws, predictions in found:
        name, p = laws.task.name, predictions[i]
        loss, score = target.loss.get(name), target.score.get(name)
        rows.append([
            name, loss, p["loss_interval"],
            None if loss is None else f"{p['loss'] / loss - 1:+.2%}",
            None if score is None else f"{percent(score):.2f}", _score_interval(p["interval"]),
            f"{percent(p['score_error']):.2f}",
            None if score is None else f"{percent(p['score_from_true_loss']):.2f}",
            f"{percent(p['flops_score']):.2f}",
            f"{percent(p['single_score']):.2f}" if "single_score" in p else None,
        ])  # fmt: skip
    columns = ("task", "loss", "predicted [interval]", "error", "score", "chained [interval]", "se",
               "from true loss", "FLOPs", "single step")  # fmt: skip
    head = f"## {target.name}: N = {target.n:,.0f}, D = {target.d:,.0f}"
    return head + "\n\n" + report.markdown_table(columns, rows, digits=4)


def _law_table(found) -> str:
    rows = []
    for laws, predictions in found:
        data = laws.data
        fitted = evaluate(loss_law, laws.loss, data.n, data.d)
        error = np.abs(fitted / data.loss - 1).mean()
        rows.append([
            laws.task.name, *(f"{x:.4f}" for x in laws.loss.theta), f"{error:.2%}",
            *(f"{x:.4f}" for x in laws.score.theta), len(data.losses),
            _known(predictions[0]["spread"], "{:.4f}"),
            _known(percent(predictions[0]["score_spread"]), "{:.2f}"),
            _known(100 * predictions[0]["backtest"], "{:.2f}%"),
        ])  # fmt: skip
    columns = ("task", *STEP_1, "fit error", *(f"{x} (2)" for x in STEP_2), "checkpoints",
               "loss sd", "score sd", "largest size left out")  # fmt: skip
    return "## The laws\n\n" + report.markdown_table(columns, rows)


def _known(value: float, form: str) -> str:
    return form.format(value) if np.isfinite(value) else "not measured"


def _json(ladder: Ladder) -> dict:
    tasks = {
        laws.task.name: dict(
            step_1=laws.loss.values, step_2=laws.score.values, flops=laws.flops.values,
            single=laws.single.values if laws.single else None,
            checkpoints=len(laws.data.losses),
            targets={
                t.name: p | dict(true_loss=t.loss.get(laws.task.name),
                                 true_score=t.score.get(laws.task.name))
                for t, p in zip(ladder.targets, predictions)
            },
        )
        for laws, predictions in ladder.found
    }  # fmt: skip
    seen = [run.name for run in ladder.runs if not run.target]
    return dict(seen=seen, means=errors(ladder.found, ladder.targets), tasks=tasks)


def _seeds_table(ladders: dict[str, Ladder]) -> str:
    """Loss errors of every target, mean and spread over seeds."""
    first, rows = next(iter(ladders.values())), []
    for t, target in enumerate(first.targets):
        for k, (laws, _) in enumerate(first.found):
            name = laws.task.name
            relative, points, inside = [], [], []
            for ladder in ladders.values():
                p, true = ladder.found[k][1][t], ladder.targets[t]
                if name in true.loss:
                    relative.append(100 * (p["loss"] / true.loss[name] - 1))
                    points.append(100 * (p["score"] - true.score[name]))
                    inside.append(p["interval"].low <= true.score[name] <= p["interval"].high)
            if relative:
                both = (report.spread(x, "+.2f", ".2f") for x in (relative, points))
                rows.append([target.name, name, *both, f"{sum(inside)} of {len(inside)}"])
    columns = ("target", "task", "loss error, %", "score error, points", "inside the interval")
    return "## Over the seeds\n\n" + report.markdown_table(columns, rows) if rows else ""


def write(workdir, ladders: dict[str, Ladder]) -> dict[str, float]:
    """Writes the report of every seed; returns the flat metrics of eval/0.json, means of seeds."""
    workdir, sections, metrics = Path(workdir), [EXPLAINED], []
    if len(ladders) > 1:
        sections.append(_seeds_table(ladders))
    for seed, (_, found, targets) in ladders.items():
        sections += [f"# {seed}"] if seed else []
        sections += [_target_table(found, targets, i) for i in range(len(targets))]
        sections.append(_law_table(found))
        means = errors(found, targets)
        if means:
            rows = [[key.replace("_", " "), value] for key, value in means.items()]
            sections.append("Means over tasks:\n\n" + report.markdown_table(("", "mean"), rows))
        sections.append(report.problems(_warnings(found, targets)))
        metrics.append(_metrics(ladders[seed], means))
    data = {seed or "ladder": _json(ladder) for seed, ladder in ladders.items()}
    report.write(workdir, "Ladder", sections, data, name="ladder")
    plot(workdir / "ladder.png", *next(iter(ladders.values()))[1:])
    return {key: float(np.mean([m[key] for m in metrics])) for key in metrics[0]}


def _warnings(found, targets) -> dict[str, list[str]]:
    """{tasks: warnings}; one that holds for every target of a task is said once."""
    said: dict[str, list[str]] = {}
    for laws, predictions in found:
        for text in dict.fromkeys(w for p in predictions for w in p["warnings"]):
            names = [t.name for t, p in zip(targets, predictions) if text in p["warnings"]]
            where = "" if len(names) == len(targets) else f" ({', '.join(names)})"
            said.setdefault(f"{laws.task.name}{where}", []).append(text)
    return said


def _metrics(ladder: Ladder, means: dict[str, float]) -> dict[str, float]:
    out = dict(means, runs=float(sum(not run.target for run in ladder.runs)))
    for laws, predictions in ladder.found:
        for target, p in zip(ladder.targets, predictions):
            keys = ("loss", "score", "flops_score", "score_error")
            out |= {f"{laws.task.name}/{target.name}/{key}": float(p[key]) for key in keys}
    return out


def plot(path, found, targets) -> None:
    """Step 1 above, step 2 below, one column a task."""
    across = len(found)
    with report.figure(path, size=(3.2 * max(across, 2), 6)) as figure:
        axes = figure.subplots(2, across, squeeze=False)
        for i, (laws, predictions) in enumerate(found):
            _plot_loss(axes[0, i], laws, predictions, targets)
            _plot_score(axes[1, i], laws, predictions, targets)


def _plot_loss(axes, laws, predictions, targets):
    data, name = laws.data, laws.task.name
    for number, n in enumerate(np.unique(data.n)):
        of, colour = data.n == n, f"C{number}"
        far = max([data.d.max(), *(t.d for t in targets)])
        grid = np.geomspace(data.d.min(), far, 60)
        axes.plot(grid, evaluate(loss_law, laws.loss, np.full(60, n), grid), color=colour, lw=1)
        axes.plot(data.d[of], data.loss[of], "o", ms=4, color=colour, label=f"{_short(n)}")
    for target, p in zip(targets, predictions):
        axes.plot(target.d, p["loss"], "x", color="black")
        if name in target.loss:
            axes.plot(target.d, target.loss[name], "*", color="tab:red")
    axes.set(xscale="log", xlabel="tokens", title=name)
    axes.xaxis.set_minor_formatter("")  # labels of 2, 3, 4 x 10^n run into each other
    axes.set_ylabel("bits per byte", fontsize=8)
    axes.legend(fontsize=6, title="N", title_fontsize=6)


def _plot_score(axes, laws, predictions, targets):
    data, name = laws.data, laws.task.name
    axes.plot(data.losses, data.scores, ".", ms=2, alpha=0.4, color="grey", label="checkpoints")
    low = min([data.losses.min(), *(p["loss"] for p in predictions)])
    grid = np.linspace(0.9 * low, data.losses.max(), 100)
    axes.plot(grid, evaluate(score_law, laws.score, grid), color="C0", lw=1)
    for i, (target, p) in enumerate(zip(targets, predictions)):
        value, low, high = (float(x) for x in p["interval"][:3])
        axes.errorbar(
            p["loss"], value, [[value - low], [high - value]], fmt="x", color="black", capsize=3,
            label="predicted" if i == 0 else None,
        )  # fmt: skip
        if name in target.score:
            label = "true" if i == 0 else None
            axes.plot(
                target.loss[name], target.score[name], "*", color="tab:red", label=label, zorder=3
            )
    axes.axhline(laws.task.chance, ls=":", color="tab:red", lw=0.8)
    axes.set_xlabel("bits per byte", fontsize=8)
    axes.set_ylabel("score", fontsize=8)
    axes.legend(fontsize=6)


def _short(n: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"
