"""The task `fit`: evaluators that need no model, such as laws fitted to curves and tables."""

import jax

from eval.run import run_all


def run(config, workdir) -> dict[str, float]:
    """Run config.evals without a model; writes workdir/eval/0.json and what they plot."""
    if not config.evals:
        raise ValueError("config.evals=(): task 'fit' needs at least one, e.g. ('power_law',)")
    rng = jax.random.key(config.seed)
    return run_all(config, None, None, step=0, rng=rng, workdir=workdir)
