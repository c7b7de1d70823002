"""One token of the mLSTM on TPUs: each head's memory is read once and written once, in place."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels.errors import NotSupported
from kernels.linear_attention import State
from kernels.linear_attention.blocks import LANES
from kernels.mlstm.ref import EPS

KEEP, WRITE, BOUND = range(3)  # numbers of a head, in the first lanes of a row


def step(
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h v"],
    i: Float[Array, "b h"],
    f: Float[Array, "b h"],
    state: State,
    *,
    eps: float = EPS,
    interpret: bool = False,
) -> tuple[Float[Array, "b h v"], State]:
    """The reference's step for float32 states; head sizes that are no whole lanes are refused."""
    rows, heads, width = q.shape
    out = v.shape[-1]
    if state.C.dtype != jnp.float32 or width % LANES or out % LANES:
        raise NotSupported(
            f"mlstm_step on TPU takes float32 states and head sizes that are multiples of {LANES}, "
            f"not {state.C.dtype} and {width}, {out}"
        )
    decayed = jax.nn.log_sigmoid(f.astype(jnp.float32)) + state.m
    i = i.astype(jnp.float32)
    m = jnp.maximum(decayed, i)
    numbers = jnp.stack([jnp.exp(decayed - m), jnp.exp(i - m), jnp.exp(-m)], axis=-1)
    numbers = jnp.pad(numbers.reshape(-1, 1, 3), ((0, 0), (0, 0), (0, LANES - 3)))

    def row(x):
        return x.astype(jnp.float32).reshape(rows * heads, 1, -1)

    def block(*shape):
        return pl.BlockSpec((None, *shape), lambda head: (head, 0, 0))

    memory, normaliser = (rows * heads, width, out), (rows * heads, 1, width)
    moved = 4 * rows * heads * (2 * width * out + 4 * width + 2 * out)
    h, C, n = pl.pallas_call(
        functools.partial(_kernel, width**-0.5, eps),
        grid=(rows * heads,),
        in_specs=[block(1, width), block(1, width), block(1, out), block(1, LANES)]
        + [block(width, out), block(1, width)],
        out_specs=[block(1, out), block(width, out), block(1, width)],
        out_shape=[
            jax.ShapeDtypeStruct((rows * heads, 1, out), jnp.float32),
            jax.ShapeDtypeStruct(memory, jnp.float32),
            jax.ShapeDtypeStruct(normaliser, jnp.float32),
        ],
        input_output_aliases={4: 1, 5: 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=5 * rows * heads * width * out, transcendentals=0, bytes_accessed=moved
        ),
        interpret=interpret,
        name="mlstm_step",
    )(row(q), row(k), row(v), numbers, state.C.reshape(memory), state.n.reshape(normaliser))
    batch = (rows, heads)
    state = State(C.reshape(*batch, width, out), n.reshape(*batch, width), m)
    return h.reshape(*batch, out).astype(v.dtype), state


def _kernel(scale, eps, q_ref, k_ref, v_ref, numbers_ref, C_in, n_in, h_ref, C_ref, n_ref):
    numbers = numbers_ref[...]
    keep, write, bound = (numbers[:, j : j + 1] for j in (KEEP, WRITE, BOUND))
    q, k = scale * q_ref[...], write * k_ref[...]
    C = keep * C_in[...] + k.T * v_ref[...]
    n = keep * n_in[...] + k
    C_ref[...], n_ref[...] = C, n
    den = (q * n).sum(1, keepdims=True)
    h_ref[...] = (q.T * C).sum(0, keepdims=True) / (jnp.maximum(jnp.abs(den), bound) + eps)
