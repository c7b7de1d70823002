"""The optimiser: clip by global norm, Adam moments, then per group learning rate and decay."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from training.tree import is_box, path_name


def make_optimizer(config, schedule: Callable, labels: Any, decayed: Any):
    """optax transformation from config.optimizer.

    labels: optimiser group of each leaf; decayed: bool of each leaf (weight decay applies).
    """
    o = config.optimizer
    if o.name != "adamw":
        raise ValueError(f"config.optimizer.name={o.name!r} must be adamw")
    groups = sorted(set(jax.tree.leaves(labels)))
    for name in o.groups:
        if name not in groups:
            raise ValueError(
                f"config.optimizer.groups has {name!r}, but the parameters' groups are "
                f"{', '.join(groups)}"
            )
    steps = {g: _group(config, schedule, o.groups.get(g, {}), decayed) for g in groups}
    clip = optax.clip_by_global_norm(o.clip) if o.clip > 0 else optax.identity()
    adam = optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps)
    return optax.chain(clip, adam, optax.partition(steps, labels))


def _group(config, schedule: Callable, group: Mapping, decayed: Any):
    """Update of one group from the Adam direction u: p -= lr * u + decay * p."""
    o = config.optimizer
    extra = set(group) - {"lr_scale", "weight_decay_scale"}
    if extra:
        raise ValueError(
            f"config.optimizer.groups has the key {sorted(extra)[0]!r}; allowed: lr_scale, "
            "weight_decay_scale"
        )
    lr_scale = group.get("lr_scale", 1.0)
    decay = o.weight_decay * group.get("weight_decay_scale", 1.0)
    if lr_scale == 0:
        return optax.set_to_zero()
    match o.wd_mode:
        case "decoupled":  # decay = lr * wd
            pass
        case "fully_decoupled":  # AIMv2: decay = (lr / peak) * wd
            decay = decay / (o.lr * lr_scale)
        case other:
            raise ValueError(
                f"config.optimizer.wd_mode={other!r} must be decoupled or fully_decoupled"
            )
    parts = []
    if decay:
        parts.append(optax.add_decayed_weights(decay, mask=lambda params: _like(decayed, params)))
    parts.append(optax.scale_by_learning_rate(lambda step: lr_scale * schedule(step)))
    return optax.chain(*parts)


def _like(decayed: Any, params: Any) -> Any:
    """`decayed` with optax's masked nodes where a partition hides the leaf."""
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda p, d: p if masked(p) else d, params, decayed, is_leaf=masked)


def decay_mask(boxed: Any) -> Any:
    """True for matrices: leaves with two or more axes beside the stacked layers, norms excepted."""

    def one(path, leaf):
        if is_box(leaf):
            names = [n for n in leaf.names if n != "layers"]
            return len(names) >= 2 and "norm" not in names
        return leaf.ndim >= 2

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_box)


def by_prefix(groups: Mapping[str, str], default: str = "default") -> Callable[[Any], Any]:
    """params -> group of each leaf: the first path prefix in `groups` that matches wins."""

    def labels(params):
        def one(path, _):
            name = path_name(path)
            hits = (g for prefix, g in groups.items() if (name + "/").startswith(prefix + "/"))
            return next(hits, default)

        return jax.tree_util.tree_map_with_path(one, params)

    return labels
