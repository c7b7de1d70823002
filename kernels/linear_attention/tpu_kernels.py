"""What the TPU kernels do with one chunk of one head (kernels/linear_attention/tpu.py calls them).

Every function reads and writes references to blocks in VMEM. Eight float32 rows of a chunk hold the
gates; the state of the head, (C, n), stays in its output block from chunk to chunk. Ops without a
normaliser have None for n and for everything else that belongs to it.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.linear_attention import gates

SUBLANES = 8  # gate rows of a chunk: one float32 tile
R, C_, W, U, BOUND, GAMMA, DOCUMENT, DDEN = range(8)  # which row is what; backward: 1 / bound
# Without a normaliser: U times the gain (C_ would be -R), the rest of R, what v is multiplied by.
WRITE, FINE, GAIN = C_, BOUND, DDEN


def dot(x, y, contract):
    """Product over one axis of each; float32 operands in full float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision, preferred_element_type=jnp.float32)


def weights(options, rows, columns):
    """E [L, L]: exp(r_t + c_s) where token t sees token s, else 0."""
    length = rows.shape[1]
    t = jax.lax.broadcasted_iota(jnp.int32, (length, length), 0)
    s = jax.lax.broadcasted_iota(jnp.int32, (length, length), 1)
    seen = s <= t
    if options.packed:
        seen &= columns[:, DOCUMENT : DOCUMENT + 1] == rows[DOCUMENT : DOCUMENT + 1]
    if options.normalised:
        exponent = columns[:, R : R + 1] + rows[C_ : C_ + 1]
    else:
        exponent = columns[:, R : R + 1] - rows[R : R + 1]
        exponent += columns[:, FINE : FINE + 1] - rows[FINE : FINE + 1]
    return jnp.exp(jnp.where(seen, exponent, gates.NEVER))


def _diagonal(P):
    """(a token's part in its own output [L, 1], P without it).

    It cancels in the decays' gradient, where behind strong decays there is little else.
    """
    t = jax.lax.broadcasted_iota(jnp.int32, P.shape, 0)
    s = jax.lax.broadcasted_iota(jnp.int32, P.shape, 1)
    own = jnp.where(s == t, P.astype(jnp.float32), 0.0).sum(1, keepdims=True)
    return own, jnp.where(s == t, jnp.zeros_like(P), P)


def start(first, state):
    """Before the first chunk: the state of the head."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        for given, ref in zip(jax.tree.leaves(first), jax.tree.leaves(state), strict=True):
            ref[...] = given[...]


def _read(state):
    C, n = state
    return C[...], None if n is None else n[...]


def forward(options, q_ref, k_ref, v_ref, rows_ref, first, h_ref, den_ref, state):
    """h of the chunk, its denominators (for the gradient) and the state after it."""
    start(first, state)
    q, k, v, rows = q_ref[...], k_ref[...], v_ref[...], rows_ref[...]
    C, n = _read(state)
    columns = rows.T  # [L, 8]: a column broadcasts over lanes
    w = options.scale * columns[:, W : W + 1]
    S = dot(q, k, (1, 1)) * (options.scale * weights(options, rows, columns))
    h = w * dot(q, C.astype(q.dtype), (1, 0)) + dot(S.astype(v.dtype), v, (1, 0))
    if options.normalised:
        den = w * (q.astype(jnp.float32) * n).sum(1, keepdims=True) + S.sum(1, keepdims=True)
        h = h / (jnp.maximum(jnp.abs(den), columns[:, BOUND : BOUND + 1]) + options.eps)
        den_ref[...] = den.T
    h_ref[...] = h.astype(h_ref.dtype)
    _advance(k, v, rows, columns, C, n, *state)


def _advance(k, v, rows, columns, C, n, C_ref, n_ref):
    """The state after a chunk."""
    gamma = rows[GAMMA : GAMMA + 1, 0:1]
    ku = columns[:, U : U + 1] * k.astype(jnp.float32)
    C_ref[...] = gamma * C + dot(ku.astype(k.dtype), v, (0, 0))
    if n is not None:
        n_ref[...] = gamma * n + ku.sum(0, keepdims=True)


def states(options, k_ref, v_ref, rows_ref, first, before, state):
    """Stores the state before each chunk."""
    start(first, state)
    rows, (C, n) = rows_ref[...], _read(state)
    Cs_ref, ns_ref = before
    Cs_ref[...] = C.astype(Cs_ref.dtype)
    if n is not None:
        ns_ref[...] = n
    _advance(k_ref[...], v_ref[...], rows, rows.T, C, n, *state)


def backward(options, q_ref, k_ref, v_ref, dh_ref, rows_ref, before, last,
             dq_ref, dk_ref, dv_ref, flow_ref, gradient):  # fmt: skip
    """Gradients of the chunk's q, k, v and of the state before it, from those of h and of the
    state after it; `flow` rows: out, entering and kept of gates.of_decays, <k, dk>."""
    start(last, gradient)
    wide = jnp.float32
    q, k, v, rows = q_ref[...], k_ref[...], v_ref[...], rows_ref[...]
    (C, n), (dC, dn) = _read(before), _read(gradient)
    narrow = v.dtype
    columns = rows.T
    w, u = options.scale * columns[:, W : W + 1], columns[:, U : U + 1]
    gamma = rows[GAMMA : GAMMA + 1, 0:1]
    E = options.scale * weights(options, rows, columns)
    S = (dot(q, k, (1, 1)) * E).astype(narrow)
    dnum = dh_ref[...]
    if options.normalised:
        dnum = (dnum.astype(wide) * columns[:, BOUND : BOUND + 1]).astype(narrow)
    dC_narrow = dC.astype(narrow)
    P = dot(dnum, v, (1, 1))
    from_state, from_next = dot(dnum, C.astype(narrow), (1, 1)), dot(v, dC_narrow, (1, 1))
    carried = (C.astype(wide) * dC).sum((0, 1), keepdims=True)
    if options.normalised:
        dden = columns[:, DDEN : DDEN + 1]
        P, from_state, from_next = P + dden, from_state + dden * n, from_next + dn
        carried += (n * dn).sum(1, keepdims=True)
    P, from_next = (P * E).astype(narrow), u * from_next
    if not options.normalised:
        own, P = _diagonal(P)
    dq = dot(P, k, (1, 0)) + w * from_state
    dk = dot(P, q, (0, 0))
    dv = dot(S, dnum, (0, 0)) + u * dot(k, dC_narrow, (1, 0))
    dv_ref[...] = dv.astype(dv_ref.dtype)
    q, k = q.astype(wide), k.astype(wide)
    within, entering = ((k * x).sum(1, keepdims=True) for x in (dk, from_next))
    out, dk = (q * dq).sum(1, keepdims=True) - within, dk + from_next
    if not options.normalised:
        dq, dk = dq + own * k, dk + own * q
    dq_ref[...], dk_ref[...] = dq.astype(dq_ref.dtype), dk.astype(dk_ref.dtype)
    kept = jnp.broadcast_to(gamma * carried, out.shape)
    lane = jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], SUBLANES), 1)
    flow = within + entering
    for index, values in enumerate((out, entering, kept)):
        flow = jnp.where(lane == index, values, flow)
    flow_ref[...] = flow.T
    wq = w * q
    dC_ref, dn_ref = gradient
    dC_ref[...] = gamma * dC + dot(wq.astype(narrow), dnum, (0, 0))
    if options.normalised:
        dn_ref[...] = gamma * dn + (wq * dden).sum(0, keepdims=True)
