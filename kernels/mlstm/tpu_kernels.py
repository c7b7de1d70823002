"""What the mLSTM's TPU kernels do with one chunk of one head (kernels/mlstm/tpu.py calls them).

Every function reads and writes references to blocks in VMEM. Eight float32 rows of a chunk hold the
gates; the state of the head stays in its output block from chunk to chunk.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.mlstm import gates

SUBLANES = 8  # gate rows of a chunk: one float32 tile
R, C_, W, U, BOUND, GAMMA, DOCUMENT, DDEN = range(8)  # which row is what; backward: 1 / bound


def _dot(x, y, contract):
    """Product over one axis of each; float32 operands in full float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision, preferred_element_type=jnp.float32)


def _weights(rows, columns, packed):
    """E [L, L]: exp(r_t + c_s) where token t sees token s, else 0."""
    length = rows.shape[1]
    t = jax.lax.broadcasted_iota(jnp.int32, (length, length), 0)
    s = jax.lax.broadcasted_iota(jnp.int32, (length, length), 1)
    seen = s <= t
    if packed:
        seen &= columns[:, DOCUMENT : DOCUMENT + 1] == rows[DOCUMENT : DOCUMENT + 1]
    exponent = columns[:, R : R + 1] + rows[C_ : C_ + 1]
    return jnp.exp(jnp.where(seen, exponent, gates.NEVER))


def forward(options, q_ref, k_ref, v_ref, rows_ref, C0_ref, n0_ref,
            h_ref, den_ref, C_ref, n_ref):  # fmt: skip
    """h of the chunk, its denominators (for the gradient) and the state after it."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        C_ref[...] = C0_ref[...]
        n_ref[...] = n0_ref[...]

    q, k, v, rows = q_ref[...], k_ref[...], v_ref[...], rows_ref[...]
    C, n = C_ref[...], n_ref[...]
    columns = rows.T  # [L, 8]: a column broadcasts over lanes
    w = options.scale * columns[:, W : W + 1]
    S = _dot(q, k, (1, 1)) * (options.scale * _weights(rows, columns, options.packed))
    num = w * _dot(q, C.astype(q.dtype), (1, 0)) + _dot(S.astype(v.dtype), v, (1, 0))
    den = w * (q.astype(jnp.float32) * n).sum(1, keepdims=True) + S.sum(1, keepdims=True)
    bound = jnp.maximum(jnp.abs(den), columns[:, BOUND : BOUND + 1]) + options.eps
    h_ref[...] = (num / bound).astype(h_ref.dtype)
    den_ref[...] = den.T
    _advance(k, v, rows, columns, C, n, C_ref, n_ref)


def _advance(k, v, rows, columns, C, n, C_ref, n_ref):
    """The state after a chunk."""
    gamma = rows[GAMMA : GAMMA + 1, 0:1]
    ku = columns[:, U : U + 1] * k.astype(jnp.float32)
    C_ref[...] = gamma * C + _dot(ku.astype(k.dtype), v, (0, 0))
    n_ref[...] = gamma * n + ku.sum(0, keepdims=True)


def states(options, k_ref, v_ref, rows_ref, C0_ref, n0_ref, Cs_ref, ns_ref, C_ref, n_ref):
    """Stores the state before each chunk."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        C_ref[...] = C0_ref[...]
        n_ref[...] = n0_ref[...]

    rows, C, n = rows_ref[...], C_ref[...], n_ref[...]
    Cs_ref[...] = C.astype(Cs_ref.dtype)
    ns_ref[...] = n
    _advance(k_ref[...], v_ref[...], rows, rows.T, C, n, C_ref, n_ref)


def backward(options, q_ref, k_ref, v_ref, dh_ref, rows_ref, Cs_ref, ns_ref,
             dC_last_ref, dn_last_ref, dq_ref, dk_ref, dv_ref, flow_ref,
             dC_ref, dn_ref):  # fmt: skip
    """Gradients of the chunk's q, k, v and of the state before it, from those of h and of the
    state after it; `flow` rows: <q, dq>, <k, dk>, <C', dC'> + <n', dn'> of the outgoing state."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        dC_ref[...] = dC_last_ref[...]
        dn_ref[...] = dn_last_ref[...]

    wide = jnp.float32
    q, k, v, rows = q_ref[...], k_ref[...], v_ref[...], rows_ref[...]
    C, n, dC, dn = Cs_ref[...], ns_ref[...], dC_ref[...], dn_ref[...]
    narrow = v.dtype
    columns = rows.T
    w, u = options.scale * columns[:, W : W + 1], columns[:, U : U + 1]
    dden, gamma = columns[:, DDEN : DDEN + 1], rows[GAMMA : GAMMA + 1, 0:1]
    E = options.scale * _weights(rows, columns, options.packed)
    S = (_dot(q, k, (1, 1)) * E).astype(narrow)
    dnum = (dh_ref[...].astype(wide) * columns[:, BOUND : BOUND + 1]).astype(narrow)
    P = ((_dot(dnum, v, (1, 1)) + dden) * E).astype(narrow)
    dC_narrow = dC.astype(narrow)
    dq = _dot(P, k, (1, 0)) + w * (_dot(dnum, C.astype(narrow), (1, 1)) + dden * n)
    from_next = u * (_dot(v, dC_narrow, (1, 1)) + dn)
    dk = _dot(P, q, (0, 0)) + from_next
    dv = _dot(S, dnum, (0, 0)) + u * _dot(k, dC_narrow, (1, 0))
    dq_ref[...], dk_ref[...] = dq.astype(dq_ref.dtype), dk.astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)
    q, k = q.astype(wide), k.astype(wide)
    # <C', dC'> + <n', dn'> of the outgoing state, without it: what came from the state before and
    # what this chunk's tokens wrote.
    carried = (C.astype(wide) * dC).sum((0, 1), keepdims=True) + (n * dn).sum(1, keepdims=True)
    written = (k * from_next).sum((0, 1), keepdims=True)
    sums = [(q * dq).sum(1, keepdims=True), (k * dk).sum(1, keepdims=True)]
    into_next = jnp.broadcast_to(gamma * carried + written, sums[0].shape)
    lane = jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], SUBLANES), 1)
    flow = jnp.where(lane == 0, sums[0], jnp.where(lane == 1, sums[1], into_next))
    flow_ref[...] = flow.T
    wq = w * q
    dC_ref[...] = gamma * dC + _dot(wq.astype(narrow), dnum, (0, 0))
    dn_ref[...] = gamma * dn + (wq * dden).sum(0, keepdims=True)
