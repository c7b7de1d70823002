"""The selective scan along a row that several devices share (context parallel).

What a device's tokens do to a state is h -> decay h + written. The decay of all of them is one
exponential, exp(A ΣΔ) (0 where a document begins among them), and `written` the last state of a
scan that starts from 0. So two passes: every device scans its tokens from 0; (ΣΔ, written) are
gathered, E (N + 1) numbers a row; each device folds those before it into the state it starts from
and scans again for y. Gradients are autodiff of these lines and the scan's own: exact, since those
reach its first state.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.selective_scan.ref import Inputs


def along(
    axis: str | tuple[str, ...], run: Callable, inputs: Inputs
) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """(y of this device's tokens, state after all devices'), inside shard_map over `axis`.

    inputs: this device's tokens; h0 is the state before the first device's.
    """
    index = jax.lax.axis_index(axis)
    _, written = run(inputs._replace(h0=jnp.zeros_like(inputs.h0)))
    total = jax.nn.softplus(inputs.delta.astype(inputs.wide) + inputs.bias).sum(1)
    if inputs.fresh is not None:  # an infinite Δ, but without its gradient
        total = jnp.where(inputs.fresh.any(1)[:, None], jnp.inf, total)
    parts = jax.lax.all_gather((total, written), axis)

    def body(carry, part):
        state, mine = carry
        j, (total, written) = part
        mine = jnp.where(j == index, state, mine)
        ended = jnp.isinf(total)[..., None]
        decay = jnp.where(ended, 0.0, jnp.exp(jnp.where(ended, 0.0, total[..., None]) * inputs.A))
        return (decay * state + written, mine), None

    count = jnp.arange(jax.lax.axis_size(axis))
    start = (inputs.h0, jnp.zeros_like(inputs.h0))
    (last, mine), _ = jax.lax.scan(body, start, (count, parts))
    y, _ = run(inputs._replace(h0=mine))
    return y, last
