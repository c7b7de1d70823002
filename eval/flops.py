"""FLOPs of a function, counted from its jaxpr: through scans, remat, custom_vjp, jit, shard_map.

XLA's cost analysis counts the body of a loop once; the jaxpr knows the length of a scan.

What is counted: matrix products and convolutions, a multiply and an add each (2 M N K), without
the products by zeros that dilation inserts; a Pallas kernel's own cost_estimate. Element-wise
work, reductions, sorts and FFTs count as 0, the convention of model-FLOPs utilisation. Of the
branches of a conditional the dearest counts. The body of a while loop counts once, because its
trip count is not in the program (a fori_loop with constant bounds is a scan).

A step traced with remat contains the recomputation. Model FLOPs leave it out: count the step of
the same config with remat = "none" (tracing needs no memory).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_flops(fn: Callable, *args: Any, **kwargs: Any) -> int:
    """FLOPs of fn(*args, **kwargs) on the global shapes; arguments may be ShapeDtypeStructs."""
    return jaxpr_flops(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr)


def jaxpr_flops(jaxpr: core.Jaxpr) -> int:
    """FLOPs of one evaluation of a jaxpr."""
    return sum(_equation_flops(eqn) for eqn in jaxpr.eqns)


def mfu(flops_per_step: float, seconds_per_step: float, devices: int, peak_flops: float) -> float:
    """Model-FLOPs utilisation: the share of the devices' peak FLOP/s that the model used."""
    return flops_per_step / (seconds_per_step * devices * peak_flops)


def _equation_flops(eqn) -> int:
    match eqn.primitive.name:
        case "dot_general":
            return _dot_flops(eqn)
        case "conv_general_dilated":
            return _conv_flops(eqn)
        case "ragged_dot_general":
            (contracting, _), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
            lhs = eqn.invars[0].aval.shape
            return 2 * _size(eqn.outvars[0]) * math.prod(lhs[d] for d in contracting)
        case "scan":
            return eqn.params["length"] * jaxpr_flops(eqn.params["jaxpr"].jaxpr)
        case "cond":
            return max(jaxpr_flops(branch.jaxpr) for branch in eqn.params["branches"])
        case "shard_map":
            return _shards(eqn) * _inner_flops(eqn)
        case "pallas_call":
            return _pallas_flops(eqn)
        case _:
            return _inner_flops(eqn)


def _inner_flops(eqn) -> int:
    """FLOPs of every jaxpr among an equation's parameters (jit, remat, custom_vjp, while, ...)."""
    total = 0
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                total += jaxpr_flops(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                total += jaxpr_flops(item)
    return total


def _size(variable) -> int:
    return math.prod(variable.aval.shape)


def _dot_flops(eqn) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * _size(eqn.outvars[0]) * math.prod(lhs[d] for d in contracting)


def _conv_flops(eqn) -> int:
    """2 * outputs * (kernel window * input channels of one group) / inserted zeros."""
    kernel = eqn.invars[1].aval.shape
    out_channels = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    window = math.prod(kernel) // out_channels
    return 2 * _size(eqn.outvars[0]) * window // math.prod(eqn.params["lhs_dilation"])


def _shards(eqn) -> int:
    """Shards that do different work: over a mesh axis that splits nothing they all do the same."""
    sizes = dict(eqn.params["mesh"].shape)
    used: set[str] = set()
    for spec in (*eqn.params["in_specs"], *eqn.params["out_specs"]):
        for axes in spec:
            used |= {axes} if isinstance(axes, str) else set(axes or ())
    return math.prod(sizes[name] for name in used if name in sizes)


def _pallas_flops(eqn) -> int:
    """The kernel's own estimate, or its body times its grid."""
    estimate = eqn.params["cost_estimate"]
    if estimate is not None:
        return int(estimate.flops)
    grid = [n for n in eqn.params["grid_mapping"].grid if isinstance(n, int)]
    return math.prod(grid) * _inner_flops(eqn)
