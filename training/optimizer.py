"""The optimiser: clip by global norm, a direction, then per group learning rate and decay.

The direction is Adam's, or with `muon` the orthogonalised momentum of every hidden matrix (Jordan
et al. 2024) at the update size of Adam (Moonlight, arXiv 2502.16982: 0.2 sqrt(max(in, out))), so
that one learning rate and one weight decay serve both; everything else keeps Adam.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from optax import contrib

from training.tree import flat, is_box, path_name

OUTSIDE = {"vocab", "positions", "patch", "channels_in", "channels_out", "time"}


def make_optimizer(config, schedule: Callable, labels: Any, decayed: Any, matrices: Any = None):
    """optax transformation from config.optimizer.

    labels: optimiser group of each leaf; decayed: bool of each leaf (weight decay applies);
    matrices: `hidden_matrices` of the parameters, for muon.
    """
    o = config.optimizer
    direction = optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps)
    match o.name:
        case "adamw":
            pass
        case "muon":
            direction = _muon(o.momentum, matrices, others=direction)
        case other:
            raise ValueError(f"config.optimizer.name={other!r} must be adamw or muon")
    groups = sorted(set(jax.tree.leaves(labels)))
    for name in o.groups:
        if name not in groups:
            raise ValueError(
                f"config.optimizer.groups has {name!r}, but the parameters' groups are "
                f"{', '.join(groups)}"
            )
    steps = {g: _group(config, schedule, o.groups.get(g, {}), decayed) for g in groups}
    clip = optax.clip_by_global_norm(o.clip) if o.clip > 0 else optax.identity()
    return optax.chain(clip, direction, optax.partition(steps, labels))


def _muon(momentum: float, matrices: Any, others: optax.GradientTransformation):
    """Muon's direction for the hidden matrices, `others` for the rest."""
    if not jax.tree.leaves(matrices):
        raise ValueError(
            "config.optimizer.name='muon': no parameter has the logical axes of a hidden matrix"
        )
    axes = lambda updates: _like(matrices, updates)  # noqa: E731
    muon = optax.chain(
        contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=axes),
        optax.stateless(lambda u, _: jax.tree.map(_as_adam, u, axes(u))),
    )
    is_leaf = lambda m: m is None or isinstance(m, contrib.MuonDimensionNumbers)  # noqa: E731
    which = jax.tree.map(lambda m: "muon" if m else "others", matrices, is_leaf=is_leaf)
    return optax.partition({"muon": muon, "others": others}, which)


def _group(config, schedule: Callable, group: Mapping, decayed: Any):
    """Update of one group from the direction u: p -= lr * u + decay * p."""
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


def _as_adam(update: jax.Array, axes: contrib.MuonDimensionNumbers) -> jax.Array:
    """An orthogonal update at the root mean square of Adam's, about 0.2 (arXiv 2502.16982)."""
    sides = (math.prod(update.shape[i] for i in side) for side in axes)
    return 0.2 * max(sides) ** 0.5 * update


def decay_mask(boxed: Any, undecayed: Sequence[str] = (), model: Any = None) -> Any:
    """True for matrices: leaves with two or more axes beside the stacked layers, norms and the
    decay rates of states excepted.

    undecayed: slash paths of subtrees that are excepted too (config.optimizer.undecayed); each must
    be there, or in the model's own parameters before an objective moved them aside.
    """
    aside = [f"{name}/" for name in flat(model, leaf=is_box)]
    unused = {u for u in undecayed if not any(name.startswith(u + "/") for name in aside)}

    def one(path, leaf):
        name = path_name(path) + "/"
        for prefix in undecayed:
            if name.startswith(prefix + "/"):
                unused.discard(prefix)
                return False
        if is_box(leaf):
            names = [n for n in leaf.names if n != "layers"]
            return len(names) >= 2 and not {"norm", "state"} & set(names)
        return leaf.ndim >= 2

    mask = jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_box)
    if unused:
        raise ValueError(
            f"config.optimizer.undecayed has {sorted(unused)[0]!r}, and no parameter is there"
        )
    return mask


def hidden_matrices(boxed: Any) -> Any:
    """Input and output axes of every matrix between hidden states, None for all other leaves.

    Embeddings, position tables and the first and last projection are not hidden, as in the
    reference; stacked layers are matrices of their own. Fused axes (heads x head_dim) count as one.
    """

    def one(leaf):
        names = leaf.names if is_box(leaf) else ()
        axes = [i for i, n in enumerate(names) if n != "layers"]
        if len(axes) < 2 or "norm" in names or OUTSIDE & set(names):
            return None
        cut = 1 if names[axes[0]] == "embed" else -1
        return contrib.MuonDimensionNumbers(tuple(axes[:cut]), tuple(axes[cut:]))

    return jax.tree.map(one, boxed, is_leaf=is_box)


def by_prefix(groups: Mapping[str, str], default: str = "default") -> Callable[[Any], Any]:
    """params -> group of each leaf: the first path prefix in `groups` that matches wins."""

    def labels(params):
        def one(path, _):
            name = path_name(path)
            hits = (g for prefix, g in groups.items() if (name + "/").startswith(prefix + "/"))
            return next(hits, default)

        return jax.tree_util.tree_map_with_path(one, params)

    return labels
