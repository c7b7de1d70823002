"""What configs/multi_power_law.py prints, writes and draws about its fits."""

from pathlib import Path

import numpy as np

from eval.scaling import fitting, intervals, laws, report


def write(workdir: Path, options, result: dict) -> dict[str, float]:
    """report.md, report.json, curves.png, schedule.png; returns the headline metrics."""
    rows, chosen = result["rows"], result["chosen"]
    fitted, unseen = result["fitted"], result["unseen"]
    scores = {
        label: {o.name: laws.scores(predicted[o.name], o.losses) for o in (*fitted, *unseen)}
        for label, predicted in result["tables"].items()
    }
    averages = {
        label: laws.mean_scores([by_curve[o.name] for o in (unseen or fitted)])
        for label, by_curve in scores.items()
    }
    finals, final_rows, order = _finals(result)
    sections = [
        _curve_section(fitted, unseen, result["notes"]),
        _law_section(rows, averages, bool(unseen)),
        _parameter_section(rows, chosen, result.get("samples")),
        _final_section(final_rows, order, chosen, options),
    ]
    data = dict(
        laws={
            row.label: dict(
                parameters=dict(zip(row.law.names, row.theta)), objective=row.objective,
                problems=row.problems, stopped=row.stopped, scores=scores[row.label],
                average=averages[row.label],
            )
            for row in rows
        },
        chosen=chosen.label, finals=finals, order_right=order, notes=result["notes"],
    )  # fmt: skip
    metrics = {f"{k}": v for k, v in averages[chosen.label].items()}
    if "left_out" in result:
        sections.append(_left_out_section(result["left_out"][0]))
        data["left_out"] = result["left_out"][0]
        metrics["left_out_PredE"] = np.mean([s["PredE"] for s in data["left_out"].values()])
    if "search" in result:
        section, found = _search_section(workdir, result)
        sections.append(section)
        data["optimised"] = found
        metrics["optimised_final_loss"] = found["predicted"]["optimised"]
        _draw_schedules(workdir / "schedule.png", result)
    sections.append(report.problems({row.label: row.problems for row in rows}))
    report.write(workdir, "Loss curves from learning-rate schedules", sections, data)
    _draw_curves(workdir / "curves.png", result)
    if order is not None:
        metrics["order_right"] = float(order)
    return {key: float(value) for key, value in metrics.items()}


def _curve_section(fitted, unseen, notes) -> str:
    lines = [
        (o.name, role, len(o.schedule.lrs), len(o.index), o.schedule.peak, o.schedule.lrs[-1],
         o.losses[-1])
        for role, group in (("fitted", fitted), ("predicted", unseen)) for o in group
    ]  # fmt: skip
    columns = ("curve", "role", "steps", "points", "peak", "last rate", "last loss")
    table = report.markdown_table(columns, lines)
    return "\n".join([table, *(f"- {note}" for note in notes)])


def _law_section(rows, averages, unseen: bool) -> str:
    what = "curves that were not fitted" if unseen else "fitted curves (none is left to predict)"
    keys = ("MAE", "RMSE", "PredE", "WorstE", "R2")
    lines = [
        (row.label, f"{row.objective:.4g}", *(f"{averages[row.label][k]:.6f}" for k in keys))
        for row in rows
    ]
    table = report.markdown_table(("law", "training objective", *keys), lines)
    return f"Averages over the {what}:\n\n{table}"


def _parameter_section(rows, chosen, samples) -> str:
    parts = []
    for row in rows:
        values = list(row.theta)
        if row is chosen and samples is not None:
            p = len(row.theta)
            found = intervals.interval(row.theta, samples[:, :p])
            values = [
                intervals.Interval(v, low, high, found.level)
                for v, low, high in zip(found.value, found.low, found.high)
            ]
        pairs = ", ".join(f"{n} {report.cell(v, 5)}" for n, v in zip(row.law.names, values))
        parts.append(f"- {row.label}: {pairs}")
    return "Parameters (90 % intervals where there are any):\n\n" + "\n".join(parts)


def _finals(result):
    """({name: ...}, table rows, whether observed final losses are ordered as predicted)."""
    chosen, names = result["chosen"], list(result["schedules"])
    seen = {o.name: o for o in (*result["fitted"], *result["unseen"])}
    p, found, lines = len(chosen.theta), {}, []
    for i, name in enumerate(names):
        value = result["finals"][i]
        entry = dict(predicted=value)
        if "samples" in result:
            entry["interval"] = intervals.interval(value, result["samples"][:, p + i])
        if "left_out" in result:
            entry["jackknife_error"] = result["left_out"][1].standard_error[i]
        if name in seen:
            o = seen[name]
            at = result["tables"][chosen.label][name][-1]
            entry |= dict(observed=o.losses[-1], at_observed=at, error=at / o.losses[-1] - 1)
        role = "fitted" if name in [o.name for o in result["fitted"]] else "predicted"
        found[name] = entry | dict(role=role)
        lines.append(
            (name, role, entry.get("interval", value), entry.get("jackknife_error"),
             entry.get("observed"), _percent(entry.get("error")))
        )  # fmt: skip
    unseen = [found[o.name] for o in result["unseen"]]
    order = None
    if len(unseen) > 1:
        order = bool(
            (np.argsort([u["at_observed"] for u in unseen])
             == np.argsort([u["observed"] for u in unseen])).all()
        )  # fmt: skip
    return found, lines, order


def _percent(value) -> str:
    return "" if value is None else f"{100 * value:+.2f} %"


def _final_section(lines, order, chosen, options) -> str:
    columns = ("schedule", "role", "predicted final loss", "leave-one-out s.e.", "last observed",
               "error there")  # fmt: skip
    table = report.markdown_table(columns, lines, digits=5)
    text = f"Final losses by the law `{chosen.label}`:\n\n{table}"
    if order is not None:
        text += f"\nOrder of the predicted curves' last losses right: {'yes' if order else 'no'}."
    return text


def _left_out_section(scored) -> str:
    lines = [(name, s["MAE"], s["PredE"], s["WorstE"]) for name, s in scored.items()]
    table = report.markdown_table(("left out", "MAE", "PredE", "WorstE"), lines)
    return f"Each fitted curve predicted from the others:\n\n{table}"


def _search_section(workdir, result):
    """The optimised schedule beside every schedule of as many steps, in one convention."""
    search, chosen = result["search"], result["chosen"]
    best = search.schedule
    with fitting.float64():
        rivals = {
            name: float(
                laws.final_loss(
                    chosen.theta, s.lrs[s.warmup :], peak=s.peak, before=s.lrs[: s.warmup].sum()
                )
            )
            for name, s in result["schedules"].items()
            if len(s.lrs) == len(best.lrs)
        }
    predicted = {"optimised": search.loss} | rivals
    lines = sorted(predicted.items(), key=lambda item: item[1])
    table = report.markdown_table(("schedule", "predicted final loss"), lines, digits=6)
    path = workdir / "schedule.csv"
    text = (
        f"Optimised schedule: {len(best.lrs)} steps, at the peak {best.peak:.4g} until update "
        f"{search.flat_until}, last rate {best.lrs[-1]:.3g}. Losses leave the warm-up's rise out: "
        f"compare differences.\n\n{table}\nTrain with it: `--config.steps={len(best.lrs)} "
        f"--config.optimizer.lr={best.peak:.6g} --config.schedule.warmup={best.warmup} "
        f"--config.schedule.name=from_file --config.schedule.path={path}`"
    )
    text += f"\n\nIts last loss by the whole law, as above: {result['best_final']:.5g}."
    data = dict(
        predicted=predicted, final=result["best_final"], flat_until=search.flat_until,
        last_rate=best.lrs[-1],
        peak=best.peak, steps=len(best.lrs), warmup=best.warmup, history=search.history,
    )  # fmt: skip
    return text, data


def _draw_curves(path, result) -> None:
    chosen = result["chosen"].label
    with report.figure(path, size=(8, 4.5)) as figure:
        axes = figure.subplots()
        for i, o in enumerate((*result["fitted"], *result["unseen"])):
            fitted = i < len(result["fitted"])
            dots, line = (".", "-") if fitted else ("x", "--")
            label = f"{o.name} ({'fitted' if fitted else 'predicted'})"
            axes.plot(o.index, o.losses, dots, color=f"C{i}", ms=4, alpha=0.6)
            axes.plot(
                o.index, result["tables"][chosen][o.name], line, color=f"C{i}", lw=1, label=label
            )
        last = [o.losses[-1] for o in (*result["fitted"], *result["unseen"])]
        middle = [o.losses[len(o.losses) // 8] for o in result["fitted"]]
        axes.set_ylim(min(last) - 0.1 * (max(middle) - min(last)), max(middle))
        axes.set(xlabel="update", ylabel="loss", title=chosen)
        axes.legend(fontsize=8)


def _draw_schedules(path, result) -> None:
    best = result["search"].schedule
    with report.figure(path, size=(8, 3.5)) as figure:
        axes = figure.subplots()
        for name, s in result["schedules"].items():
            if len(s.lrs) == len(best.lrs):
                axes.plot(s.lrs, lw=0.8, alpha=0.7, label=name)
        axes.plot(best.lrs, color="black", lw=2, label="optimised")
        axes.set(xlabel="update", ylabel="learning rate")
        axes.legend(fontsize=8)
