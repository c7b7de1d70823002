"""The bitwise head in plain JAX: some tokens after others, written gradient.

Of all tokens at once there are only x, the labels, the loss and, for the gradient, dx; what is
float32 and as wide as x or has a bit axis is there for the tokens of one chunk. The gradient
computes everything again from x:

    g = (sigmoid(z) - y) weight / d        dw = nT g   db = sum g     dn = g wT
    dscale = sum dn x^   dshift = sum dn   dx^ = dn (1 + scale)
    dx = rstd (dx^ - mean(dx^) - x^ mean(dx^ x^))                     x^: normalised x

The last chunk begins early enough to be whole: tokens computed twice are counted once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels.bitwise import bits as words
from kernels.bitwise import ref
from kernels.bitwise.ref import Draw, Inputs

TOKENS = 1024  # of a chunk, all rows together

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def cross_entropy(inputs: Inputs, *, chunk: int | None = None) -> Float[Array, "b t"]:
    """The reference's function. chunk: tokens of a row that are in memory at the same time."""
    return _loss(_chunk(inputs.x, chunk), inputs)


def sample(inputs: Inputs, uncond: Inputs | None, uniforms, draw: Draw, *, chunk=None):
    """The reference's function."""
    rows, length, _ = inputs.x.shape
    d, wide = inputs.w.shape[1], inputs.wide
    chunk = _chunk(inputs.x, chunk)

    def one(start, _, out):
        parts = [None if x is None else _take(x, start, chunk) for x in (inputs, uncond)]
        found = ref.sample(*parts, _cut(uniforms, start, chunk), draw)
        return tuple(_put(whole, part, start) for whole, part in zip(out, found, strict=True))

    out = jnp.zeros((rows, length, words.words(d)), jnp.uint32), jnp.zeros((rows, length, d), wide)
    return _over_chunks(one, length, chunk, out)


def _chunk(x, chunk: int | None) -> int:
    rows, length, _ = x.shape
    return min(chunk or max(TOKENS // rows, 1), length)


def _cut(x, start, chunk):
    """Tokens of a chunk."""
    return jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)


def _put(whole, part, start):
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis=1)


def _take(inputs: Inputs, start, chunk) -> Inputs:
    """Inputs of a chunk's tokens."""
    per_token = {
        name: _cut(x, start, chunk)
        for name in ("x", "bits", "weights")
        if (x := getattr(inputs, name)) is not None
    }
    return inputs._replace(**per_token)


def _over_chunks(one, length: int, chunk: int, carry):
    """carry = one(first token, which of the tokens are new, carry) for every chunk."""

    def body(i, carry):
        start = jnp.minimum(i * chunk, length - chunk)
        return one(start, start + jnp.arange(chunk, dtype=jnp.int32) >= i * chunk, carry)

    # int32 also where jax_enable_x64 makes Python's numbers wide.
    return jax.lax.fori_loop(np.int32(0), np.int32(-(-length // chunk)), body, carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(chunk: int, inputs: Inputs):
    def one(start, _, loss):
        return _put(loss, ref.cross_entropy(_take(inputs, start, chunk)), start)

    return _over_chunks(one, inputs.x.shape[1], chunk, jnp.zeros_like(inputs.weights))


def _forward(chunk, inputs):
    return _loss(chunk, inputs), inputs


def _backward(chunk, inputs, dloss):
    scale, shift, wide = inputs.scale, inputs.shift, inputs.wide

    def one(start, new, grads):
        part = _take(inputs, start, chunk)
        n, normalised = part.x.astype(wide), None
        if scale is not None:
            normalised, rstd = ref.normalised(part.x, wide)
            n = normalised * (1.0 + scale[:, None]) + shift[:, None]
        z = _matmul(n, inputs.w) + inputs.b
        y = words.unpack(part.bits, z.shape[-1]).astype(wide)
        cotangent = _cut(dloss, start, chunk)
        g = (jax.nn.sigmoid(z) - y) * (cotangent * part.weights / z.shape[-1])[..., None]
        dn = _matmul(g, inputs.w.T)
        dx = dn
        if scale is not None:
            dx = dn * (1.0 + scale[:, None])
            along = (dx * normalised).mean(-1, keepdims=True)
            dx = rstd * (dx - dx.mean(-1, keepdims=True) - normalised * along)
            dn = jnp.where(new[:, None], dn, 0.0)
            dscale = grads.scale + (dn * normalised).sum(1)
            grads = grads._replace(scale=dscale, shift=grads.shift + dn.sum(1))
        of_weights = cotangent * (jax.nn.softplus(z) - y * z).mean(-1)
        g = jnp.where(new[:, None], g, 0.0)
        product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        return grads._replace(
            x=_put(grads.x, dx, start),
            w=grads.w + product("btc,btd->cd", n, g),
            b=grads.b + g.sum((0, 1)),
            weights=_put(grads.weights, of_weights, start),
        )

    zeros = jax.tree.map(jnp.zeros_like, inputs._replace(bits=None))
    return (_over_chunks(one, inputs.x.shape[1], chunk, zeros),)


_loss.defvjp(_forward, _backward)
