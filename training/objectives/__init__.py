"""What is optimised: OBJECTIVES maps config.objective.name to a builder (model, config)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from models import Model


class Objective(NamedTuple):
    """A training objective around a model, as pure functions.

    init:    (rng, params) -> (params, frozen). Adds what trains besides (discriminator, adapters)
             and moves aside what does not train. Parameters may be boxed with logical names.
    loss:    (params, frozen, extra, batch, rng, *, step, norms) -> (scalar, (metrics, extra)).
    labels:  (params) -> optimiser group (a string) of each leaf.
    rollout: (state, frozen, prompts, rng) -> batch, or None.
    model_params: (params, frozen) -> the parameters model.predict takes.
    """

    init: Callable[..., Any]
    loss: Callable[..., Any]
    labels: Callable[..., Any]
    rollout: Callable[..., Any] | None
    model_params: Callable[..., Any]


def take(tree: dict, paths: Sequence[str]) -> tuple[dict, dict]:
    """Split a nested dict into (the rest, the subtrees at the slash paths)."""
    rest, taken = dict(tree), {}
    for path in paths:
        head, _, tail = path.partition("/")
        if head not in rest or (tail and not isinstance(rest[head], dict)):
            raise ValueError(
                f"config.objective.freeze has {path!r}, but the parameters there are "
                f"{', '.join(sorted(rest))}"
            )
        if tail:
            rest[head], part = take(rest[head], (tail,))
            taken[head] = join(taken.get(head, {}), part)
        else:
            taken[head] = rest.pop(head)
    return rest, taken


def join(a: dict, b: dict) -> dict:
    """Union of two nested dicts with disjoint leaves."""
    both = dict(a)
    for key, value in b.items():
        both[key] = join(a[key], value) if key in a and isinstance(value, dict) else value
    return both


def _model(model: Model, config) -> Objective:
    """The model's own loss; config.objective.freeze names the parts that do not train."""
    freeze = tuple(config.objective.get("freeze", ()))

    def init(rng, params):
        del rng
        if not freeze:
            return params, {}
        params, held = take(params, freeze)
        return params, {"params": held}

    def model_params(params, frozen):
        return join(params, frozen["params"]) if freeze else params

    def loss(params, frozen, extra, batch, rng, *, step, norms):
        whole = model_params(params, frozen)
        return model.loss(whole, extra, batch, rng, step=step, norms=norms)

    def labels(params):
        # Each top-level part of the model is a group of its own, so that towers can learn at
        # their own rates.
        return {k: jax.tree.map(lambda _, k=k: k, v) for k, v in params.items()}

    return Objective(init, loss, labels, None, model_params)


def _adversarial(model: Model, config) -> Objective:
    from training.objectives import adversarial

    return adversarial.build(model, config)


def _low_rank(model: Model, config) -> Objective:
    from training.objectives import low_rank

    return low_rank.build(model, config)


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "model": _model,
    "adversarial": _adversarial,
    "low_rank": _low_rank,
}
