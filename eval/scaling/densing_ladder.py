"""Density of a ladder's targets: the two-step reference is fitted on the ladder itself."""

import numpy as np

from eval.scaling import densing, ladder, ladder_data, report


def references(laws, d0: float) -> densing.TwoStep:
    """Both steps of one task at d0 tokens; scores read beyond the losses seen are flagged."""
    seen = (float(laws.data.losses.min()), float(laws.data.losses.max()))
    return densing.ladder_reference(laws.loss, laws.score, d0, seen)


def measure(runs, tasks, options) -> list[dict]:
    """Density of every target on every task at every D0, and at the target's own tokens."""
    seen, rows = [run for run in runs if not run.target], []
    targets = [t for t in ladder.targets_of(runs, tasks, options.ladder) if t.score]
    for task in tasks:
        laws = ladder.fit(task, ladder.gather(seen, task, options.ladder), single=False)
        for target in targets:
            for d0 in (*options.d0, target.d):
                score = target.score[task.name]
                reference = references(laws, float(d0))
                size, flag = reference.size(score)
                rows.append(
                    dict(target=target.name, task=task.name, d0=float(d0), score=score,
                         size=size, n=target.n, density=size / target.n, flag=flag,
                         floor=reference.floor)
                )  # fmt: skip
    return rows


def sections(options) -> tuple[list[str], list[dict], dict[str, float]]:
    """(sections, rows, metrics) of the targets of config.fit.ladder."""
    tasks = ladder_data.make_tasks(options.ladder.tasks)
    rows = measure(ladder_data.read(options.ladder), tasks, options)
    cells = [
        [r["target"], r["task"], f"{r['d0']:.4g}", 100 * r["score"], f"{r['size']:.5g}",
         f"{r['density']:.5g}", r["floor"], r["flag"]]
        for r in rows
    ]  # fmt: skip
    columns = ("target", "task", "D0", "score, %", "effective size", "density", "loss floor at D0",
               "flag")  # fmt: skip
    text = (
        "## Targets of the ladder\n\nReference: both steps of the ladder at D0 tokens. An infinite "
        "density says that no size reaches the score after D0 tokens.\n\n"
    ) + report.markdown_table(columns, cells)
    finite = [r["density"] for r in rows if np.isfinite(r["density"])]
    metrics = dict(ladder_finite=len(finite), ladder_infinite=len(rows) - len(finite))
    return [text], rows, metrics
