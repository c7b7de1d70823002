"""The training state {params, extra, opt, step, ema?}: made sharded, never whole on one device."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from training import ema as ema_lib
from training.optimizer import decay_mask, hidden_matrices, make_optimizer
from training.schedules import make_schedule
from training.sharding import shardings_for
from training.tree import flat, path_name, unbox

INIT, DATA, EVAL, SAMPLE = range(4)  # streams of the seed


def key_for(config, stream: int) -> jax.Array:
    """The run's random key for one use of config.seed.

    Initialisation draws with rbg: its hundred draws compile four times faster than threefry's.
    """
    impl = "rbg" if stream == INIT else "threefry2x32"
    return jax.random.fold_in(jax.random.key(config.seed, impl=impl), stream)


class Plan(NamedTuple):
    """Everything about a run that is known before memory is used.

    init:      (rng, loaded) -> (state, frozen); `loaded` {path: array} replaces parameters.
    state, frozen: ShapeDtypeStructs that carry shardings.
    params:    the model's own parameters (before the objective), likewise.
    tx, schedule: optimiser and learning rate.
    """

    init: Any
    state: Any
    frozen: Any
    params: Any
    tx: Any
    schedule: Any


def plan(model, objective, config, mesh) -> Plan:
    """Shapes, shardings and the init function of a run; allocates nothing."""
    key = jax.eval_shape(lambda: jax.random.key(0))

    def boxed_init(rng):
        model_key, objective_key = jax.random.split(rng)
        params, extra = model.init(model_key)
        return params, extra, *objective.init(objective_key, params)

    whole, extra, params, frozen = jax.eval_shape(boxed_init, key)
    schedule = make_schedule(config)
    labels = objective.labels(unbox(params))
    decayed = decay_mask(params, config.optimizer.undecayed, whole)
    tx = make_optimizer(config, schedule, labels, decayed, hidden_matrices(params))
    in_ema = ema_lib.selector(config, labels)

    def init(rng, loaded: Mapping[str, jax.Array]):
        model_key, objective_key = jax.random.split(rng)
        params, extra = model.init(model_key)
        params = replace(params, loaded)
        params, frozen = objective.init(objective_key, params)
        params, extra, frozen = unbox((params, extra, frozen))
        state = dict(params=params, extra=extra, opt=tx.init(params), step=jnp.zeros((), jnp.int32))
        if config.ema.decay:
            state["ema"] = ema_lib.init(params, in_ema)
        return state, frozen

    state, frozen_shapes = jax.eval_shape(init, key, {})
    param_shardings = shardings_for(params, mesh)
    shardings = _state_shardings(state, param_shardings, shardings_for(extra, mesh), mesh)
    return Plan(
        init=init,
        state=_with(state, shardings),
        frozen=_with(frozen_shapes, shardings_for(frozen, mesh)),
        params=_with(unbox(whole), shardings_for(whole, mesh)),
        tx=tx,
        schedule=schedule,
    )


def create(plan: Plan, rng: jax.Array, loaded: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    """The first (state, frozen), every leaf born with its sharding."""
    shardings = jax.tree.map(lambda x: x.sharding, (plan.state, plan.frozen))
    return jax.jit(plan.init, out_shardings=shardings)(rng, loaded)


def replace(tree: Any, loaded: Mapping[str, jax.Array]) -> Any:
    """`tree` (boxed or not) with the leaves at the slash paths in `loaded` replaced."""
    if not loaded:
        return tree
    left = set(loaded)

    def one(path, leaf):
        name = path_name(path).removesuffix("/value")
        if name not in loaded:
            return leaf
        left.discard(name)
        return jnp.asarray(loaded[name], leaf.dtype)

    tree = jax.tree_util.tree_map_with_path(one, tree)
    if left:
        raise ValueError(f"config.init_from: no parameter is called {sorted(left)[0]!r}")
    return tree


def count(tree: Any) -> int:
    """Number of scalars in a tree."""
    return sum(x.size for x in jax.tree.leaves(tree))


def _with(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that carry shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _state_shardings(state: Any, params: Any, extra: Any, mesh) -> Any:
    """Shardings of the state: optimiser moments and averages follow their parameter."""
    whole = NamedSharding(mesh, PartitionSpec())
    by_path = flat(params)
    shape_of = {name: leaf.shape for name, leaf in flat(state["params"]).items()}

    def follow(path, leaf):
        parts = path_name(path).split("/")
        for i in range(len(parts)):
            name = "/".join(parts[i:])
            if name in by_path and shape_of[name] == leaf.shape:
                return by_path[name]
        return whole

    shardings = {k: jax.tree_util.tree_map_with_path(follow, v) for k, v in state.items()}
    return shardings | {"params": params, "extra": extra}
