"""Do the two losses pull the shared trunk the same way? Norms of their gradients and the cosine.

One small training batch, the loss as it is weighted in training; a term is switched off by an
infinite norm, so both gradients come from one compiled function.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from eval import common

TERMS = ("visual", "text")


@functools.lru_cache(maxsize=4)
def _compiled(loss, trunk: str):
    def total(own, params, extra, batch, rng, step, norms):
        whole = {**params, trunk: {**params[trunk], **own}}
        return loss(whole, extra, batch, rng, step=step, norms=norms)[0]

    @jax.jit
    def compare(params, extra, batch, rng, step, norms):
        # The tied embedding is a head of text as well; what both losses share are the layers.
        own = {k: v for k, v in params[trunk].items() if k != "embedding"}
        gradients = [
            jax.grad(total)(own, params, extra, batch, rng, step, _only(norms, term))
            for term in TERMS
        ]
        (aa, bb, ab) = (
            sum(jnp.vdot(x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in zip(*leaves))
            for leaves in (
                [jax.tree.leaves(gradients[i]), jax.tree.leaves(gradients[j])]
                for i, j in ((0, 0), (1, 1), (0, 1))
            )
        )
        return jnp.sqrt(aa), jnp.sqrt(bb), ab / jnp.maximum(jnp.sqrt(aa * bb), 1e-30)

    return compare


def _only(norms, term: str) -> dict:
    return {k: v if k == term else jnp.inf for k, v in norms.items()}


def compare(model, params, batch, rng, *, step, trunk: str) -> dict[str, float]:
    """Norms of the visual and the text gradient on params[trunk] and their cosine."""
    if trunk not in params:
        raise ValueError(
            f"config.evaluation.trunk={trunk!r}: the model has {', '.join(sorted(params))}"
        )
    norms = model.norms(batch)
    if missing := [t for t in TERMS if t not in norms]:
        raise ValueError(f"config.evals 'gradients' needs the loss term {missing[0]!r}")
    visual, text, cosine = _compiled(model.loss, trunk)(params, {}, batch, rng, step, norms)
    values = {"visual_norm": visual, "text_norm": text, "cosine": cosine}
    return {k: float(common.to_host(v)) for k, v in values.items()}


def training_batch(config) -> dict[str, np.ndarray]:
    """A small training batch, the same at every evaluation, with the example index."""
    from input_pipeline import DATASETS

    small = config.copy_and_resolve_references()
    with small.unlocked():
        small.batch_size = 2 * config.evaluation.gradient_examples
        small.data.prefetch = 0
    pipeline = DATASETS[config.data.name](
        small, split="train", seed=config.evaluation.seed, process_index=0, process_count=1
    )
    try:
        batch = dict(next(iter(pipeline.dataset)))
    finally:
        pipeline.close()
    return batch | {"example": np.arange(small.batch_size, dtype=np.int32)}


def build(config):
    """Evaluator "gradients": visual_norm, text_norm, cosine."""

    def evaluate(model, params, *, step, rng, workdir):
        batch = training_batch(config)
        key = jax.random.fold_in(rng, 2)
        return compare(model, params, batch, key, step=step, trunk=config.evaluation.trunk)

    return evaluate
