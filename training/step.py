"""The train step: one pure function (state, frozen, batch) -> (state, metrics)."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from training import ema as ema_lib
from training.accumulate import value_and_grad
from training.state import DATA, Plan, key_for

PARTS = ("gen", "und")  # prefixes of the keys of a batch that is made of parts


def count_examples(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Examples of a global batch; those of its parts (keys "gen_...", "und_...") add up."""
    parts: dict[str, int] = {}
    for key, shape in shapes.items():
        prefix = key.partition("_")[0]
        parts.setdefault(prefix if prefix in PARTS else "", shape[0])
    return sum(parts.values())


def build_train_step(model, objective, plan: Plan, config) -> Callable:
    """train_step(state, frozen, batch) -> (state, metrics), unjitted; see `jit_train_step`."""

    def train_step(state, frozen, batch):
        step = state["step"]
        rng = jax.random.fold_in(key_for(config, DATA), step)
        if objective.rollout is not None:
            prompt_rng, rng = jax.random.split(rng)
            batch = objective.rollout(state, frozen, batch, prompt_rng)
        shapes = {key: value.shape for key, value in batch.items()}
        # Which example of the global batch, part after part: micro-batches keep their random keys.
        batch = batch | {"example": jnp.arange(count_examples(shapes), dtype=jnp.int32)}
        norms = model.norms(batch)

        def loss(params, extra, micro):
            return objective.loss(params, frozen, extra, micro, rng, step=step, norms=norms)

        value, metrics, extra, grads = value_and_grad(
            loss, state["params"], state["extra"], batch, config.accumulate
        )
        updates, opt = plan.tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {
            **metrics,
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            "lr": plan.schedule(step),
        }
        new = dict(params=params, extra=extra, opt=opt, step=step + 1)
        if "ema" in state:
            new["ema"] = ema_lib.update(
                state["ema"], params, step, config.ema.decay, config.ema.warmup
            )
        return new, metrics

    return train_step


def jit_train_step(train_step: Callable, plan: Plan) -> Callable:
    """Jitted with the state donated and its shardings fixed, so that no step recompiles."""
    shardings = jax.tree.map(lambda x: x.sharding, plan.state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
