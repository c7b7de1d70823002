"""Evaluator "densing": densities of a table of models with their trend, and of a ladder's targets.

Reads config.fit.table and dates, or config.fit.ladder.runs, or both. Writes densing.md,
densing.json, densing.csv (every model) and densing.png.
"""

import csv
import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.scaling import curves, densing, densing_ladder, densing_trend, fitting, intervals, report


class Models(NamedTuple):
    """Rows of a table that have a release date."""

    names: np.ndarray
    families: np.ndarray
    sizes: np.ndarray  # [n] in the table's unit
    days: np.ndarray  # since config.fit.origin; NaN: no date
    table: dict[str, np.ndarray]

    def score(self, metrics) -> np.ndarray:
        """[n] mean of the metrics, NaN where one is missing."""
        for metric in metrics:
            if metric not in self.table or self.table[metric].dtype.kind != "f":
                known = ", ".join(k for k, v in self.table.items() if v.dtype.kind == "f")
                raise ValueError(f"config.fit.metrics={metric!r}: the table has {known}")
        return np.mean([self.table[metric] for metric in metrics], axis=0)


class Densities(NamedTuple):
    """Of one choice of reference, metric and sizes."""

    reference: densing.Family
    fit: fitting.Fit
    index: np.ndarray  # rows of Models that are on the axis of time
    scores: np.ndarray
    values: np.ndarray
    flags: list[str]


def _day(text: str, origin: datetime.date, where: str) -> float:
    try:
        return float((datetime.date.fromisoformat(text.strip()) - origin).days)
    except ValueError:
        raise ValueError(f"{where}: {text!r} is no date like 2024-05-31") from None


def read(options) -> Models:
    """The table with its dates."""
    c, table = options.columns, curves.read_table(Path(options.table).expanduser())
    for key in (c.model, c.family, c.size):
        if key not in table:
            raise ValueError(f"config.fit.columns: {options.table} has no column {key!r}")
    origin = datetime.date.fromisoformat(options.origin)
    if options.dates:
        dated = curves.read_table(Path(options.dates).expanduser())
        for key in (c.dated, c.date):
            if key not in dated:
                raise ValueError(f"config.fit.columns: {options.dates} has no column {key!r}")
        dates = dict(zip(dated[c.dated].tolist(), dated[c.date].tolist()))
        texts = [dates.get(name, "") for name in table[c.model].tolist()]
    elif c.date in table:
        texts = [str(text) for text in table[c.date]]
    else:
        raise ValueError(
            f"config.fit.dates='': the table has no column {c.date!r}; name a file of dates"
        )
    where = options.dates or options.table
    days = [_day(text, origin, where) if text.strip() else np.nan for text in texts]
    return Models(table[c.model], table[c.family], table[c.size], np.array(days), table)


def measure(models: Models, options, *, family="", metrics=(), sizes=None) -> Densities:
    """Densities of the models on the axis of time, by one reference family and one score."""
    family, metrics = family or options.reference, metrics or options.metrics
    sizes = models.sizes if sizes is None else sizes
    floors = dict(options.floors)
    floor = float(np.mean([floors.get(metric, 0.0) for metric in metrics]))
    score = models.score(metrics)
    of = (models.families == family) & np.isfinite(score) & np.isfinite(sizes)
    if not of.any():
        known = ", ".join(dict.fromkeys(models.families.tolist()))
        raise ValueError(f"config.fit.reference={family!r}: the table's families are {known}")
    reference, fit = densing.fit_family(sizes[of], score[of], floor)
    reference = reference._replace(margins=(options.chance, options.saturated))
    on = np.flatnonzero((models.days >= 0) & np.isfinite(score) & np.isfinite(sizes))
    found = [densing.density(reference, score[i], sizes[i]) for i in on]
    values = np.array([e.size for e in found])
    return Densities(reference, fit, on, score[on], values, [e.flag for e in found])


def trend_of(models: Models, d: Densities, options, rule="") -> tuple:
    """(trend, interval of its slope over resamples of models)."""
    rule = rule or options.envelope
    trend = densing_trend.fit(models.days[d.index], d.values, rule)
    slopes = densing_trend.bootstrap(
        models.days[d.index], d.values, draws=options.draws, seed=0, rule=rule
    )
    return trend, intervals.interval(trend.a, slopes, options.level), slopes


def doubling(interval) -> intervals.Interval:
    """Days in which density doubles, from an interval of slopes; inf where it may not grow."""
    days = lambda a: np.log(2) / a if a > 0 else np.inf  # noqa: E731
    value, low, high = (days(float(x)) for x in interval[:3])
    return intervals.Interval(value, high, low, interval.level)


def with_sizes(models: Models, mixtures, which: int) -> np.ndarray:
    """Sizes with those of mixtures of experts replaced: which = 1 active, 2 total."""
    given = {row[0]: float(row[which]) for row in mixtures}
    return np.array([given.get(n, s) for n, s in zip(models.names.tolist(), models.sizes)])


def sensitivity(models: Models, options) -> list[list]:
    """Rows (what is changed, to what, trend and its interval): one choice at a time."""
    counts = {f: len(set(models.sizes[models.families == f])) for f in models.families.tolist()}
    choices: list[tuple[str, str, dict, str]] = [("as configured", "", {}, "")]
    choices += [("envelope", r, {}, r) for r in densing_trend.RULES if r != options.envelope]
    choices += [
        ("sizes", "active parameters", dict(sizes=with_sizes(models, options.mixtures, 1)), ""),
        ("sizes", "total parameters", dict(sizes=with_sizes(models, options.mixtures, 2)), ""),
    ]
    metrics = [name for name, _ in options.floors if name in models.table]
    choices += [("metric", m, dict(metrics=(m,)), "") for m in metrics if (m,) != options.metrics]
    choices.append(("metric", f"mean of {len(metrics)}", dict(metrics=tuple(metrics)), ""))
    choices += [
        ("reference", f, dict(family=f), "")
        for f, count in counts.items()
        if count >= 4 and f != options.reference
    ]
    rows = []
    for what, name, change, rule in choices:
        try:
            d = measure(models, options, **change)
            trend, interval, _ = trend_of(models, d, options, rule)
        except fitting.FitError as error:
            rows.append([what, name, None, None, None, None, f"no fit: {error}"])
            continue
        flagged = sum(f in (densing.CEILING, densing.CHANCE) for f in d.flags)
        rows.append([what, name, len(d.index), len(trend.frontier), interval, doubling(interval),
                     f"{flagged} without a density" if flagged else ""])  # fmt: skip
    return rows


def _table_sections(workdir: Path, options) -> tuple[list[str], dict, dict]:
    """(sections, JSON, metrics) of the table of models."""
    models = read(options)
    d = measure(models, options)
    trend, slope, slopes = trend_of(models, d, options)
    days, names = models.days[d.index], models.names[d.index]
    order = np.argsort(days, kind="stable")
    metric = " + ".join(options.metrics)
    twice, r = doubling(slope), d.reference
    found = sum(np.isfinite(models.days) & (models.days >= 0))
    head = (
        f"Reference: {options.reference} by {metric}, S = {r.floor:g} + {r.c:.6f} "
        f"/ (1 + exp(-{r.g:.6f} (ln N - {r.l:.6f}))), root mean square error "
        f"{np.sqrt(2 * d.fit.cost / max(1, (models.families == options.reference).sum())):.5f}. "
        f"{len(d.index)} models with date and score ({len(models.names) - found} rows have no date "
        f"or an earlier one).\n\nln(density) = A t + B over the {options.envelope!r} envelope: "
        f"A = {report.cell(slope)} a day, B = {trend.b:.4f}, R2 = {trend.r2:.4f}; doubling in "
        f"{report.cell(twice)} days ({options.level:.0%} interval of {len(slopes)} resamples of "
        f"models, median slope {np.median(slopes):.4g})."
    )
    frontier = [[int(days[i]), names[i], models.sizes[d.index[i]], d.scores[i],
                 f"{d.values[i]:.5f}", d.flags[i]] for i in trend.frontier]  # fmt: skip
    columns = ("day", "model", "size", "score", "density", "flag")
    sections = [head, "## Frontier\n\n" + report.markdown_table(columns, frontier)]
    flagged = [[names[i], d.scores[i], str(d.values[i])[:8], d.flags[i]] for i in order
               if d.flags[i]]  # fmt: skip
    if flagged:
        sections.append("## Not to be trusted without a look\n\n" + report.markdown_table(
            ("model", "score", "density", "why"), flagged))  # fmt: skip
    without = densing_trend.without_each(days, d.values, models.families[d.index], options.envelope)
    moved = [[f, t.a, t.doubling] for f, t in without.items() if abs(t.a / trend.a - 1) > 1e-9]
    columns = ("left out", "A", "doubling, days")
    text = "## Without one family\n\nThose that move the line; the others do not.\n\n"
    sections.append(text + report.markdown_table(columns, moved))
    mixed = mixtures(models, d, options)
    if mixed:
        columns = ("model", "size", "density", "active", "density", "total", "density")
        text = "## Active or total parameters\n\n"
        sections.append(text + report.markdown_table(columns, mixed))
    rows = sensitivity(models, options) if options.sensitivity else []
    if rows:
        columns = ("changed", "to", "models", "frontier", "A [interval]", "doubling, days", "")
        sections.append("## Sensitivity\n\n" + report.markdown_table(columns, rows))
    _csv(workdir / "densing.csv", models, d, trend, order)
    _plot(workdir / "densing.png", options, models, d, trend, slopes)
    data = dict(reference=d.fit.values, a=slope, b=trend.b, r2=trend.r2, doubling=twice,
                frontier=frontier, flagged=flagged, sensitivity=rows, mixtures=mixed,
                without={f: t.a for f, t in without.items()})  # fmt: skip
    metrics = dict(slope=trend.a, slope_low=slope.low, slope_high=slope.high, r2=trend.r2,
                   doubling_days=trend.doubling, doubling_low=twice.low, doubling_high=twice.high,
                   models=len(d.index), frontier=len(trend.frontier),
                   saturated=d.flags.count(densing.CEILING))  # fmt: skip
    return sections, data, metrics


def mixtures(models: Models, d: Densities, options) -> list[list]:
    """Rows of the mixtures of experts: size and density by the table, active, total parameters."""
    rows = []
    for name, *counts in options.mixtures:
        for i in np.flatnonzero(models.names == name):
            score = float(models.score(options.metrics)[i])
            row = [name]
            for size in (float(models.sizes[i]), *map(float, counts)):
                row += [size, densing.density(d.reference, score, size).size]
            rows.append(row)
    return rows


def _csv(path: Path, models, d, trend, order) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    on_line = set(trend.frontier.tolist())
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("day", "model", "family", "size", "score", "density", "flag", "frontier"))
        for i in order:
            j = d.index[i]
            writer.writerow((int(models.days[j]), models.names[j], models.families[j],
                             models.sizes[j], d.scores[i], d.values[i], d.flags[i],
                             int(i in on_line)))  # fmt: skip


def _plot(path, options, models, d, trend, slopes) -> None:
    days = models.days[d.index]
    finite = np.isfinite(d.values) & (d.values > 0)
    with report.figure(path, size=(7, 4.5)) as figure:
        axes = figure.subplots()
        axes.plot(days[finite], d.values[finite], ".", color="grey", label="models")
        axes.plot(days[trend.frontier], d.values[trend.frontier], "o", color="C0", label="frontier")
        for i in trend.frontier:
            label = models.names[d.index[i]].split("/")[-1]
            axes.annotate(label, (days[i], d.values[i]), fontsize=6, xytext=(3, 3),
                          textcoords="offset points")  # fmt: skip
        grid = np.linspace(days.min(), days.max(), 50)
        text = f"doubling in {trend.doubling:.0f} days"
        axes.plot(grid, np.exp(trend.a * grid + trend.b), color="C0", lw=1, label=text)
        for i in np.flatnonzero(d.values == np.inf):
            axes.axvline(days[i], color="tab:red", lw=0.5, ls=":")
        metric = " + ".join(options.metrics)
        axes.set(yscale="log", xlabel=f"days since {options.origin}")
        axes.set_ylabel(f"density by {options.reference}, {metric}")
        axes.legend(fontsize=7)


def build(config):
    """Evaluator without a model; see the module."""
    options = config.fit

    def evaluate(model, params, *, step, rng, workdir):
        workdir, sections, data, metrics = Path(workdir), [], {}, {}
        if not options.table and not options.ladder.runs:
            raise ValueError(
                "config.fit.table='' and config.fit.ladder.runs='': name a table of scores "
                "(configs/densing.py:fit,table=...,dates=...) or a ladder (runs=...)"
            )
        if options.table:
            sections, data, metrics = _table_sections(workdir, options)
        if options.ladder.runs:
            more, found, numbers = densing_ladder.sections(options)
            sections, metrics = sections + more, metrics | numbers
            data = data | dict(ladder=found)
        report.write(workdir, "Density", sections, data, name="densing")
        return {key: float(value) for key, value in metrics.items()}

    return evaluate
