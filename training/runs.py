"""Task `runs`: an ordered list of ordinary runs, each in its own folder, then one report."""

from collections.abc import Callable
from pathlib import Path

import jax

from configs.loading import load_config
from eval.run import run_all


def run(config, workdir, train_one: Callable) -> None:
    """Do config.runs = ((name, "configs/x.py:variant", ("key=value", ...)), ...) in order.

    train_one(config, workdir) is what one run does; a finished one says so and costs nothing.
    config.report, an evaluator, then writes eval/0.json and whatever else it draws.
    """
    workdir = Path(workdir)
    names = [name for name, *_ in config.runs]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"config.runs must be a list of runs with different names, not {names}")
    here = str(workdir)  # {workdir}/a lets a run start from what run a left
    jobs = [
        (name, load_config(spec, *(text.replace("{workdir}", here) for text in overrides)))
        for name, spec, overrides in config.runs
    ]
    for i, (name, job) in enumerate(jobs):
        print(f"run {i + 1} of {len(jobs)}: {name}", flush=True)
        train_one(job, workdir / name)
        # Some 400 memory maps of programs a run; at Linux's 65,530 XLA's compiler segfaults.
        jax.clear_caches()
    if config.report:
        with config.unlocked():
            config.evals = (config.report,)
        run_all(config, None, None, step=0, rng=jax.random.key(config.seed), workdir=workdir)
