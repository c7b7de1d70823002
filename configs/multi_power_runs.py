"""Tiny runs under several schedules, for the multi-power law. Not a config."""

from configs import common

TINY = (  # 106,816 parameters; the held-out loss is that of the same rows every time
    "model.llama.size=debug",
    "data.length=64",
    "data.vocab_size=512",
    "batch_size=16",
    "steps=1200",
    "optimizer.lr=1e-2",
    "schedule.warmup=60",
    "schedule.decay=0",
    "schedule.final=0.0",
    "evals=losses",
    "eval_every=40",
    "evaluation.batch=128",
    "evaluation.loss_batches=2",
    "sample.prompts=()",
    "log_every=10",
    "checkpoint.every=400",
    "checkpoint.keep=1",
)
FITTED = {
    "constant": ("schedule.name=constant",),
    "cosine": ("schedule.name=cosine",),
    "two_stage": (
        "schedule.name=piecewise",
        "schedule.boundaries=(400,)",
        "schedule.factors=(0.3,)",
    ),
}
UNSEEN = {
    "wsd": ("schedule.name=wsd", "schedule.decay=240"),
    "late_stage": (
        "schedule.name=piecewise",
        "schedule.boundaries=(800,)",
        "schedule.factors=(0.1,)",
    ),
}
DEBUG = ("steps=48", "eval_every=4", "log_every=4", "schedule.warmup=6", "data.text=docs")


def trainings(seeds, fitted, unseen, extra=(), fit=()):
    """Task runs: for every seed each schedule, the fit, the optimised schedule; then a report."""
    runs = []
    for seed in seeds:
        tiny = (*TINY, *extra, f"seed={seed}")
        for name, overrides in (fitted | unseen).items():
            runs.append((f"seed{seed}/{name}", "configs/llama.py", (*tiny, *overrides)))
        curves = ",".join(f"{{workdir}}/seed{seed}/{name}" for name in fitted | unseen)
        law = (
            f"fit.curves={curves}",
            "fit.key=eval/losses/held_out_loss",
            f"fit.fit={tuple(fitted)}",
            "fit.recipes=('converged',)",
            f"seed={seed}",
            *fit,
        )
        runs.append((f"seed{seed}/law", "configs/multi_power_law.py:files", law))
        best = (
            "schedule.name=from_file",
            f"schedule.path={{workdir}}/seed{seed}/law/schedule.csv",
        )
        runs.append((f"seed{seed}/optimised", "configs/llama.py", (*tiny, *best)))
    return common.base(task="runs", runs=tuple(runs), report="multi_power_seeds")
