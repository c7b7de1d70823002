"""Model ladders: small runs that predict the scores of a large one before it is trained.

    python main.py --config=configs/ladder.py
    python main.py --config=configs/ladder.py:fit,runs=RUNS.json

Aims at the table of arXiv 2412.04403 (OLMo 2 7B-4T from 16 runs: 3.8 points, 5.9 % relative error
over eight tasks). The default trains a tiny ladder of this codebase's own on text, six sizes by
three budgets with three seeds; the two largest are held out. Then both steps of the prediction,
size and tokens to bits per byte and bits per byte to accuracy, with intervals and with what speaks
against them: ladder.md, ladder.json, ladder.png. A killed command goes on where it was.

| variant | does | where, how long |
| --- | --- | --- |
| (none) | 54 runs of 31,000 to 180,000 parameters, then the fit | 2 CPU cores, half an hour |
| debug | seven tiny runs of a few steps, one held out, then the fit | minutes |
| fit,runs=R | the fit alone, of R (below) | seconds |
| paper | the paper's 16 runs on your own texts (config.data.path), the fit | accelerators |
| 190m, 370m, 600m, 760m, 1.3b, 3b, 7b, 13b | one run of 20 N tokens | accelerators |
| 7b-4t, 13b-5t | the paper's targets | pods |
| 31k, 49k, 72k, 98k, 136k, 180k | one run of the tiny ladder | a CPU core, a minute |

A run of another budget: configs/ladder.py:190m,multiplier=10 (times 20 N tokens). R is a folder of
runs of this codebase, or of the runs.json that a report leaves (family=llama keeps one of several
families), or a JSON list of runs with CSV files as the paper's authors published them
(eval/scaling/ladder_data.py; folder=DIR says where the files are; loss=c4 goes through C4's loss).
"""

from ml_collections import ConfigDict

from configs import common, ladder_runs
from configs.ladder_tasks import OWN, fit_options, olmes, smoothing
from configs.rungs import PUBLISHED, TINY, TINY_HELD_OUT

MULTIPLIERS = (0.25, 0.5, 1.0)
PAPER = {"sizes": ("190m", "370m", "760m", "1.3b"), "multipliers": (1.0, 2.0, 5.0, 10.0)}
DEBUG = ("evaluation.windows=16", "evaluation.ranked.count=16")
VARIANTS = ("debug", "fit", "paper", *PUBLISHED, *ladder_runs.TARGETS, *TINY)


def get_config(arg=""):
    """The config of one variant; see the table above."""
    a = common.parse_arg(
        arg, VARIANTS, multiplier=1.0, runs="runs/ladder", folder="", family="", loss="bpb", steps=0
    )
    if a.multiplier <= 0:
        raise ValueError(f"config argument multiplier={a.multiplier} must be > 0")
    if a.variant in TINY:
        return ladder_runs.tiny(a.variant, a.multiplier, a.steps)
    if a.variant in (*PUBLISHED, *ladder_runs.TARGETS):
        return ladder_runs.published(a.variant, a.multiplier)
    if a.variant == "fit":
        own = not a.runs.endswith(".json")
        tasks = OWN if own else olmes(a.loss)
        config = common.base(task="fit", evals=("ladder",))
        config.fit = fit_options(
            tasks, runs=a.runs, folder=a.folder, family=a.family, **smoothing(own)
        )
        return config
    if a.variant == "paper":
        names = [(s, m) for s in PAPER["sizes"] for m in PAPER["multipliers"]]
        return _runs(names, (0,), fit_options(OWN, held_out=("1.3b",)))
    if a.variant == "debug":
        names = [(s, m) for s in ("31k", "49k") for m in MULTIPLIERS] + [("72k", 0.25)]
        config = _runs(names, (0,), fit_options(OWN, **smoothing(True)))
        config.runs = tuple((n, f"{spec},steps=5", (*o, *DEBUG)) for n, spec, o in config.runs)
        return config
    names = [(size, m) for size in TINY for m in MULTIPLIERS]
    return _runs(names, (0, 1, 2), fit_options(OWN, held_out=TINY_HELD_OUT, **smoothing(True)))


def _runs(names, seeds, fit: dict) -> ConfigDict:
    """Task `runs`: every size and budget with every seed, then the report."""
    runs = tuple(
        (
            f"{size}-{m:g}xC/seed{seed}",
            f"configs/ladder.py:{size},multiplier={m}",
            (f"seed={seed}",),
        )
        for seed in seeds
        for size, m in names
    )
    config = common.base(task="runs", runs=runs, report="ladder")
    config.fit = fit | dict(family="llama")  # of the runs in a folder
    return config
