"""The training loss and its parts on fixed batches of training and held-out data.

The same rows, orders and noise at every evaluation, so that steps and runs compare. Of the visual
part "mse" (the mean over tokens, noise levels and repeats) is what Fluid calls validation loss
(arXiv 2410.13863, section 4.1).
"""

import functools

import jax
import numpy as np

from eval import common, data


@functools.lru_cache(maxsize=4)
def _compiled(loss, norms):
    """Jitted metrics of the loss; the same object at every evaluation."""

    def metrics(params, batch, rng, step):
        return loss(params, {}, batch, rng, step=step, norms=norms(batch))[1][0]

    return jax.jit(metrics)


def mean_metrics(model, params, batches, rng, *, step: int) -> dict[str, float]:
    """Mean over the batches of every metric that model.loss reports."""
    compiled = _compiled(model.loss, model.norms)
    found = [jax.tree.map(common.to_host, compiled(params, b, rng, step)) for b in batches]
    return {k: float(np.mean([f[k] for f in found])) for k in found[0]}


def build(config):
    """Evaluator "losses": train_<metric>, held_out_<metric>."""
    options = config.evaluation

    def evaluate(model, params, *, step, rng, workdir):
        key = jax.random.fold_in(jax.random.key(options.seed), 3)
        return {
            f"{name}_{metric}": value
            for name in data.SPLITS
            for metric, value in mean_metrics(
                model,
                params,
                data.loss_batches(config, name, rows=options.batch, count=options.loss_batches),
                key,
                step=step,
            ).items()
        }

    return evaluate
