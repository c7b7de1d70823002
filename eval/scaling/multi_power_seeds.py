"""Report of configs/multi_power_law.py: predictions and schedules over seeds.

Reads, for every seed of config.runs, the fit's report and the runs' last held-out losses. Leaves
report.md, report.json, report.png and the curves behind them (curves.json) in the workdir.
"""

import json
from pathlib import Path

import numpy as np

from eval.run import write_json
from eval.scaling import report
from eval.scaling.curves import evaluations, read_curve

LOSS = "losses/held_out_loss"
FIT, BEST, RIVALS = "law", "optimised", ("cosine", "wsd")


def collect(workdir: Path, names) -> dict[str, dict]:
    """{seed: dict(law: the fit's report, finals: {schedule: last held-out loss})}."""
    seeds: dict[str, dict] = {}
    for name in names:
        seed, _, run = name.partition("/")
        entry = seeds.setdefault(seed, dict(finals={}))
        if run == FIT:
            entry["law"] = json.loads((workdir / name / "report.json").read_text())
            continue
        found = evaluations(workdir / name)
        if found is None:
            raise FileNotFoundError(f"report: run {name!r} in {workdir} has no eval/<step>.json")
        entry["finals"][run] = found[LOSS]
    return seeds


def summary(seeds: dict[str, dict]) -> dict:
    """The numbers of the report: per seed and whether each claim holds for it."""
    rows = {}
    for seed, entry in seeds.items():
        law, finals = entry["law"], entry["finals"]
        predicted = {n: f for n, f in law["finals"].items() if f["role"] == "predicted"}
        best = law["optimised"]["final"]
        rows[seed] = dict(
            relative_error={
                label: found["average"]["PredE"] for label, found in law["laws"].items()
            },
            worst_error=law["laws"][law["chosen"]]["average"]["WorstE"],
            last_error={n: f["error"] for n, f in predicted.items()},
            order_right=law["order_right"],  # None where only one curve is predicted
            finals=finals,
            predicted_best=best,
            best_error=best / finals[BEST] - 1,
            gains={rival: finals[rival] - finals[BEST] for rival in RIVALS},
            problems=law["laws"][law["chosen"]]["problems"],
        )
    chosen = next(iter(seeds.values()))["law"]["chosen"]
    errors = [r["relative_error"][chosen] for r in rows.values()]
    claims = {
        "unseen schedules within 1 %": [e < 0.01 for e in errors],
        "their order right": [r["order_right"] is not False for r in rows.values()],
        **{
            f"optimised below {rival}": [r["gains"][rival] > 0 for r in rows.values()]
            for rival in RIVALS
        },
    }
    return dict(chosen=chosen, seeds=rows, claims=claims)


def logs(workdir: Path, names) -> dict[str, dict]:
    """{seed: {run: held-out losses and rates as logged}}."""
    found: dict[str, dict] = {}
    for name in names:
        seed, _, run = name.partition("/")
        if run != FIT:
            loss = read_curve(workdir / name, y=f"eval/{LOSS}")
            rate = read_curve(workdir / name, y="train/lr")
            found.setdefault(seed, {})[run] = dict(
                step=loss.steps.astype(int).tolist(), loss=loss.values.tolist(),
                rate_step=rate.steps.astype(int).tolist(), rate=rate.values.tolist(),
            )  # fmt: skip
    return found


def _sections(found: dict) -> list[str]:
    rows, seeds = found["seeds"], list(found["seeds"])
    labels = next(iter(rows.values()))["relative_error"]
    errors = [
        (label, *(f"{100 * rows[s]['relative_error'][label]:.2f} %" for s in seeds))
        for label in labels
    ]
    last = [
        (name, *(f"{100 * rows[s]['last_error'][name]:+.2f} %" for s in seeds))
        for name in next(iter(rows.values()))["last_error"]
    ]
    last.append((BEST, *(f"{100 * rows[s]['best_error']:+.2f} %" for s in seeds)))
    finals = [
        (name, *(f"{rows[s]['finals'][name]:.4f}" for s in seeds),
         report.spread([rows[s]["finals"][name] for s in seeds]))
        for name in next(iter(rows.values()))["finals"]
    ]  # fmt: skip
    claims = [
        (claim, *("yes" if held else "NO" for held in per_seed))
        for claim, per_seed in found["claims"].items()
    ]
    table = report.markdown_table
    return [
        "Mean relative error on the schedules that were not fitted:\n\n"
        + table(("law", *seeds), errors),
        f"Error of the last loss by `{found['chosen']}`, schedules nobody fitted:\n\n"
        + table(("schedule", *seeds), last),
        "Held-out loss at the end:\n\n" + table(("schedule", *seeds, "mean"), finals),
        table(("claim", *seeds), claims),
        report.problems({seed: row["problems"] for seed, row in rows.items()}),
    ]


def _draw(path, found: dict) -> None:
    names = list(next(iter(found["seeds"].values()))["finals"])
    with report.figure(path, size=(7, 3.5)) as figure:
        axes = figure.subplots()
        for i, (seed, row) in enumerate(found["seeds"].items()):
            axes.plot(range(len(names)), [row["finals"][n] for n in names], "o-", label=seed)
            axes.plot([len(names) - 1], [row["predicted_best"]], "x", color=f"C{i}", ms=9)
        axes.set_xticks(range(len(names)), names, rotation=20)
        axes.set(ylabel="held-out loss at the end (x: predicted)")
        axes.legend()


def build(config):
    """Evaluator without a model: the report over the seeds of config.runs."""
    names = tuple(run[0] for run in config.runs)

    def evaluate(model, params, *, step, rng, workdir):
        found = summary(collect(Path(workdir), names))
        report.write(workdir, "Multi-power law on tiny runs", _sections(found), found)
        _draw(Path(workdir) / "report.png", found)
        write_json(Path(workdir) / "curves.json", logs(Path(workdir), names))
        return {
            claim.replace(" ", "_"): float(np.mean(held)) for claim, held in found["claims"].items()
        }

    return evaluate
