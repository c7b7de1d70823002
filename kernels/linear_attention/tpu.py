"""Gated linear attention on TPUs: one fused Pallas (Mosaic) kernel forward, two backward.

Grid (rows x heads, chunks), the chunks in order: the memory C of a head stays in VMEM in float32
while its chunks stream through. Forward reads q, k, v and a few gate rows once and writes h once;
no state and no score reaches HBM. Backward: a forward sweep stores the state before every chunk,
in the type of k; then the chunks come in reverse order with the gradient of C in VMEM.

What a kernel computes is kernels/linear_attention/xla.py's algebra; the exponents come from
gates.py as eight rows of a chunk, turned into columns inside. Gradients of the gates are sums over
rows, finished outside in float32 from products taken before q's and k's gradients are rounded.

Head sizes are padded to 128 lanes (zeros contribute nothing), T to whole chunks (tokens that
neither write nor decay). Heads that share q and k read the same blocks; their gradients are written
for each head and summed outside.
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
from kernels.linear_attention import blocks, gates, tpu_kernels
from kernels.linear_attention.form import Form, State
from kernels.linear_attention.tpu_kernels import SUBLANES


class Options(NamedTuple):
    """What is fixed when compiling."""

    name: str
    chunk: int
    eps: float
    scale: float  # of q: the true head size counts, not the padded one
    official_backward: bool
    normalised: bool
    packed: bool  # documents end inside chunks
    interpret: bool


def linear_attention(
    form: Form,
    q: Float[Array, "b g t k"],
    k: Float[Array, "b g t k"],
    v: Float[Array, "b h t v"],
    i: Float[Array, "b h t"] | None,
    log_f: Float[Array, "b h t"],
    state: State,
    documents: Int[Array, "b t"] | None,
    *,
    chunk: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b h t v"], State]:
    """kernels/linear_attention/xla.py's function for float32 and bfloat16.

    chunk: tokens per grid step, a multiple of 128 (of 16 when the row is shorter).
    interpret: on the CPU, for tests.
    """
    if v.dtype not in (jnp.float32, jnp.bfloat16) or state.C.dtype != jnp.float32:
        raise NotSupported(f"{form.name} on TPU takes float32 or bfloat16, not {v.dtype}")
    length, width, out = v.shape[2], q.shape[3], v.shape[3]
    chunk = chunk or default_chunk(length)
    if chunk % 16:
        raise NotSupported(
            f"{form.name} on TPU needs a chunk that is a multiple of 16, not {chunk}"
        )
    options = Options(
        form.name,
        chunk,
        form.eps,
        form.scale,
        form.official_backward,
        normalised=state.n is not None,
        packed=documents is not None,
        interpret=interpret,
    )
    inputs = blocks.padded(q, k, v, i, log_f, state, documents, chunk)
    h, last = _chunkwise(options, *inputs)
    return blocks.cropped(h, last, length, width, out)


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

    def tokens(self, x):
        """[heads, T, size] or [heads / shared, T, size]: one chunk of tokens."""
        shared = self.heads // x.shape[0]

        def index(head, chunk):
            head, chunk = self._at(head, chunk)
            return (head // shared if shared > 1 else head), chunk, 0

        return pl.BlockSpec((None, self.length, x.shape[-1]), index)

    def per_chunk(self, *shape):
        """[heads, chunks, ...]: what there is once per chunk."""
        zeros = (0,) * len(shape)
        return pl.BlockSpec((None, None, *shape), lambda h, c: (*self._at(h, c), *zeros))

    def per_head(self, *shape):
        """[heads, ...]: stays in VMEM for all chunks of a head."""
        zeros = (0,) * len(shape)
        return pl.BlockSpec((None, *shape), lambda h, c: (h, *zeros))

    def state(self, options, dtype=jnp.float32, *, per_chunk=False):
        """(shapes, block specs) of memory and normaliser of every head, or every chunk of it."""
        lead = (self.heads, self.chunks) if per_chunk else (self.heads,)
        spec = self.per_chunk if per_chunk else self.per_head
        memory, normaliser = (self.width, self.out), (1, self.width)
        shapes = _shape(*lead, *memory, dtype=dtype), _shape(*lead, *normaliser)
        specs = spec(*memory), spec(*normaliser)
        return (shapes, specs) if options.normalised else ((shapes[0], None), (specs[0], None))


def _plan(options, k, v, reverse=False):
    heads, length, out = v.shape
    return _Plan(heads, length // options.chunk, options.chunk, k.shape[-1], out, reverse)


def _call(kernel, options, plan, inputs, in_specs, out_shapes, out_specs):
    """One pallas_call over (heads, chunks), with the bytes and FLOPs that the compiler counts."""
    arrays = jax.tree.leaves((inputs, out_shapes))
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
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
        name=f"{options.name}_{kernel.__name__}",
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
    fifth = found.fine if bound is None else bound
    return jnp.stack([found.r, found.c, found.w, found.u, fifth, gamma, numbers, dden], axis=2)


def _pair(state: State):
    """(C, n) with rows and heads joined, n as rows of a tile."""
    C, n = blocks.merge(state[:2])
    return C, None if n is None else n[:, None]


def _unpair(pair, rows: int, m) -> State:
    C, n = pair
    return State(*blocks.split((C, None if n is None else n[:, 0]), rows), m)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunkwise(options, q, k, v, i, log_f, state, documents):
    return _run(options, q, k, v, i, log_f, state, documents)[0]


def _run(options, q, k, v, i, log_f, state, documents):
    """((h, state), den [bh, c, l])."""
    batch = v.shape[0]
    found, numbers, m = blocks.gate_rows(i, log_f, documents, state.m, options.chunk)
    rows = _stack(found, numbers, found.bound)
    q, k, v = map(blocks.merge, (q, k, v))
    plan = _plan(options, k, v)
    state_shapes, state_specs = plan.state(options)
    den = (plan.heads, plan.chunks, 1, plan.length) if options.normalised else None
    h, den, pair = _call(
        tpu_kernels.forward,
        options,
        plan,
        (q, k, v, rows, _pair(state)),
        [*map(plan.tokens, (q, k, v)), plan.per_chunk(SUBLANES, plan.length), state_specs],
        [_shape(*v.shape, dtype=v.dtype), den and _shape(*den), state_shapes],
        [plan.tokens(v), den and plan.per_chunk(1, plan.length), state_specs],
    )
    den = None if den is None else den.reshape(found.r.shape)
    return (blocks.split(h, batch), _unpair(pair, batch, m)), den


def _forward(options, q, k, v, i, log_f, state, documents):
    (h, last), den = _run(options, q, k, v, i, log_f, state, documents)
    kept = h if options.normalised else None
    return (h, last), (q, k, v, i, log_f, state, documents, kept, den)


def _backward(options, residuals, cotangents):
    q, k, v, i, log_f, state, documents, h, den = residuals
    dh, d_last = cotangents
    batch, given = v.shape[0], (q, k)
    found, numbers, _ = blocks.gate_rows(i, log_f, documents, state.m, options.chunk)
    inverse = dden = None
    if options.normalised:
        bound = jnp.maximum(jnp.abs(den), found.bound) + options.eps
        inverse, dden = 1.0 / bound, jnp.zeros_like(den)
        if not options.official_backward:
            dden = gates.den_gradient(dh, h, den, bound, found.bound)
    rows = _stack(found, numbers, inverse, dden)
    q, k, v, dh = map(blocks.merge, (q, k, v, dh))
    before = _states(options, k, v, rows, state)
    plan = _plan(options, k, v, reverse=True)
    state_shapes, state_specs = plan.state(options)
    per_chunk = plan.per_chunk(SUBLANES, plan.length)
    d_query = _shape(plan.heads, *q.shape[1:], dtype=q.dtype)
    d_key = _shape(plan.heads, *k.shape[1:], dtype=k.dtype)
    dq, dk, dv, flow, pair = _call(
        tpu_kernels.backward,
        options,
        plan,
        (q, k, v, dh, rows, before, _pair(d_last)),
        [*map(plan.tokens, (q, k, v, dh)), per_chunk]
        + [plan.state(options, per_chunk=True)[1], state_specs],
        [d_query, d_key, _shape(*v.shape, dtype=v.dtype)]
        + [_shape(plan.heads, plan.chunks, SUBLANES, plan.length), state_shapes],
        [*map(plan.tokens, (d_query, d_key, v)), per_chunk, state_specs],
    )
    flow = blocks.split(flow, batch)
    di = flow[:, :, :, 1]
    dlog_f = flow[:, :, :, 0] - di
    if options.official_backward:  # one sum over the whole row, nothing from the last state
        dlog_f = dlog_f.reshape(*flow.shape[:2], -1)
    dlog_f = jnp.cumsum(dlog_f[..., ::-1], axis=-1)[..., ::-1]
    if not options.official_backward:
        dlog_f += flow[:, :, :, 2]
    if i is None:
        dlog_f = gates.of_visible_decays(dlog_f.reshape(log_f.shape), log_f)
    dq, dk = (blocks.sum_groups(x, like) for x, like in zip((dq, dk), given))
    di, dlog_f = (x.reshape(log_f.shape) for x in (di, dlog_f))
    dm = None if state.m is None else jnp.zeros_like(state.m)
    d_first = _unpair(pair, batch, dm)
    return dq, dk, blocks.split(dv, batch), None if i is None else di, dlog_f, d_first, None


def _states(options, k, v, rows, state: State):
    """(C, n) before every chunk: [bh, chunks, K, V] in the type of k, [bh, chunks, 1, K]."""
    plan = _plan(options, k, v)
    shapes, specs = plan.state(options)
    before_shapes, before_specs = plan.state(options, k.dtype, per_chunk=True)
    return _call(
        tpu_kernels.states,
        options,
        plan,
        (k, v, rows, _pair(state)),
        [plan.tokens(k), plan.tokens(v), plan.per_chunk(SUBLANES, plan.length), specs],
        [before_shapes, shapes],
        [before_specs, specs],
    )[0]


_chunkwise.defvjp(_forward, _backward)
