"""The mLSTM on TPUs: one fused Pallas (Mosaic) kernel forward, two backward.

Grid (rows x heads, chunks), the chunks in order: the memory C of a head stays in VMEM in float32
while its chunks stream through. Forward reads q, k, v and a few gate rows once and writes h once;
no state and no score reaches HBM. Backward: a forward sweep stores the state before every chunk,
in the type of k; then the chunks come in reverse order with the gradient of C in VMEM.

What a kernel computes is kernels/mlstm/xla.py's algebra; the exponents come from gates.py as eight
rows of a chunk, turned into columns inside. Gradients of the gates are sums over rows, finished
outside in float32 from products taken before q's and k's gradients are rounded.

Head sizes are padded to 128 lanes (zeros contribute nothing), T to whole chunks (tokens that
neither write nor decay).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels.errors import NotSupported
from kernels.mlstm import blocks, gates, tpu_kernels
from kernels.mlstm.ref import EPS, State
from kernels.mlstm.tpu_kernels import SUBLANES


class Options(NamedTuple):
    """What is fixed when compiling."""

    chunk: int
    eps: float
    scale: float  # of q: the true head size counts, not the padded one
    official_backward: bool
    packed: bool  # documents end inside chunks
    interpret: bool


def mlstm(
    q: Float[Array, "b h t k"],
    k: Float[Array, "b h t k"],
    v: Float[Array, "b h t v"],
    i: Float[Array, "b h t"],
    f: Float[Array, "b h t"],
    state: State,
    documents: Int[Array, "b t"] | None,
    *,
    eps: float = EPS,
    chunk: int | None = None,
    official_backward: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "b h t v"], State]:
    """The reference's function for float32 and bfloat16; options as in kernels/mlstm/xla.py.

    chunk: tokens per grid step, a multiple of 128 (of 16 when the row is shorter).
    interpret: on the CPU, for tests.
    """
    if v.dtype not in (jnp.float32, jnp.bfloat16) or state.C.dtype != jnp.float32:
        raise NotSupported(f"mlstm on TPU takes float32 or bfloat16, not {v.dtype}")
    length, width, out = q.shape[2], q.shape[3], v.shape[3]
    chunk = chunk or default_chunk(length)
    if chunk % 16:
        raise NotSupported(f"mlstm on TPU needs a chunk that is a multiple of 16, not {chunk}")
    packed = documents is not None
    options = Options(chunk, eps, width**-0.5, official_backward, packed, interpret)
    inputs = blocks.padded(q, k, v, i, f, state, documents, chunk)
    h, (C, n, m) = _chunkwise(options, *inputs)
    return h[:, :, :length, :out], State(C[:, :, :width, :out], n[..., :width], m)


def default_chunk(length: int) -> int:
    """256 tokens fill the matrix unit; shorter rows take less."""
    if length >= 256:
        return 256
    return 128 if length > 64 else -(-length // 16) * 16


class _Plan(NamedTuple):
    """Sizes of one call; block specs of every kind of array."""

    heads: int  # rows x heads
    chunks: int
    length: int
    width: int
    out: int
    reverse: bool

    def _at(self, head, chunk):
        return head, (self.chunks - 1 - chunk if self.reverse else chunk)

    def tokens(self, size):
        """[heads, T, size]: one chunk of tokens."""
        return pl.BlockSpec((None, self.length, size), lambda h, c: (*self._at(h, c), 0))

    def per_chunk(self, *shape):
        """[heads, chunks, ...]: what there is once per chunk."""
        zeros = (0,) * len(shape)
        return pl.BlockSpec((None, None, *shape), lambda h, c: (*self._at(h, c), *zeros))

    def per_head(self, *shape):
        """[heads, ...]: stays in VMEM for all chunks of a head."""
        zeros = (0,) * len(shape)
        return pl.BlockSpec((None, *shape), lambda h, c: (h, *zeros))


def _plan(options, q, v, reverse=False):
    heads, length = q.shape[0], q.shape[1]
    chunks = length // options.chunk
    return _Plan(heads, chunks, options.chunk, q.shape[-1], v.shape[-1], reverse)


def _call(kernel, options, plan, inputs, in_specs, out_shapes, out_specs):
    """One pallas_call over (heads, chunks), with the bytes and FLOPs that the compiler counts."""
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*inputs, *out_shapes))
    flops, exps = _work(plan)[kernel]
    return pl.pallas_call(
        functools.partial(kernel, options),
        grid=(plan.heads, plan.chunks),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=exps, bytes_accessed=moved),
        interpret=options.interpret,
        name=f"mlstm_{kernel.__name__}",
    )(*inputs)


def _work(plan: _Plan) -> dict:
    """(FLOPs of the matrix products, exponentials) of every kernel."""
    length, width, out = plan.length, plan.width, plan.out
    scores, values, memory = length * width, length * out, width * out
    tokens = plan.heads * plan.chunks * length
    return {
        tpu_kernels.forward: (2 * tokens * (scores + values + 2 * memory), tokens * length),
        tpu_kernels.states: (2 * tokens * memory, 0),
        tpu_kernels.backward: (
            2 * tokens * (3 * scores + 2 * values + 4 * memory),
            tokens * length,
        ),
    }


def _shape(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _stack(found: gates.Rows, numbers, bound, dden=None) -> Float[Array, "bh c 8 l"]:
    """The eight rows of every chunk."""
    gamma = jnp.broadcast_to(found.gamma[..., None], found.r.shape)
    dden = jnp.zeros_like(found.r) if dden is None else dden
    return jnp.stack([found.r, found.c, found.w, found.u, bound, gamma, numbers, dden], axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunkwise(options, q, k, v, i, log_f, C, n, m, documents):
    return _run(options, q, k, v, i, log_f, C, n, m, documents)[0]


def _run(options, q, k, v, i, log_f, C, n, m, documents):
    """((h, state), den [bh, c, l])."""
    batch = q.shape[:2]
    found, numbers, m = blocks.gate_rows(i, log_f, documents, m, options.chunk)
    rows = _stack(found, numbers, found.bound)
    q, k, v, C, n = map(blocks.merge, (q, k, v, C, n))
    inputs = (q, k, v, rows, C, n[:, None])
    plan = _plan(options, inputs[0], inputs[2])
    heads, chunks, length, width, out = plan[:5]
    memory, normaliser = plan.per_head(width, out), plan.per_head(1, width)
    h, den, C, n = _call(
        tpu_kernels.forward,
        options,
        plan,
        inputs,
        [plan.tokens(width), plan.tokens(width), plan.tokens(out)]
        + [plan.per_chunk(SUBLANES, length), memory, normaliser],
        [
            _shape(heads, chunks * length, out, dtype=v.dtype),
            _shape(heads, chunks, 1, length),
            _shape(heads, width, out),
            _shape(heads, 1, width),
        ],
        [plan.tokens(out), plan.per_chunk(1, length), memory, normaliser],
    )
    state = (C.reshape(*batch, width, out), n.reshape(*batch, width), m)
    return (h.reshape(*batch, -1, out), state), den.reshape(found.r.shape)


def _forward(options, q, k, v, i, log_f, C, n, m, documents):
    (h, state), den = _run(options, q, k, v, i, log_f, C, n, m, documents)
    return (h, state), (q, k, v, i, log_f, C, n, m, documents, h, den)


def _backward(options, residuals, cotangents):
    q, k, v, i, log_f, C, n, m, documents, h, den = residuals
    dh, (dC, dn, _) = cotangents
    batch = q.shape[:2]
    found, numbers, _ = blocks.gate_rows(i, log_f, documents, m, options.chunk)
    bound = jnp.maximum(jnp.abs(den), found.bound) + options.eps
    dden = jnp.zeros_like(den)
    if not options.official_backward:
        dden = gates.den_gradient(dh, h, den, bound, found.bound)
    rows = _stack(found, numbers, 1.0 / bound, dden)
    q, k, v, dh, C, n, dC, dn = map(blocks.merge, (q, k, v, dh, C, n, dC, dn))
    Cs, ns = _states(options, k, v, rows, C, n[:, None])
    plan = _plan(options, q, v, reverse=True)
    heads, chunks, length, width, out = plan[:5]
    memory, normaliser = plan.per_head(width, out), plan.per_head(1, width)
    dq, dk, dv, flow, dC, dn = _call(
        tpu_kernels.backward,
        options,
        plan,
        (q, k, v, dh, rows, Cs, ns, dC, dn[:, None]),
        [plan.tokens(width), plan.tokens(width), plan.tokens(out), plan.tokens(out)]
        + [plan.per_chunk(SUBLANES, length), plan.per_chunk(width, out)]
        + [plan.per_chunk(1, width), memory, normaliser],
        [
            _shape(*q.shape, dtype=q.dtype),
            _shape(*k.shape, dtype=k.dtype),
            _shape(*v.shape, dtype=v.dtype),
            _shape(heads, chunks, SUBLANES, length),
            _shape(heads, width, out),
            _shape(heads, 1, width),
        ],
        [plan.tokens(width), plan.tokens(width), plan.tokens(out)]
        + [plan.per_chunk(SUBLANES, length), memory, normaliser],
    )
    flow = flow.reshape(*batch, chunks, SUBLANES, length)
    di = flow[:, :, :, 1]
    dlog_f = flow[:, :, :, 0] - di
    if options.official_backward:  # one sum over the whole row, nothing from the last state
        dlog_f = dlog_f.reshape(*batch, -1)
    dlog_f = jnp.cumsum(dlog_f[..., ::-1], axis=-1)[..., ::-1]
    if not options.official_backward:
        dlog_f += flow[:, :, :, 2]
    dq, dk, dv = (x.reshape(*batch, *x.shape[1:]) for x in (dq, dk, dv))
    dC, dn = dC.reshape(*batch, width, out), dn.reshape(*batch, width)
    shape = (*batch, chunks * length)
    return dq, dk, dv, di.reshape(shape), dlog_f.reshape(shape), dC, dn, jnp.zeros_like(m), None


def _states(options, k, v, rows, C, n):
    """State before every chunk: C [bh, chunks, K, V] in the type of k, n [bh, chunks, 1, K]."""
    plan = _plan(options, k, v)
    heads, chunks, length, width, out = plan[:5]
    memory, normaliser = plan.per_head(width, out), plan.per_head(1, width)
    return _call(
        tpu_kernels.states,
        options,
        plan,
        (k, v, rows, C, n),
        [
            plan.tokens(width),
            plan.tokens(out),
            plan.per_chunk(SUBLANES, length),
            memory,
            normaliser,
        ],
        [
            _shape(heads, chunks, width, out, dtype=k.dtype),
            _shape(heads, chunks, 1, width),
            _shape(heads, width, out),
            _shape(heads, 1, width),
        ],
        [plan.per_chunk(width, out), plan.per_chunk(1, width), memory, normaliser],
    )[:2]


_chunkwise.defvjp(_forward, _backward)
