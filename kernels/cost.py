"""Cost estimates for Pallas kernels of libraries that give none.

Without one a kernel counts as nothing in XLA's cost analysis, and a dry run takes it to be free.
"""

from collections.abc import Callable

import jax
from jax.experimental import pallas as pl
from jax.extend import core

# Calls that are written out, and their parameter with what is called.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def with_estimates(function: Callable, estimate: Callable[[str], pl.CostEstimate]) -> Callable:
    """function(arrays, rest), whose Pallas kernels carry estimate(name of the kernel), those of its
    gradient as well. `arrays` is a tuple of what is differentiated; no gradient flows to `rest`.
    """

    def traced(f, *args):
        closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
        flat = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), estimate)
        return jax.tree.unflatten(jax.tree.structure(shapes), flat)

    @jax.custom_vjp
    def run(arrays, rest):
        return traced(function, arrays, rest)

    def forward(arrays, rest):
        return traced(
            lambda arrays, rest: jax.vjp(lambda x: function(x, rest), arrays), arrays, rest
        )

    def backward(pull, cotangent):
        return *traced(lambda pull, cotangent: pull(cotangent), pull, cotangent), None

    run.defvjp(forward, backward)
    return run


def _evaluate(jaxpr, consts, args, estimate):
    """The outputs of a jaxpr, calls written out."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(x):
        return x.val if isinstance(x, core.Literal) else values[x]

    for eqn in jaxpr.eqns:
        inputs, params = [read(x) for x in eqn.invars], eqn.params
        if eqn.primitive.name == "pallas_call":
            # Metadata would break the kernel's line in the program's text, which dry runs read.
            params = params | dict(cost_estimate=estimate(params["name"]), metadata=None)
            with jax.named_scope(params["name"]):  # profiles call it so
                out = eqn.primitive.bind(*inputs, **params)
        elif inner := params.get(CALLS.get(eqn.primitive.name)):
            out = _evaluate(inner.jaxpr, inner.consts, inputs, estimate)
        else:
            out = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(params))
        values.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out]))
    return [read(x) for x in jaxpr.outvars]
