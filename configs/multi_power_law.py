"""Multi-power law: loss curves of schedules nobody ran, and the schedule with the least loss.

    python main.py --config=configs/multi_power_law.py

Aims at the tables of arXiv 2503.12811 (fit on three schedules, predict six) and at its optimised
schedule, with the momentum law (arXiv 2408.11029) and a law of the step count beside it.

| variant | does | where, how long |
| --- | --- | --- |
| (none) | trains a 0.1 M Llama under five schedules, three seeds; fits three, predicts two, trains the optimised schedule, one report | 21 minutes of CPU |
| files | fits the curves you name; see below | seconds |
| published | the same on the paper's curves (config.fit.curves), by its recipe and converged | under a minute |
| debug | the default with few steps and one seed | under a minute |

Your own curves: a folder of runs or of CSVs, a list of them separated by commas. A run brings its
schedule (the logged rate); CSVs need a column `lr`, or a JSON list of schedules by curve name,
such as eval/scaling/published_schedules.json; names without a curve are predicted all the same.

    python main.py --config=configs/multi_power_law.py:files --config.fit.curves=runs/a,runs/b
    python main.py --config=configs/multi_power_law.py:files --config.fit.curves=DIR \\
        --config.fit.schedules=list.json --config.fit.fit="('a','b','c')" --config.fit.key=loss
    python main.py --config=configs/llama.py --config.schedule.name=from_file \\
        --config.schedule.path=runs/multi_power_law-files/schedule.csv

`:seeds=1` runs one seed instead of three. Leaves report.md, report.json, curves.png, schedule.csv and schedule.png in the workdir.
"""  # noqa: E501

import os
from pathlib import Path

from configs import common
from configs.loading import ROOT
from configs.multi_power_runs import DEBUG, FITTED, UNSEEN, trainings

PUBLIC = Path(os.environ.get("UNIFLUD_DATA", ROOT.parent / "shared" / "data"))
PUBLISHED_FIT = ("cosine_24000", "constant_24000", "wsdcon_9")


def fit_config(**overrides) -> dict:
    """The settings of a fit."""
    return (
        dict(
            curves="",  # file, run, folder, pattern, or several with commas between
            key="loss",  # column of the loss; runs here: train/loss or eval/...
            lr_key="",  # column of the rate where no list gives the schedule; "": lr, or train/lr
            first=-1,  # step that the log gives to the first update; -1: 1 for runs, 0 for CSVs
            schedules="",  # JSON list of schedules by curve name; "": the logged rates
            what_if=True,  # also predict the listed schedules that have no curve
            fit=("",)[:0],  # curves to fit; (): all
            predict=("",)[:0],  # curves to predict and score; (): all that are not fitted
            skip=0,  # updates left out at the start, if more than the warm-up
            bins=1,  # neighbouring rows averaged into one point: noisy training losses
            laws=("multi-power", "momentum", "chinchilla"),
            recipes=("converged", "published"),  # of the multi-power law's fit
            use="converged",  # part of the label of the fit to predict and to optimise with
            form="code",  # drops count from the first step ("code") or after the warm-up ("paper")
            least_beta=0.5,  # bound of the converged fit: below, beta and B are degenerate
            most_gamma=1.0,  # bound of the converged fit; at 1 drops act in steps, not in rate sums
            momentum=(0.99, 0.995, 0.999),  # lambdas of the momentum law, one fit each
            bootstrap=100,  # refits for intervals; 0: none
            over="points",  # what is resampled: points (blocks of residuals) | curves
            leave_out=True,  # predict each fitted curve from the others
            optimise=dict(
                steps=0,  # of the schedule; 0: as many as the shortest fitted curve has
                updates=10_000,  # of Adam; 0: no search
                least=0.0,  # the rate never falls below this
                decay=1.0,  # share of the run, its last, in which the rate may fall
            ),
        )
        | overrides
    )


def get_config(arg=""):
    """The config of one variant; see the table above."""
    a = common.parse_arg(arg, ("files", "published", "debug"), seeds=3)
    if a.variant == "files":
        return fit_only()
    if a.variant == "published":
        config = fit_only(
            curves=str(PUBLIC / "multi_power_law" / "csv_25"),
            schedules=str(ROOT / "eval/scaling/published_schedules.json"),
            fit=PUBLISHED_FIT,
            recipes=("published", "converged"),
            use="published",
            bootstrap=20,  # each is the whole recipe
        )
        config.fit.optimise.steps = 24_000
        return config
    if a.variant == "debug":
        wsd = {"wsd": ("schedule.name=wsd", "schedule.decay=12")}
        two = {name: FITTED[name] for name in ("constant", "cosine")}
        return trainings((0,), two, wsd, DEBUG, ("fit.bootstrap=3", "fit.optimise.updates=500"))
    return trainings(range(a.seeds), FITTED, UNSEEN)


def fit_only(**overrides):
    """Task fit on curves that are there."""
    config = common.base(task="fit", evals=("multi_power_law",))
    config.fit = fit_config(**overrides)
    return config
