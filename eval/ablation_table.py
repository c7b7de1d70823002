"""Report of the task `runs`: one row per group of runs, mean ± spread over its seeds.

Runs are named "GROUP/seedN"; a run's numbers are those of the newest file in its eval/ folder and,
under "train/", those it logged last. Groups that have no such number leave the cell empty. Writes
report.md, report.json and report.png into the workdir of the task.
"""

import re
from pathlib import Path

import numpy as np

from eval.common import read_rows
from eval.run import REFERENCES, write_json
from eval.scaling.curves import evaluations
from eval.scaling.report import figure as drawn
from eval.scaling.report import markdown_table

SHOWN = 8  # columns when config.evaluation.table.metrics names none: of these, or the first ones
HEADLINES = (
    "retrieval/train_top1_classifier", "retrieval/train_top1_latent",
    "retrieval/held_out_top1_classifier", "retrieval/held_out_top1_latent", "kid/kid",
    "captioning/held_out_loss", "captioning/train_accuracy", "questions/accuracy",
)  # fmt: skip


def collect(workdir: Path, names=()) -> dict[str, list[dict]]:
    """{group: [numbers of each seed]} in the order of `names`, or of the folders found."""
    if not names:
        found = {p.parent.parent for p in workdir.rglob("eval/*.json")} - {workdir}
        names = sorted((str(p.relative_to(workdir)) for p in found), key=_natural)
    groups: dict[str, list[dict]] = {}
    for name in names:
        evaluation = evaluations(workdir / name)
        if evaluation is None:
            raise FileNotFoundError(f"report: run {name!r} in {workdir} has no eval/<step>.json")
        logged = [r for r in read_rows(workdir / name / "metrics.jsonl") if "train/loss" in r]
        numbers = evaluation | (logged[-1] if logged else {})
        groups.setdefault(re.sub(r"/seed[^/]*$", "", name), []).append(numbers)
    if not groups:
        raise FileNotFoundError(f"report: no run in {workdir} has an eval/<step>.json")
    return groups


def _natural(text: str):
    """Sort key that orders numbers inside names by value."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(p), "") if i % 2 else (1, 0.0, p) for i, p in enumerate(parts)]


def _is_reference(key: str) -> bool:
    return any(key.endswith(f"_{suffix}") for suffix in REFERENCES)


def _columns(groups, wanted) -> list[str]:
    runs = [run for seeds in groups.values() for run in seeds]
    common = [k for k in runs[0] if all(k in run for run in runs) and k != "step"]
    missing = [k for k in wanted if not any(k in run for run in runs)]
    if missing:
        raise ValueError(
            f"config.evaluation.table.metrics={missing[0]!r}: runs have {', '.join(common)}"
        )
    usual = [k for k in common if not re.search(r"^train/|/seconds$", k) and not _is_reference(k)]
    return list(wanted) or [k for k in HEADLINES if k in usual] or usual[:SHOWN]


def _summary(seeds: list[dict], key: str) -> dict | None:
    if not all(key in run for run in seeds):
        return None
    values = [float(run[key]) for run in seeds]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": spread, "n": len(values), "values": values}


def _markdown(title, columns, summary, levels, seeds) -> str:
    def cell(s):
        if s is None:
            return ""
        return f"{s['mean']:.4g}" + ("" if s["std"] is None else f" ± {s['std']:.2g}")

    rows = [
        (group, seeds[group], *(cell(metrics[c]) for c in columns))
        for group, metrics in summary.items()
    ]
    for suffix, values in levels.items():
        rows.append((f"*{suffix.replace('_', ' ')}*", "", *(values.get(c) for c in columns)))
    table = markdown_table(("run", "seeds", *columns), rows)
    return f"# {title}\n\nMean ± standard deviation over seeds.\n\n{table}"


def _levels(groups, columns) -> dict[str, dict[str, float]]:
    """Chance levels and baselines of the columns, averaged over all runs."""
    runs = [run for seeds in groups.values() for run in seeds]
    levels: dict[str, dict[str, float]] = {}
    for suffix in REFERENCES:
        for column in columns:
            values = [run[f"{column}_{suffix}"] for run in runs if f"{column}_{suffix}" in run]
            if values:
                levels.setdefault(suffix, {})[column] = float(np.mean(values))
    return levels


def _plot(path: Path, title, columns, summary, levels):
    names = list(summary)
    # Names that differ in a number are points of a curve; others have no order to draw a line in.
    line = "-" if len({re.sub(r"[\d.]+", "", name) for name in names}) == 1 else ""
    across = min(4, len(columns))
    down = -(-len(columns) // across)
    with drawn(path, size=(3.4 * across, 2.8 * down)) as figure:
        for i, column in enumerate(columns):
            axes = figure.add_subplot(down, across, i + 1)
            cells = {x: summary[name][column] for x, name in enumerate(names)}
            cells = {x: c for x, c in cells.items() if c}
            axes.set_title(column, fontsize=9)
            axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
            axes.set_xlim(-0.5, len(names) - 0.5)
            if not cells:
                continue
            means, spreads = zip(*((c["mean"], c["std"] or 0.0) for c in cells.values()))
            axes.errorbar(list(cells), means, spreads, marker="o", ls=line, capsize=3)
            for x, c in cells.items():
                axes.plot([x] * c["n"], c["values"], ".", color="grey", alpha=0.6)
            for suffix, values in levels.items():
                if column in values:
                    axes.axhline(values[column], ls=":", color="tab:red", label=suffix)
                    axes.legend(fontsize=7)
        figure.suptitle(title)


def build(config):
    """Evaluator without a model: reads the runs below workdir and writes the report."""
    options = config.evaluation.table
    names = tuple(run[0] for run in config.runs)

    def evaluate(model, params, *, step, rng, workdir):
        workdir = Path(workdir)
        # A run that made a tokenizer is what the others read, and no row.
        rows = [name for name in names if name.partition("/")[0] != "tokenizer"]
        groups = collect(workdir, rows)
        columns = _columns(groups, options.metrics)
        summary = {g: {c: _summary(s, c) for c in columns} for g, s in groups.items()}
        levels = _levels(groups, columns)
        seeds = {group: len(runs) for group, runs in groups.items()}
        title = options.title or workdir.name
        report = _markdown(title, columns, summary, levels, seeds)
        (workdir / "report.md").write_text(report)
        write_json(workdir / "report.json", {"groups": summary, "levels": levels})
        _plot(workdir / "report.png", title, columns, summary, levels)
        print(report, flush=True)
        return {"groups": float(len(groups)), "runs": float(sum(seeds.values()))}

    return evaluate
