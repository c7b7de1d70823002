"""What TPU and GPU kernels share: float32 factors as bfloat16 parts, and gradients of what a row is
modulated with, without its tokens."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.bitwise.ref import Inputs


def split(a: Float[Array, "..."], parts: int) -> list:
    """bfloat16 arrays whose sum is a, as far as they reach."""
    found = []
    for _ in range(parts):
        found.append(a.astype(jnp.bfloat16))
        a = a - found[-1].astype(jnp.float32)
    return found


def gradients(inputs: Inputs, G: Float[Array, "b d c"], g: Float[Array, "b d"]) -> dict:
    """Gradients of w, scale and shift. G: g times the normalised x, and g itself, both summed over
    a row's tokens."""
    w = inputs.w.T
    highest = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    dw = (G * (1.0 + inputs.scale[:, None])).sum(0) + highest("bd,bc->dc", g, inputs.shift)
    return dict(w=dw.T, scale=(w * G).sum(1), shift=highest("bd,dc->bc", g, w))
