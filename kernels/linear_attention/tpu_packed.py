"""What the TPU kernels do with one chunk of several heads that share q and k; no normaliser.

The algebra of tpu_kernels.py for narrow heads: `pack` of them lie side by side in the lanes of v
[L, pack * P] and of the memory [K, pack * P], as they do in the model. Then q kᵀ, and every product
with a memory, is one for all of them; only the weights between tokens are each head's own.
Gradients of q and k are summed over the heads by adding P first, dq = (sum_j P_j) k, and the sums
over rows that the decays need come from the scores themselves, <q, dq> = sum_s P_ts <q_t, k_s>.
The gain of a token, which would have to be spread over v's lanes, goes into the weights instead.
"""

import jax
import jax.numpy as jnp

from kernels.linear_attention.tpu_kernels import (
    GAIN,
    GAMMA,
    SUBLANES,
    WRITE,
    U,
    W,
    dot,
    start,
    weights,
)

LANES = 128


def _per_tile(parts, lanes: int) -> int:
    """Heads in a tile of 128 lanes."""
    return max(LANES * len(parts) // lanes, 1)


def _spread(parts, lanes: int):
    """One array of all lanes from each head's [., 1], or [., 128] of which its own lanes count."""
    per, width = _per_tile(parts, lanes), lanes // len(parts)
    shape = (parts[0].shape[0], max(width, LANES))
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    tiles = []
    for first in range(0, len(parts), per):
        tile = jnp.broadcast_to(parts[first], shape)
        for j in range(1, per):
            tile = jnp.where(lane >= j * width, parts[first + j], tile)
        tiles.append(tile)
    return jnp.concatenate(tiles, 1)


def _tile(x, j: int, pack: int):
    """The tile of lanes that holds head j."""
    width = max(x.shape[1] // pack, LANES)
    first = j * (x.shape[1] // pack) // width * width
    return x[:, first : first + width]


def _only(x, j: int, pack: int):
    """The tile of head j, 0 outside its lanes."""
    tile, width = _tile(x, j, pack), x.shape[1] // pack
    if width >= LANES:
        return tile
    lane, begin = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 1), j * width % LANES
    inside = (lane >= begin) & (lane < begin + width)
    return jnp.where(inside, tile, jnp.zeros_like(tile))


def _head_sum(x, j: int, pack: int):
    """Sum over a head's lanes."""
    return _only(x, j, pack).sum(1, keepdims=True)


def _columns(rows_ref, pack: int):
    """(rows [8, L], columns [L, 8]) of each head."""
    rows = [rows_ref[j] for j in range(pack)]
    return rows, [x.T for x in rows]


def _of_tokens(columns, index: int, lanes: int):
    return _spread([x[:, index : index + 1] for x in columns], lanes)


def _gamma(rows, lanes: int):
    return _spread([x[GAMMA : GAMMA + 1, 0:1] for x in rows], lanes)


def forward(options, q_ref, k_ref, v_ref, rows_ref, first, h_ref, den_ref, state):
    """h of the chunk and the state after it."""
    start(first, state)
    C_ref, _ = state
    q, k, v, pack = q_ref[...], k_ref[...], v_ref[...], options.pack
    rows, columns = _columns(rows_ref, pack)
    scores = options.scale * dot(q, k, (1, 1))

    def part(j):
        S = scores * weights(options, rows[j], columns[j]) * rows[j][GAIN : GAIN + 1]
        return dot(S.astype(v.dtype), _tile(v, j, pack), (1, 0))

    lanes = v.shape[1]
    w = options.scale * _of_tokens(columns, W, lanes)
    h = w * dot(q, C_ref[...].astype(q.dtype), (1, 0)) + _spread([*map(part, range(pack))], lanes)
    h_ref[...] = h.astype(h_ref.dtype)
    _advance(k, v, rows, columns, C_ref)


def _advance(k, v, rows, columns, C_ref):
    """The state after a chunk."""
    lanes = v.shape[1]
    uv = (_of_tokens(columns, WRITE, lanes) * v.astype(jnp.float32)).astype(v.dtype)
    C_ref[...] = _gamma(rows, lanes) * C_ref[...] + dot(k, uv, (0, 0))


def states(options, k_ref, v_ref, rows_ref, first, before, state):
    """Stores the state before each chunk."""
    start(first, state)
    (C_ref, _), (Cs_ref, _) = state, before
    Cs_ref[...] = C_ref[...].astype(Cs_ref.dtype)
    rows, columns = _columns(rows_ref, options.pack)
    _advance(k_ref[...], v_ref[...], rows, columns, C_ref)


def backward(options, q_ref, k_ref, v_ref, dh_ref, rows_ref, before, last,
             dq_ref, dk_ref, dv_ref, flow_ref, gradient):  # fmt: skip
    """Gradients of the chunk's q, k, v and of the state before it, from those of h and of the
    state after it; `flow` rows of each head as in tpu_kernels.py, and the gradient of the gain."""
    start(last, gradient)
    wide, pack, dC_ref = jnp.float32, options.pack, gradient[0]
    q, k, v, dh = q_ref[...], k_ref[...], v_ref[...], dh_ref[...]
    C, dC, narrow, lanes = before[0][...].astype(v.dtype), dC_ref[...], v.dtype, v.shape[1]
    rows, columns = _columns(rows_ref, pack)
    gamma = _gamma(rows, lanes)
    w, write = options.scale * _of_tokens(columns, W, lanes), _of_tokens(columns, WRITE, lanes)
    wd = w * dh.astype(wide)
    from_state = wd * dot(q, C, (1, 0))
    k_dC = dot(k, dC.astype(narrow), (1, 0))
    from_next = k_dC * v.astype(wide)
    carried = gamma * (C.astype(wide) * dC).sum(0, keepdims=True)
    scores = dot(q, k, (1, 1))
    t, s = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
    lane = jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], SUBLANES), 1)
    total, parts = jnp.zeros_like(scores), []
    for j in range(pack):
        row = lambda index, j=j: rows[j][index : index + 1]  # noqa: E731
        E = options.scale * weights(options, rows[j], columns[j])
        parts.append(dot((scores * E * row(GAIN)).astype(narrow), _tile(dh, j, pack), (0, 0)))
        P = dot(_only(dh, j, pack), _tile(v, j, pack), (1, 1)) * E
        total += P * row(GAIN)
        # What tokens put into their own output cancels in the decays' gradient: it stays out.
        pairs = P * scores
        own = jnp.where(s == t, pairs, 0.0).sum(0, keepdims=True)
        pairs = jnp.where(s == t, 0.0, pairs)
        along_k = pairs.sum(0, keepdims=True)
        along_q = (pairs * row(GAIN)).sum(1, keepdims=True) + _head_sum(from_state, j, pack)
        columns_out = jnp.where(lane == 0, along_q, _head_sum(from_next, j, pack)).T
        along_q, next_ = columns_out[0:1], columns_out[1:2]
        out, kept = along_q - along_k * row(GAIN), _head_sum(carried, j, pack)
        found = (out, row(WRITE) * next_, kept, row(U) * next_ + along_k + own)
        sublane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, q.shape[0]), 0)
        flow = jnp.zeros(sublane.shape, wide)
        for index, values in enumerate(found):
            flow = jnp.where(sublane == index, values, flow)
        flow_ref[j] = flow
    total, wd, dC_narrow = total.astype(narrow), wd.astype(narrow), dC.astype(narrow)
    uv = (write * v.astype(wide)).astype(narrow)
    dq = dot(total, k, (1, 0)) + dot(wd, C, (1, 1))
    dk = dot(total, q, (0, 0)) + dot(uv, dC_narrow, (1, 1))
    dq_ref[...], dk_ref[...] = dq.astype(dq_ref.dtype), dk.astype(dk_ref.dtype)
    dv_ref[...] = (write * k_dC + _spread(parts, lanes)).astype(dv_ref.dtype)
    dC_ref[...] = gamma * dC + dot(q, wd, (0, 0))
