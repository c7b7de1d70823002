"""Do the two losses pull the shared trunk the same way? Norms of their gradients and the cosine.

One small training batch, the loss as it is weighted in training; a term is switched off by an
infinite norm, so one compiled function gives both gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from eval import common, data

TERMS = ("visual", "text")


@functools.lru_cache(maxsize=4)
def _compiled(loss, trunk: str):
    """Jitted gradient of the loss on the layers of params[trunk]."""

    def total(own, params, extra, batch, rng, step, norms):
        whole = {**params, trunk: {**params[trunk], **own}}
        return loss(whole, extra, batch, rng, step=step, norms=norms)[0]

    return jax.jit(jax.grad(total))


@jax.jit
def _dot(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
    return sum(jnp.vdot(x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in pairs)


def compare(model, params, batch, rng, *, step, trunk: str) -> dict[str, float]:
    """Norms of the visual and the text gradient on params[trunk] and their cosine."""
    if trunk not in params:
        raise ValueError(
            f"config.evaluation.trunk={trunk!r}: the model has {', '.join(sorted(params))}"
        )
    norms = model.norms(batch)
    if missing := [t for t in TERMS if t not in norms]:
        raise ValueError(f"config.evals 'gradients' needs the loss term {missing[0]!r}")
    # The tied embedding is also the text head; what both losses share are the layers.
    own = {k: v for k, v in params[trunk].items() if k != "embedding"}
    gradient = _compiled(model.loss, trunk)
    visual, text = (
        gradient(own, params, {}, batch, rng, step, _only(norms, term)) for term in TERMS
    )
    vv, tt, vt = (
        float(common.to_host(_dot(a, b)))
        for a, b in ((visual, visual), (text, text), (visual, text))
    )
    cosine = vt / np.sqrt(vv * tt) if vv > 0 and tt > 0 else 0.0
    return {"visual_norm": np.sqrt(vv), "text_norm": np.sqrt(tt), "cosine": cosine}


def _only(norms, term: str) -> dict:
    """The norms with every other term switched off."""
    return {k: jnp.float32(v if k == term else jnp.inf) for k, v in norms.items()}


def build(config):
    """Evaluator "gradients": visual_norm, text_norm, cosine."""

    def evaluate(model, params, *, step, rng, workdir):
        rows = 2 * config.evaluation.gradient_examples
        (batch,) = data.loss_batches(config, "train", rows=rows, count=1)
        key = jax.random.fold_in(rng, 2)
        return compare(model, params, batch, key, step=step, trunk=config.evaluation.trunk)

    return evaluate
