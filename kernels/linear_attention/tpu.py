"""Gated linear attention on TPUs: one fused Pallas (Mosaic) kernel forward, two backward.

Grid (rows x heads, chunks), the chunks in order: the memory C of a head stays in VMEM in float32
while its chunks stream through. Forward reads q, k, v and a few gate rows once and writes h once;
no state and no score reaches HBM. Backward: a forward sweep stores the state before every chunk,
in the type of k; then the chunks come in reverse order with the gradient of C in VMEM.

What a kernel computes is kernels/linear_attention/xla.py's algebra; the exponents come from
gates.py as eight rows of a chunk, turned into columns inside. Gradients of the gates are sums over
rows, finished outside in float32 from products taken before q's and k's gradients are rounded.

Head sizes are padded to 128 lanes (zeros contribute nothing), T to whole chunks (tokens that
neither write nor decay). Narrow heads that share q and k are taken several at a time, side by side
in the lanes (tpu_packed.py); other heads that share them read the same blocks. What each visit adds
to the gradients of shared q and k is written, and summed outside.
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
from kernels.linear_attention import blocks, gates, tpu_kernels, tpu_packed
from kernels.linear_attention.form import Form, State, gained
from kernels.linear_attention.tpu_kernels import SUBLANES

MOST_LANES = 512  # of v in one visit


class Options(NamedTuple):
    """What is fixed when compiling."""

    name: str
    chunk: int
    eps: float
    scale: float  # of q: the true head size counts, not the padded one
    official_backward: bool
    normalised: bool
    packed: bool  # documents end inside chunks
    pack: int  # heads of one visit
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
    gain: Float[Array, "b h t"] | None = None,
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
    pack, lanes = (1, blocks.LANES) if state.n is not None else packing(q.shape[1], *v.shape[1::2])
    options = Options(
        form.name,
        chunk,
        form.eps,
        form.scale,
        form.official_backward,
        normalised=state.n is not None,
        packed=documents is not None,
        pack=pack,
        interpret=interpret,
    )
    if pack == 1:
        v, gain = gained(v, gain), None
    elif gain is None:
        gain = jnp.ones_like(log_f)
    inputs = blocks.padded(q, k, v, i, log_f, state, documents, chunk, lanes)
    if gain is not None:
        gain = blocks.pad(gain.astype(jnp.float32), 2, chunk)
    h, last = _chunkwise(options, *inputs, gain)
    return blocks.cropped(h, last, length, width, out)


def default_chunk(length: int) -> int:
    """256 tokens fill the matrix unit; shorter rows take less."""
    if length >= 256:
        return 256
    return 128 if length > 64 else -(-length // 16) * 16


def packing(groups: int, heads: int, width: int) -> tuple[int, int]:
    """(heads of one visit, what their size is padded to a multiple of)."""
    lanes = min(1 << (width - 1).bit_length(), blocks.LANES)
    padded = -(-width // lanes) * lanes
    pack = 1
    while heads // groups % (2 * pack) == 0 and 2 * pack * padded <= MOST_LANES:
        pack *= 2
    whole = pack > 1 and pack * padded % blocks.LANES == 0
    return (pack, lanes) if whole else (1, blocks.LANES)


class _Plan(NamedTuple):
    """Sizes of one call; block specs of every kind of array."""

    heads: int  # rows x heads
    pack: int
    chunks: int
    length: int
    width: int
    out: int
    reverse: bool

    def _at(self, head, chunk):
        return head, (self.chunks - 1 - chunk if self.reverse else chunk)

    @property
    def visits(self) -> int:
        """Grid cells of a chunk."""
        return self.heads // self.pack

    def tokens(self, x, size: int):
        """[., T, .] cut into blocks of `size` lanes, as many as there are visits or fewer, which
        then share them: one chunk of tokens."""
        beside = x.shape[-1] // size
        shared = self.visits // (x.shape[0] * beside)

        def index(visit, chunk):
            visit, chunk = self._at(visit, chunk)
            block = jax.lax.div(visit, jnp.int32(shared)) if shared > 1 else visit
            if beside == 1:
                return block, chunk, 0
            row, place = (f(block, jnp.int32(beside)) for f in (jax.lax.div, jax.lax.rem))
            return row, chunk, place

        return pl.BlockSpec((None, self.length, size), index)

    def keys(self, x):
        """q, k and their gradients."""
        return self.tokens(x, self.width)

    def values(self, x):
        """v, h and their gradients."""
        return self.tokens(x, self.out)

    def rows(self):
        """[heads, chunks, 8, L]."""
        if self.pack == 1:
            return self.per_chunk(SUBLANES, self.length)
        shape = (self.pack, None, SUBLANES, self.length)
        return pl.BlockSpec(shape, lambda h, c: (*self._at(h, c), 0, 0))

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
        lead = (self.visits, self.chunks) if per_chunk else (self.visits,)
        spec = self.per_chunk if per_chunk else self.per_head
        memory, normaliser = (self.width, self.out), (1, self.width)
        shapes = _shape(*lead, *memory, dtype=dtype), _shape(*lead, *normaliser)
        specs = spec(*memory), spec(*normaliser)
        return (shapes, specs) if options.normalised else ((shapes[0], None), (specs[0], None))


def _plan(options, q_shape, v_shape, reverse=False):
    """Of padded q [b, g, t, k] and v [b, h, t, v]."""
    rows, heads, length, out = v_shape
    chunk, pack = options.chunk, options.pack
    return _Plan(rows * heads, pack, length // chunk, chunk, q_shape[-1], pack * out, reverse)


def _call(name, options, plan, inputs, in_specs, out_shapes, out_specs):
    """One pallas_call over (visits, chunks), with the bytes and FLOPs that the compiler counts."""
    arrays = jax.tree.leaves((inputs, out_shapes))
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    flops, exps = _work(plan)[name]
    kernel = getattr(tpu_kernels if options.pack == 1 else tpu_packed, name)
    return pl.pallas_call(
        functools.partial(kernel, options),
        grid=(plan.visits, plan.chunks),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=exps, bytes_accessed=moved),
        interpret=options.interpret,
        name=f"{options.name}_{name}",
    )(*inputs)


def _work(plan: _Plan) -> dict:
    """(FLOPs of the matrix products, exponentials) of every kernel."""
    length, width, out, pack = plan.length, plan.width, plan.out, plan.pack
    scores, memory = length * width, width * out
    values = length * (out if pack == 1 else pack * max(out // pack, blocks.LANES))
    tokens = plan.visits * plan.chunks * length
    exps = tokens * length * pack
    return {
        "forward": (2 * tokens * (scores + values + 2 * memory), exps),
        "states": (2 * tokens * memory, 0),
        "backward": (
            2 * tokens * (3 * scores + 2 * values + (4 if pack == 1 else 5) * memory),
            exps,
        ),
    }


def _shape(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _stack(found: gates.Rows, numbers, bound, dden=None, gain=None) -> Float[Array, "bh c 8 l"]:
    """The eight rows of every chunk."""
    gamma = jnp.broadcast_to(found.gamma[..., None], found.r.shape)
    second, fifth, eighth = found.c, bound, jnp.zeros_like(found.r) if dden is None else dden
    if found.fine is not None:
        fifth = found.fine
    if gain is not None:
        eighth = gain.reshape(found.r.shape)
        second = found.u * eighth
    rows = [found.r, second, found.w, found.u, fifth, gamma, numbers, eighth]
    return jnp.stack(rows, axis=2)


def _flat(x, pack: int):
    """Arrays of tokens as the kernels want them: [b h, t, d], or heads side by side [b, t, h d]."""
    if pack == 1:
        return blocks.merge(x)
    return jnp.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)


def _unflat(x, pack: int, rows: int, heads: int):
    if pack == 1:
        return blocks.split(x, rows)
    return jnp.moveaxis(x.reshape(rows, x.shape[1], heads, -1), 2, 1)


def _pair(state: State, pack: int):
    """(C, n) with rows and heads joined: n as rows of a tile, C of a pack side by side."""
    C, n = blocks.merge(state[:2])
    if pack > 1:
        C = C.reshape(-1, pack, *C.shape[1:]).swapaxes(1, 2)
        C = C.reshape(*C.shape[:2], -1)
    return C, None if n is None else n[:, None]


def _unpair(pair, pack: int, rows: int, m) -> State:
    C, n = pair
    if pack > 1:
        C = C.reshape(*C.shape[:2], pack, -1).swapaxes(1, 2)
        C = blocks.merge(C)
    return State(*blocks.split((C, None if n is None else n[:, 0]), rows), m)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunkwise(options, q, k, v, i, log_f, state, documents, gain):
    return _run(options, q, k, v, i, log_f, state, documents, gain)[0]


def _run(options, q, k, v, i, log_f, state, documents, gain):
    """((h, state), den [bh, c, l])."""
    batch = v.shape[0]
    found, numbers, m = blocks.gate_rows(i, log_f, documents, state.m, options.chunk)
    rows = _stack(found, numbers, found.bound, gain=gain)
    plan, heads, pack = _plan(options, q.shape, v.shape), v.shape[1], options.pack
    q, k, v = (_flat(x, pack) for x in (q, k, v))
    state_shapes, state_specs = plan.state(options)
    den = (plan.heads, plan.chunks, 1, plan.length) if options.normalised else None
    h, den, pair = _call(
        "forward",
        options,
        plan,
        (q, k, v, rows, _pair(state, pack)),
        [plan.keys(q), plan.keys(k), plan.values(v), plan.rows(), state_specs],
        [_shape(*v.shape, dtype=v.dtype), den and _shape(*den), state_shapes],
        [plan.values(v), den and plan.per_chunk(1, plan.length), state_specs],
    )
    den = None if den is None else den.reshape(found.r.shape)
    return (_unflat(h, pack, batch, heads), _unpair(pair, pack, batch, m)), den


def _forward(options, q, k, v, i, log_f, state, documents, gain):
    (h, last), den = _run(options, q, k, v, i, log_f, state, documents, gain)
    kept = h if options.normalised else None
    return (h, last), (q, k, v, i, log_f, state, documents, gain, kept, den)


def _backward(options, residuals, cotangents):
    q, k, v, i, log_f, state, documents, gain, h, den = residuals
    dh, d_last = cotangents
    (batch, heads), given, pack = v.shape[:2], (q, k), options.pack
    found, numbers, _ = blocks.gate_rows(i, log_f, documents, state.m, options.chunk)
    inverse = dden = None
    if options.normalised:
        bound = jnp.maximum(jnp.abs(den), found.bound) + options.eps
        inverse, dden = 1.0 / bound, jnp.zeros_like(den)
        if not options.official_backward:
            dden = gates.den_gradient(dh, h, den, bound, found.bound)
    rows = _stack(found, numbers, inverse, dden, gain)
    plan = _plan(options, q.shape, v.shape, reverse=True)
    q, k, v, dh = (_flat(x, pack) for x in (q, k, v, dh))
    before = _states(options, plan._replace(reverse=False), k, v, rows, state)
    state_shapes, state_specs = plan.state(options)
    length = plan.chunks * plan.length
    d_query, d_key = (_shape(plan.visits, length, plan.width, dtype=x.dtype) for x in (q, k))
    dq, dk, dv, flow, pair = _call(
        "backward",
        options,
        plan,
        (q, k, v, dh, rows, before, _pair(d_last, pack)),
        [plan.keys(q), plan.keys(k), plan.values(v), plan.values(dh), plan.rows()]
        + [plan.state(options, per_chunk=True)[1], state_specs],
        [d_query, d_key, _shape(*v.shape, dtype=v.dtype)]
        + [_shape(plan.heads, plan.chunks, SUBLANES, plan.length), state_shapes],
        [plan.keys(d_query), plan.keys(d_key), plan.values(v), plan.rows(), state_specs],
    )
    flow = blocks.split(flow, batch)
    out, entering, kept, last_row = (flow[:, :, :, row] for row in range(4))
    if options.official_backward:  # one sum over the whole row, nothing from the last state
        flow = (out - entering).reshape(*flow.shape[:2], -1)
        dlog_f = jnp.cumsum(flow[..., ::-1], axis=-1)[..., ::-1]
    else:
        dlog_f = gates.of_decays(kept[..., 0], out, entering)
    if i is None:
        dlog_f = gates.of_visible_decays(dlog_f.reshape(log_f.shape), log_f)
    dq, dk = (blocks.sum_groups(x, like) for x, like in zip((dq, dk), given))
    di, dlog_f = (x.reshape(log_f.shape) for x in (last_row, dlog_f))
    dm = None if state.m is None else jnp.zeros_like(state.m)
    d_first, dv = _unpair(pair, pack, batch, dm), _unflat(dv, pack, batch, heads)
    d_gain = None if gain is None else last_row.reshape(gain.shape)
    return dq, dk, dv, None if i is None else di, dlog_f, d_first, None, d_gain


def _states(options, plan, k, v, rows, state: State):
    """(C, n) before every chunk: [bh, chunks, K, V] in the type of k, [bh, chunks, 1, K]."""
    shapes, specs = plan.state(options)
    before_shapes, before_specs = plan.state(options, k.dtype, per_chunk=True)
    return _call(
        "states",
        options,
        plan,
        (k, v, rows, _pair(state, options.pack)),
        [plan.keys(k), plan.values(v), plan.rows(), specs],
        [before_shapes, shapes],
        [before_specs, specs],
    )[0]


_chunkwise.defvjp(_forward, _backward)
