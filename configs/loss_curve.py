"""Fit a power law with an offset, L(s) = L_inf + A s^-alpha, to the loss curve of a run.

    python main.py --config=configs/loss_curve.py:source=runs/uniflud/metrics.jsonl

Aims at no table of its own: it answers "what would twice the steps bring?" for any run here.
Huber loss in log space (arXiv 2203.15556), 90 % intervals by block bootstrap, the last fifth of
the curve held out to check the forecast. A few seconds; writes eval/0.json and power_law.png.
"""

from configs import common


def get_config(arg=""):
    a = common.parse_arg(
        arg, variants=("debug",), source="runs/uniflud/metrics.jsonl", key="train/loss"
    )
    config = common.base(task="fit", evals=("power_law",))
    config.fit = dict(
        source=a.source,  # metrics.jsonl of any run
        key=a.key,
        skip=20,  # steps left out at the start: warm-up is no power law
        points=100,  # bins, equal in log step
        held_out=0.2,  # share of the points, the latest, that is forecast and not fitted
        bootstrap=20 if a.variant == "debug" else 200,
        forecast=4.0,  # how far beyond the last step the curve is drawn
    )
    return config
