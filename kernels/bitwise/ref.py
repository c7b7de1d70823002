"""The definition: n, z, loss and draw of every token, all of them at once.

    n = LayerNorm(x) (1 + scale) + shift      without affine, eps 1e-6; n = x without modulation
    z = n w + b                               log odds of each bit
    loss = weight * mean over bits of (softplus(z) - y z)

w and b are differences of a head's two columns per bit ("it is 1" minus "it is 0"): the loss is
then the cross-entropy over the two.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from kernels.bitwise import bits as words

EPS = 1e-6


class Inputs(NamedTuple):
    """What every implementation takes; all but x and the bits float32 (float64 with such an x)."""

    x: Float[Array, "b t c"]
    w: Float[Array, "c d"]
    b: Float[Array, " d"]
    scale: Float[Array, "b c"] | None  # None: x is taken as it is
    shift: Float[Array, "b c"] | None
    bits: UInt32[Array, "b t words"] | None = None
    weights: Float[Array, "b t"] | None = None

    @property
    def wide(self):
        """The type of all sums."""
        return self.w.dtype


class Draw(NamedTuple):
    """How log odds become bits; scalars that may be traced."""

    guidance: Float[Array, ""]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]


def normalised(x: Float[Array, "b t c"], wide) -> tuple:
    """(x without mean and with variance 1, what it was multiplied by)."""
    x = x.astype(wide)
    x = x - x.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPS)
    return x * rstd, rstd


def modulated(x: Float[Array, "b t c"], scale, shift, wide) -> Float[Array, "b t c"]:
    """n."""
    if scale is None:
        return x.astype(wide)
    return normalised(x, wide)[0] * (1.0 + scale[:, None]) + shift[:, None]


def log_odds(x, w, b, scale, shift) -> Float[Array, "b t d"]:
    """z, in the type of w."""
    n = modulated(x, scale, shift, w.dtype)
    return jnp.matmul(n, w, precision=jax.lax.Precision.HIGHEST) + b


def cross_entropy(inputs: Inputs) -> Float[Array, "b t"]:
    """Loss of every token."""
    z = log_odds(inputs.x, inputs.w, inputs.b, inputs.scale, inputs.shift)
    y = words.unpack(inputs.bits, z.shape[-1]).astype(z.dtype)
    return inputs.weights * (jax.nn.softplus(z) - y * z).mean(-1)


def drawn(z, z_uncond, uniforms, draw: Draw) -> Bool[Array, "..."]:
    """Bits of log odds, of the conditional and (or None) the unconditional tokens: elementwise.

    Where a bit's less likely value has a probability of at most 1 - top_p it is never taken.
    """
    if z_uncond is not None:
        z = draw.guidance * z + (1.0 - draw.guidance) * z_uncond
    z = z / draw.temperature
    less_likely = 1.0 / (1.0 + jnp.exp(jnp.abs(z)))
    one = jnp.where(z > 0, 1.0 - less_likely, less_likely)
    likelier = (z > 0).astype(jnp.int32)  # as numbers: Mosaic selects no booleans
    sampled = (uniforms < one).astype(jnp.int32)
    return jnp.where(less_likely <= 1.0 - draw.top_p, likelier, sampled) != 0


def sample(inputs: Inputs, uncond: Inputs | None, uniforms: Float[Array, "b t d"], draw: Draw):
    """(packed bits [B, T, words], codes [B, T, d])."""
    z = log_odds(*inputs[:5])
    bits = drawn(z, None if uncond is None else log_odds(*uncond[:5]), uniforms, draw)
    return words.pack(bits), words.codes(bits).astype(z.dtype)
