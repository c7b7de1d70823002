"""The mLSTM on Hopper GPUs: two Pallas (Mosaic GPU) kernels, used forward and backward.

A head's memory C (256 x 512 at xLSTM 7B's sizes) does not fit a multiprocessor, and eight heads
would idle most of them. So a first kernel walks the chunks with 128 x 128 tiles of C, many tiles at
once, and stores the memory before each chunk in bfloat16; a second one computes all chunks in
parallel. The gradient needs the memories once more, those of the gradient of C in reverse, and
the second kernel three times (kernels/mlstm/gpu_kernels.py has the equations).

What has no C in it stays in XLA: gates (gates.py), the normaliser n between chunks, the gates'
gradients from sums over rows. Those are, with t over the row up to the end of the document,

    dlf_r = sum_{t >= r} (<q_t, dq_t> - <k_t, dk_t>) + <C, dC> + <n, dn> of the last state.

Sizes are padded to 128; bfloat16 only.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.errors import NotSupported
from kernels.mlstm import blocks, gates, gpu_kernels
from kernels.mlstm.gpu_kernels import BLOCK, ROWS, SLOTS, USERS, Product
from kernels.mlstm.ref import EPS, State

HOPPER = ("NVIDIA H100", "NVIDIA H20", "NVIDIA GH200")  # names of devices with wgmma


class Options(NamedTuple):
    """What is fixed when compiling."""

    eps: float
    scale: float
    official_backward: bool
    packed: bool
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
    """The reference's function for bfloat16; options as in kernels/mlstm/xla.py.

    chunk: 128 is the only one. interpret: on the CPU, for tests.
    """
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)}:
        raise NotSupported(f"mlstm on GPU takes bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}")
    if not interpret and not dispatch.device_kind().startswith(HOPPER):
        raise NotSupported("mlstm on GPU takes Hopper (H100, H200): wgmma is of no other")
    if chunk not in (None, BLOCK):
        raise NotSupported(f"mlstm on GPU has chunks of {BLOCK}, not {chunk}")
    length, width, out = q.shape[2], q.shape[3], v.shape[3]
    packed = documents is not None
    options = Options(eps, width**-0.5, official_backward, packed, interpret)
    inputs = blocks.padded(q, k, v, i, f, state, documents, BLOCK)
    h, (C, n, m) = _chunkwise(options, *inputs)
    return h[:, :, :length, :out], State(C[:, :, :width, :out], n[..., :width], m)


def _kernel(name, body, grid, names, out_types, scratch, interpret):
    """plgpu.kernel with USERS + 1 warpgroups."""
    return plgpu.kernel(
        body,
        kernel_name=f"mlstm_{name}",
        out_type=out_types,
        scratch_types=[scratch],
        grid=grid,
        grid_names=names,
        num_threads=USERS + 1,
        thread_name="user",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def _sweep(name, options: Options, x, y, weight, gamma, C, reverse=False):
    """(memory before each chunk [bh, c, K, V] in bfloat16, the last one in float32)."""
    heads, tokens, K = x.shape
    V, chunks = y.shape[-1], tokens // BLOCK
    rows = jnp.stack([weight, jnp.broadcast_to(gamma[..., None], weight.shape)], 2)
    shared = (
        gpu_kernels.blocks(SLOTS),
        gpu_kernels.blocks(SLOTS // 2),
        gpu_kernels.blocks(),
        plgpu.SMEM((SLOTS // 2, 2, BLOCK), jnp.float32),
        plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS // 2),
        plgpu.Barrier(num_arrivals=USERS, num_barriers=SLOTS // 2),
        plgpu.Barrier(num_arrivals=USERS),
    )
    body = functools.partial(gpu_kernels.sweep, reverse, tokens)
    out = [
        jax.ShapeDtypeStruct((heads, chunks, K, V), x.dtype),
        jax.ShapeDtypeStruct((heads, K, V), jnp.float32),
    ]
    grid = (heads, K // BLOCK, V // BLOCK)
    call = _kernel(name, body, grid, ("head", "k", "v"), out, shared, options.interpret)
    return call(x, y, rows, C)


def _product(name, options: Product, x, y, z, M, rows, vector, partner):
    """(out [bh, T, D2], side [bh, c, 128]) of gpu_kernels.product."""
    heads, tokens, inner = x.shape
    outer, chunks = z.shape[-1], tokens // BLOCK
    shared = (
        gpu_kernels.blocks(SLOTS),
        gpu_kernels.blocks(),
        gpu_kernels.blocks(),
        plgpu.SMEM((ROWS, BLOCK), jnp.float32),
        plgpu.SMEM(vector.shape[2:], jnp.float32),
        plgpu.SMEM((BLOCK,), jnp.float32),
        plgpu.Barrier(num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=USERS, num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=2),
    )
    body = functools.partial(gpu_kernels.product, options, (inner, outer))
    out = [
        jax.ShapeDtypeStruct((heads, tokens, outer), z.dtype),
        jax.ShapeDtypeStruct((heads, chunks, BLOCK), jnp.float32),
    ]
    call = _kernel(name, body, (heads, chunks), ("head", "chunk"), out, shared, options.interpret)
    return call(x, y, z, M, rows, vector, partner)


def _normalisers(k, weight, gamma, n, reverse=False):
    """n before each chunk [bh, c, K] and the last [bh, K]: n' = gamma n + sum_s weight_s k_s."""
    k = k.reshape(*weight.shape, -1).astype(jnp.float32)
    written = jnp.einsum("hcl,hclk->hck", weight, k)

    def then(first, second):
        (g1, x1), (g2, x2) = first, second
        return g1 * g2, g2[..., None] * x1 + x2

    kept, sums = jax.lax.associative_scan(then, (gamma, written), axis=1, reverse=reverse)
    after = kept[..., None] * n[:, None] + sums
    if reverse:
        return jnp.concatenate([after[:, 1:], n[:, None]], 1), after[:, 0]
    return jnp.concatenate([n[:, None], after[:, :-1]], 1), after[:, -1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunkwise(options, q, k, v, i, log_f, C, n, m, documents):
    return _run(options, q, k, v, i, log_f, C, n, m, documents)[0]


def _rows(**rows):
    """The eight rows of gpu_kernels.product, by name; those not named are 0."""
    one = next(iter(rows.values()))
    named = {getattr(gpu_kernels, name): row for name, row in rows.items()}
    return jnp.stack([named.get(r, jnp.zeros_like(one)) for r in range(ROWS)], axis=2)


def _run(options, q, k, v, i, log_f, C, n, m, documents):
    """((h, state), den [bh, c, l])."""
    batch = q.shape[:2]
    found, numbers, last = blocks.gate_rows(i, log_f, documents, m, BLOCK)
    q, k, v, C, n = map(blocks.merge, (q, k, v, C, n))
    Cs, C = _sweep("C", options, k, v, found.u, found.gamma, C)
    ns, n = _normalisers(k, found.u, found.gamma, n)
    rows = _rows(
        ALONG_X=found.r,
        ALONG_Y=found.c,
        DOCUMENT=numbers,
        INTER=options.scale * found.w,
        BOUND=found.bound,
    )
    kind = _kind(options, normalise=True)
    h, den = _product("h", kind, q, k, v, Cs, rows, ns[:, :, None], q)
    split = lambda x: x.reshape(*batch, *x.shape[1:])  # noqa: E731
    return (split(h), (split(C), split(n), last)), den


def _kind(options: Options, **given) -> Product:
    names = ("later", "across", "gain", "bias", "transposed", "vector", "normalise", "partner")
    flags = dict.fromkeys(names, False) | given
    return Product(
        scale=options.scale,
        eps=options.eps,
        packed=options.packed,
        interpret=options.interpret,
        **flags,
    )


def _forward(options, q, k, v, i, log_f, C, n, m, documents):
    (h, state), den = _run(options, q, k, v, i, log_f, C, n, m, documents)
    return (h, state), (q, k, v, i, log_f, C, n, m, documents, h, den, state)


def _backward(options, residuals, cotangents):
    q, k, v, i, log_f, C, n, m, documents, h, den, last = residuals
    dh, (dC, dn, _) = cotangents
    batch, length = q.shape[:2], q.shape[2]
    found, numbers, _ = blocks.gate_rows(i, log_f, documents, m, BLOCK)
    bound = jnp.maximum(jnp.abs(den), found.bound) + options.eps
    dden = jnp.zeros_like(den)
    if not options.official_backward:
        dden = gates.den_gradient(dh, h, den, bound, found.bound)
    into_last = (last[0] * dC).sum((-2, -1)) + (last[1] * dn).sum(-1)
    q, k, v, dh, C, n, dC, dn = map(blocks.merge, (q, k, v, dh, C, n, dC, dn))
    dh, w = dh.astype(v.dtype), options.scale * found.w
    Cs, _ = _sweep("C", options, k, v, found.u, found.gamma, C)
    ns, _ = _normalisers(k, found.u, found.gamma, n)
    dCs, dC = _sweep("dC", options, q, dh, w / bound, found.gamma, dC, reverse=True)
    dns, dn = _normalisers(q, w * dden, found.gamma, dn, reverse=True)
    shared = dict(DOCUMENT=numbers, GAIN=1.0 / bound, BIAS=dden)
    rows = _rows(ALONG_X=found.r, ALONG_Y=found.c, INTER=w / bound, VECTOR=w * dden, **shared)
    back = functools.partial(_kind, options, gain=True)
    kind = back(across=True, bias=True, transposed=True, vector=True, partner=True)
    dq, along_q = _product("dq", kind, dh, v, k, Cs, rows, ns[:, :, None], q)
    rows = _rows(ALONG_X=found.c, ALONG_Y=found.r, INTER=found.u, VECTOR=found.u, **shared)
    kind = back(later=True, bias=True, transposed=True, vector=True, partner=True)
    dk, di = _product("dk", kind, v, dh, q, dCs, rows, dns[:, :, None], k)
    dv, _ = _product("dv", back(later=True), k, q, dh, dCs, rows, dns[:, :, None], k)
    flow = (along_q - di).reshape(*batch, length)
    if options.official_backward:  # one sum over the whole row, nothing from the last state
        dlog_f = jnp.cumsum(flow[..., ::-1], axis=-1)[..., ::-1]
    else:
        dlog_f = _to_end(flow, documents, into_last)
    split = lambda x: x.reshape(*batch, *x.shape[1:])  # noqa: E731
    dq, dk, dv, dC, dn = (split(x) for x in (dq, dk, dv, dC, dn))
    return dq, dk, dv, di.reshape(flow.shape), dlog_f, dC, dn, jnp.zeros_like(m), None


def _to_end(flow, documents, into_last):
    """Sum over the tokens from each to the end of its document, and what the last state adds."""
    numbers = jnp.broadcast_to(documents[:, None], flow.shape)
    flow = flow.at[..., -1].add(into_last)

    def later(first, second):
        (n1, x1), (n2, x2) = first, second
        return n2, jnp.where(n1 == n2, x1 + x2, x2)

    return jax.lax.associative_scan(later, (numbers, flow), axis=2, reverse=True)[1]


_chunkwise.defvjp(_forward, _backward)
