"""Exponential moving average of parameters: a flat dict {path: array} in the state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from training.tree import flat, path_name


def selector(config, labels: Any) -> Callable[[str], bool]:
    """path -> whether config.ema.groups (optimiser groups; () is all) averages it."""
    group = flat(labels)
    wanted = set(config.ema.groups)
    missing = wanted - set(group.values())
    if missing:
        raise ValueError(
            f"config.ema.groups has {sorted(missing)[0]!r}; the parameters' groups are "
            f"{', '.join(sorted(set(group.values())))}"
        )
    return lambda path: not wanted or group[path] in wanted


def init(params: Any, selected: Callable[[str], bool]) -> dict[str, jax.Array]:
    """The averages at the start: float32 copies of the selected parameters."""
    # A true copy: the state is donated, and a buffer can be donated once only.
    named = flat(params).items()
    return {name: jnp.array(leaf, jnp.float32) for name, leaf in named if selected(name)}


def update(ema: dict[str, jax.Array], params: Any, step, decay: float, warmup: bool):
    """ema = d * ema + (1 - d) * p after the update of `step`; d = min(decay, (1+t)/(10+t))."""
    t = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1 + t) / (10 + t)) if warmup else jnp.float32(decay)
    now = flat(params)
    return {name: d * e + (1 - d) * now[name].astype(jnp.float32) for name, e in ema.items()}


def merge(state: dict) -> Any:
    """Parameters with the averages in the place of what they average."""
    ema = state.get("ema", {})

    def one(path, leaf):
        value = ema.get(path_name(path))
        return leaf if value is None else value.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, state["params"])
