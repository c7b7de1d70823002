"""Low-rank adapters (LoRA, arXiv 2106.09685): W + alpha / rank A B, where only A and B train.

A [..., in, rank] starts at N(0, 1 / in), B [..., rank, out] at zero, so that the first step is the
given model's. Everything else of the model is frozen: stored once per workdir, without optimiser
state. What evaluates, samples or exports gets the merged matrices; their gradient is that of W,
taken apart by the chain rule, so that every model's loss works as it is.
"""

import fnmatch
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from export.weights import unflatten
from models import Model
from training.objectives import Objective, take
from training.optimizer import hidden_matrices
from training.tree import flat, is_box, path_name


class Cut(NamedTuple):
    """How a parameter's axes lie in the product: stacked layers, then inputs, then outputs."""

    stacked: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def cuts(params: Any, patterns) -> dict[str, Cut]:
    """{path: Cut} of the hidden matrices whose slash path matches one of the glob patterns."""
    if isinstance(patterns, str):
        raise ValueError(f"config.objective.leaves={patterns!r} must be a tuple of patterns")
    axes = flat(
        jax.tree.map(_cut, params, hidden_matrices(params), is_leaf=is_box),
        leaf=lambda x: isinstance(x, Cut),
    )
    found, used = {}, set()
    for path, cut in axes.items():
        if matching := {p for p in patterns if fnmatch.fnmatchcase(path, p)}:
            found[path] = cut
            used |= matching
    if unused := sorted(set(patterns) - used):
        raise ValueError(
            f"config.objective.leaves has {unused[0]!r}, which no hidden matrix matches; they are "
            f"{', '.join(sorted(axes))}"
        )
    return found


def _cut(leaf, m) -> Cut | None:
    if m is None:
        return None
    ends = (*m.reduction_axis, *m.output_axis)
    stacked = tuple(i for i in range(len(leaf.names)) if i not in ends)
    return Cut(stacked, tuple(m.reduction_axis), tuple(m.output_axis))


def factors(rng, box, cut: Cut, rank: int) -> dict[str, nn.LogicallyPartitioned]:
    """{"a", "b"} of one matrix, with its logical names and one without for the rank."""
    shape, names = box.value.shape, box.names

    def pick(values, axes):
        return tuple(values[i] for i in axes)

    front, name = pick(shape, cut.stacked), pick(names, cut.stacked)
    into, out = pick(shape, cut.inputs), pick(shape, cut.outputs)
    a = jax.random.normal(rng, (*front, *into, rank)) / math.sqrt(math.prod(into))
    b = jnp.zeros((*front, rank, *out))
    return {
        "a": nn.LogicallyPartitioned(a, (*name, *pick(names, cut.inputs), None)),
        "b": nn.LogicallyPartitioned(b, (*name, None, *pick(names, cut.outputs))),
    }


def product(a, b, cut: Cut):
    """A B with the axes in the parameter's order."""
    n, into, out = len(cut.stacked), len(cut.inputs), len(cut.outputs)
    front, rank = a.shape[:n], a.shape[-1]
    whole = jnp.matmul(a.reshape(*front, -1, rank), b.reshape(*front, rank, -1))
    whole = whole.reshape(*front, *a.shape[n : n + into], *b.shape[n + 1 : n + 1 + out])
    order = (*cut.stacked, *cut.inputs, *cut.outputs)
    return jnp.transpose(whole, np.argsort(order))


def adapted(model: Model, o) -> tuple[Any, dict[str, Cut]]:
    """(boxed shapes of the model's parameters, {path: Cut} of those that config.objective = o
    gives adapters)."""
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0))[0])
    return boxed, cuts(take(boxed, o.freeze)[0], o.leaves)


def merged(leaf, a, b, cut: Cut, o):
    """The parameter with its adapters, in its own type."""
    return leaf + (o.alpha / o.rank * product(a, b, cut)).astype(leaf.dtype)


def build(model: Model, config) -> Objective:
    """Objective around any model; config.objective: rank, alpha, leaves (globs of slash paths),
    freeze (parts that get no adapters)."""
    o = config.objective
    _, where = adapted(model, o)

    def init(rng, params):
        boxes, keys = flat(params, leaf=is_box), jax.random.split(rng, len(where))
        adapters = {
            f"{path}/{name}": part
            for key, (path, cut) in zip(keys, where.items(), strict=True)
            for name, part in factors(key, boxes[path], cut, o.rank).items()
        }
        return {"adapters": unflatten(adapters)}, {"params": params}

    def model_params(params, frozen):
        parts = flat(params["adapters"])

        def one(path, leaf):
            name = path_name(path)
            if name not in where:
                return leaf
            return merged(leaf, parts[f"{name}/a"], parts[f"{name}/b"], where[name], o)

        return jax.tree_util.tree_map_with_path(one, frozen["params"])

    def loss(params, frozen, extra, batch, rng, *, step, norms):
        whole = model_params(params, frozen)
        return model.loss(whole, extra, batch, rng, step=step, norms=norms)

    def labels(params):
        return jax.tree.map(lambda _: "adapters", params)

    return Objective(init, loss, labels, None, model_params)
