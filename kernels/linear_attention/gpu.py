"""Gated linear attention on Hopper GPUs: two Pallas (Mosaic GPU) kernels, forward and backward.

A head's memory C (256 x 512 at xLSTM 7B's sizes) does not fit a multiprocessor, and eight heads
would idle most of them. So a first kernel walks the chunks with 128 x 128 tiles of C, many tiles at
once, and stores the memory before each chunk in bfloat16; a second one computes all chunks in
parallel. The gradient needs the memories once more, those of the gradient of C in reverse, and
the second kernel three times (gpu_kernels.py has the equations).

What has no C in it stays in XLA: gates (gates.py), the normaliser n between chunks, the gates'
gradients from sums over rows. Those are, with t over the row up to the end of the document,

    dlf_r = sum_{t >= r} (<q_t, dq_t> - <k_t, dk_t>) + <C, dC> + <n, dn> of the last state.

Sizes are padded to 128; bfloat16 only. Heads that share q and k read the same blocks; their
gradients are written for each head and summed outside.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.errors import NotSupported
from kernels.linear_attention import blocks, gates, gpu_kernels
from kernels.linear_attention.form import Form, State, gained
from kernels.linear_attention.gpu_kernels import BLOCK, ROWS, SLOTS, USERS, Product

HOPPER = ("NVIDIA H100", "NVIDIA H20", "NVIDIA GH200")  # names of devices with wgmma


class Options(NamedTuple):
    """What is fixed when compiling."""

    name: str
    eps: float
    scale: float
    official_backward: bool
    normalised: bool
    packed: bool
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
    """kernels/linear_attention/xla.py's function for bfloat16.

    chunk: 128 is the only one. interpret: on the CPU, for tests.
    """
    name = form.name
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)}:
        raise NotSupported(f"{name} on GPU takes bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}")
    if not interpret and not dispatch.device_kind().startswith(HOPPER):
        raise NotSupported(f"{name} on GPU takes Hopper (H100, H200): wgmma is of no other")
    if chunk not in (None, BLOCK):
        raise NotSupported(f"{name} on GPU has chunks of {BLOCK}, not {chunk}")
    length, width, out = v.shape[2], q.shape[3], v.shape[3]
    options = Options(
        name,
        form.eps,
        form.scale,
        form.official_backward,
        normalised=state.n is not None,
        packed=documents is not None,
        interpret=interpret,
    )
    inputs = blocks.padded(q, k, gained(v, gain), i, log_f, state, documents, BLOCK)
    h, last = _chunkwise(options, *inputs)
    return blocks.cropped(h, last, length, width, out)


def _kernel(name, body, grid, names, out_types, scratch, options):
    """plgpu.kernel with USERS + 1 warpgroups."""
    return plgpu.kernel(
        body,
        kernel_name=f"{options.name}_{name}",
        out_type=out_types,
        scratch_types=[scratch],
        grid=grid,
        grid_names=names,
        num_threads=USERS + 1,
        thread_name="user",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if options.interpret else None,
    )


def _sweep(name, options: Options, x, y, weight, gamma, C, reverse=False):
    """(memory before each chunk [bh, c, K, V] in bfloat16, the last one in float32)."""
    heads, tokens, V = y.shape
    K, chunks = x.shape[-1], tokens // BLOCK
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
    call = _kernel(name, body, grid, ("head", "k", "v"), out, shared, options)
    return call(x, y, rows, C)


def _product(name, options: Options, kind, x, y, z, M, rows, vector=None, partner=None):
    """(out [bh, T, D2], side [bh, c, 2, 128]) of gpu_kernels.product; `kind`: its use."""
    product = _kind(options, *kind)
    heads, chunks, tokens = M.shape[0], M.shape[1], x.shape[1]
    inner, outer = x.shape[-1], z.shape[-1]
    vector = jnp.zeros((1, 1, 1, BLOCK), jnp.float32) if vector is None else vector[:, :, None]
    partner = x if partner is None else partner
    shared = (
        gpu_kernels.blocks(SLOTS),
        gpu_kernels.blocks(),
        gpu_kernels.blocks(),
        plgpu.SMEM((ROWS, BLOCK), jnp.float32),
        plgpu.SMEM(vector.shape[2:], jnp.float32),
        plgpu.SMEM((2, BLOCK), jnp.float32),
        plgpu.Barrier(num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=USERS, num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=2 if product.vector or product.normalise else 1),
    )
    body = functools.partial(gpu_kernels.product, product, (inner, outer))
    out = [
        jax.ShapeDtypeStruct((heads, tokens, outer), z.dtype),
        jax.ShapeDtypeStruct((heads, chunks, 2, BLOCK), jnp.float32),
    ]
    call = _kernel(name, body, (heads, chunks), ("head", "chunk"), out, shared, options)
    return call(x, y, z, M, rows, vector, partner)


def _kind(options: Options, *names: str) -> Product:
    """A use of the product by its flags; those of the normaliser only where there is one."""
    flags = dict.fromkeys(Product._fields[Product._fields.index("later") :], False)
    flags |= dict.fromkeys(names, True)
    if not options.normalised:
        of_normaliser = ("gain", "bias", "vector", "normalise")
        flags |= dict.fromkeys(of_normaliser, False) | {"fine": True}
    flags |= dict(packed=options.packed, interpret=options.interpret)
    return Product(options.scale, options.eps, **flags)


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


def _rows(**rows):
    """The eight rows of gpu_kernels.product, by name; those not named are 0."""
    one = next(iter(rows.values()))
    named = {getattr(gpu_kernels, name): row for name, row in rows.items() if row is not None}
    return jnp.stack([named.get(r, jnp.zeros_like(one)) for r in range(ROWS)], axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunkwise(options, q, k, v, i, log_f, state, documents):
    return _run(options, q, k, v, i, log_f, state, documents)[0]


def _run(options, q, k, v, i, log_f, state, documents):
    """((h, state), den [bh, c, l])."""
    found, numbers, m = blocks.gate_rows(i, log_f, documents, state.m, BLOCK)
    rows = v.shape[0]
    q, k, v, C, n = map(blocks.merge, (q, k, v, state.C, state.n))
    Cs, C = _sweep("C", options, k, v, found.u, found.gamma, C)
    ns = None
    if options.normalised:
        ns, n = _normalisers(k, found.u, found.gamma, n)
    w = options.scale * found.w
    named = dict(ALONG_X=found.r, ALONG_Y=found.c, DOCUMENT=numbers, INTER=w, BOUND=found.bound)
    kind = ("normalise",)
    h, den = _product("h", options, kind, q, k, v, Cs, _rows(**named, **_fine(found)), ns)
    return (blocks.split(h, rows), State(*blocks.split((C, n), rows), m)), den[:, :, 0]


def _fine(found: gates.Rows, sign=1.0):
    """The second part of the exponents along q's and k's tokens (sign 1), k's and q's (-1)."""
    if found.fine is None:
        return {}
    return dict(FINE_X=sign * found.fine, FINE_Y=-sign * found.fine)


def _forward(options, q, k, v, i, log_f, state, documents):
    (h, last), den = _run(options, q, k, v, i, log_f, state, documents)
    kept = (h, den) if options.normalised else (None, None)
    return (h, last), (q, k, v, i, log_f, state, documents, *kept)


def _backward(options, residuals, cotangents):
    q, k, v, i, log_f, state, documents, h, den = residuals
    dh, (dC, dn, _) = cotangents
    batch, given, dm = v.shape[0], (q, k), jax.tree.map(jnp.zeros_like, state.m)
    found, numbers, _ = blocks.gate_rows(i, log_f, documents, state.m, BLOCK)
    w = options.scale * found.w
    of_h, of_den, bias = w, None, None  # weights of the memory's part of h and den
    named = dict(DOCUMENT=numbers)
    if options.normalised:
        bound = jnp.maximum(jnp.abs(den), found.bound) + options.eps
        bias = jnp.zeros_like(den)
        if not options.official_backward:
            bias = gates.den_gradient(dh, h, den, bound, found.bound)
        of_h, of_den = w / bound, w * bias
        named |= dict(GAIN=1.0 / bound, BIAS=bias)
    q, k, v, dh, C, n, dC, dn = map(blocks.merge, (q, k, v, dh, state.C, state.n, dC, dn))
    dh = dh.astype(v.dtype)
    Cs, _ = _sweep("C", options, k, v, found.u, found.gamma, C)
    dCs, dC = _sweep("dC", options, q, dh, of_h, found.gamma, dC, reverse=True)
    ns = dns = None
    if options.normalised:
        ns, _ = _normalisers(k, found.u, found.gamma, n)
        dns, dn = _normalisers(q, of_den, found.gamma, dn, reverse=True)
    along = dict(ALONG_X=found.r, ALONG_Y=found.c, INTER=of_h, VECTOR=of_den)
    rows = _rows(**along, **named, **_fine(found))
    kind = ("gain", "across", "bias", "transposed", "vector", "partner")
    dq, along_q = _product("dq", options, kind, dh, v, k, Cs, rows, ns, q)
    along = dict(ALONG_X=found.c, ALONG_Y=found.r, INTER=found.u, VECTOR=found.u)
    rows = _rows(**along, **named, **_fine(found, -1.0))
    kind = ("gain", "later", "bias", "transposed", "vector", "partner")
    dk, di = _product("dk", options, kind, v, dh, q, dCs, rows, dns, k)
    dv, _ = _product("dv", options, ("gain", "later"), k, q, dh, dCs, rows)
    out, entering = along_q.sum(2) - di[:, :, 1], di[:, :, 0]
    if options.official_backward:  # one sum over the whole row, nothing from the last state
        flow = (out - entering).reshape(log_f.shape)
        dlog_f = jnp.cumsum(flow[..., ::-1], axis=-1)[..., ::-1]
    else:
        kept = _inner(Cs, dCs) + (_inner(ns, dns) if options.normalised else 0.0)
        dlog_f = gates.of_decays(found.gamma * kept, out, entering).reshape(log_f.shape)
    if i is None:
        dlog_f = gates.of_visible_decays(dlog_f, log_f)
    dq, dk = (blocks.sum_groups(x, like) for x, like in zip((dq, dk), given))
    dv, dC, dn = blocks.split((dv, dC, dn), batch)
    di = None if i is None else di.sum(2).reshape(log_f.shape)
    return dq, dk, dv, di, dlog_f, State(dC, dn, dm), None


def _inner(x, y) -> Float[Array, "bh c"]:
    """<x, y> of each chunk's states."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return (x * y).sum(tuple(range(2, x.ndim)))


_chunkwise.defvjp(_forward, _backward)
