"""Attention masks as descriptions: a few small arrays, never a stored [B, T, S] tensor."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

# Finite: a row without any visible key then gives a uniform average instead of NaN.
MASKED = -2.3819763e38


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """Which key a query may see: the AND of every condition that is set.

    causal:          key position <= query position, or key position < prefix_length.
    window:          query position - key position < window, or key position < always_visible.
    segment ids:     equal, or the key's is negative: shared by all segments of its row (packed
                     sequences; positions may count from the row's or from each segment's start).
    kv_valid:        False hides a key.
    scale ids:       key's <= query's. cumsum(mask_ar) as scale ids with causal=False is the
                     rule of building_blocks 1.3. kv_scale_ids defaults to q_scale_ids.
    scales:          key position < the end of the query's scale; (1, 4, 16) are the tokens of three
                     scales in order. With causal=False the rule of next-scale prediction (VAR,
                     Infinity). Behind the last scale is padding, which no query sees. Decoding one
                     scale against the keys up to its end is the same mask with query_offset.

    prefix_length is [B], or [B, T] where each query has a prefix of its own. Positions default to
    query_offset + 0..T-1 for queries and 0..S-1 for keys. contiguous promises that the tokens of
    a segment stand side by side, that only the first always_visible keys are shared, and that the
    queries are the last keys: what a TPU kernel can be told. A query that sees no key gets an
    average of some values, finite.

    Who can do what (impl="auto" leaves the rest to xla, which takes everything):

    |                                 | xla: blocks skipped     | tpu: splash  | gpu: cuDNN        |
    | causal                          | above the diagonal      | yes, skipped | yes               |
    | window, always_visible          | outside of either       | yes, skipped | causal, without   |
    |                                 |                         |              | always_visible    |
    | prefix_length                   | left of a window        | yes          | no                |
    | segment ids, shared keys too    | none                    | contiguous   | no                |
    | kv_valid                        | none                    | yes          | no                |
    | scales                          | of later scales         | yes, skipped | alone, a call per |
    |                                 |                         |              | scale of 512      |
    | positions as arrays             | none                    | queries'     | no                |
    | scale ids                       | none                    | no           | no                |
    """

    prefix_length: Int[Array, "b"] | Int[Array, "b t"] | None = None
    q_segment_ids: Int[Array, "b t"] | None = None
    kv_segment_ids: Int[Array, "b s"] | None = None
    q_positions: Int[Array, "b t"] | None = None
    kv_positions: Int[Array, "b s"] | None = None
    kv_valid: Bool[Array, "b s"] | None = None
    q_scale_ids: Int[Array, "b t"] | None = None
    kv_scale_ids: Int[Array, "b s"] | None = None
    causal: bool = dataclasses.field(default=True, metadata=dict(static=True))
    window: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    always_visible: int = dataclasses.field(default=0, metadata=dict(static=True))
    query_offset: int = dataclasses.field(default=0, metadata=dict(static=True))
    contiguous: bool = dataclasses.field(default=False, metadata=dict(static=True))
    scales: tuple[int, ...] = dataclasses.field(default=(), metadata=dict(static=True))

    def with_window(self, window: int | None) -> "MaskSpec":
        """The same mask limited to the last `window` positions (the query itself counts)."""
        return dataclasses.replace(self, window=window)

    def dense(self, queries: int, keys: int) -> Bool[Array, "#b t s"]:
        """Boolean [B or 1, T, S], True where the key is visible; jit fuses it into the softmax."""
        q = _positions(self.q_positions, queries, self.query_offset)[..., :, None]
        k = _positions(self.kv_positions, keys)[..., None, :]
        terms = []
        if self.causal:
            visible = k <= q
            if self.prefix_length is not None:
                prefix = self.prefix_length
                visible |= k < (prefix[:, None, None] if prefix.ndim == 1 else prefix[..., None])
            terms.append(visible)
        if self.window is not None:
            visible = q - k < self.window
            terms.append(visible | (k < self.always_visible) if self.always_visible else visible)
        if self.q_segment_ids is not None:
            kv = self.q_segment_ids if self.kv_segment_ids is None else self.kv_segment_ids
            kv = kv[..., None, :]
            terms.append((self.q_segment_ids[..., :, None] == kv) | (kv < 0))
        if self.q_scale_ids is not None:
            kv = self.q_scale_ids if self.kv_scale_ids is None else self.kv_scale_ids
            terms.append(kv[..., None, :] <= self.q_scale_ids[..., :, None])
        if self.scales:
            terms.append(k < self.scale_end(q))
        if self.kv_valid is not None:
            terms.append(self.kv_valid[..., None, :])
        mask = jnp.ones((1, queries, keys), bool)
        for term in terms:
            mask &= term
        return mask

    def scale_end(self, position: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """Where the scale of each position ends; behind the last one, where that ends."""
        ends = np.cumsum(self.scales).tolist()
        steps = zip(ends, ends[1:])
        return ends[0] + sum((position >= end) * (after - end) for end, after in steps)

    def block(self, rows: tuple, columns: tuple) -> "MaskSpec":
        """The mask of some queries and keys alone: each (start, size), where start may be traced.

        Segment and scale ids of the keys must have been told apart from the queries' (`padded`).
        """

        def cut(x, start, size):
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1)

        prefix = self.prefix_length
        if getattr(prefix, "ndim", 0) == 2:
            prefix = cut(prefix, *rows)
        q_positions, kv_positions = cut(self.q_positions, *rows), cut(self.kv_positions, *columns)
        if q_positions is None:
            q_positions = _positions(None, rows[1], self.query_offset + rows[0])
        if kv_positions is None:
            kv_positions = _positions(None, columns[1], columns[0])
        return dataclasses.replace(
            self,
            prefix_length=prefix,
            q_positions=q_positions,
            kv_positions=kv_positions,
            q_segment_ids=cut(self.q_segment_ids, *rows),
            kv_segment_ids=cut(self.kv_segment_ids, *columns),
            q_scale_ids=cut(self.q_scale_ids, *rows),
            kv_scale_ids=cut(self.kv_scale_ids, *columns),
            kv_valid=cut(self.kv_valid, *columns),
        )

    def padded(self, queries: int, keys: int) -> "MaskSpec":
        """The same mask with arrays of these lengths; what is added means nothing."""

        def pad(x, size):
            return None if x is None else jnp.pad(x, ((0, 0), (0, size - x.shape[-1])))

        prefix = self.prefix_length
        return dataclasses.replace(
            self,
            prefix_length=pad(prefix, queries) if getattr(prefix, "ndim", 0) == 2 else prefix,
            q_positions=pad(self.q_positions, queries),
            kv_positions=pad(self.kv_positions, keys),
            q_segment_ids=pad(self.q_segment_ids, queries),
            kv_segment_ids=pad(_default(self.kv_segment_ids, self.q_segment_ids), keys),
            q_scale_ids=pad(self.q_scale_ids, queries),
            kv_scale_ids=pad(_default(self.kv_scale_ids, self.q_scale_ids), keys),
            kv_valid=pad(self.kv_valid, keys),
        )

    def reach(self, queries: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
        """(first, last) [T]: no query sees a key outside first..last, always_visible ones aside.

        Known while tracing, so only of positions that are not arrays.
        """
        first, last = np.zeros(queries, np.int64), np.full(queries, keys - 1)
        if self.q_positions is None and self.kv_positions is None:
            position = self.query_offset + np.arange(queries)
            if self.causal and self.prefix_length is None:
                last = np.minimum(position, last)
            if self.scales:
                last = np.minimum(self.scale_end(position) - 1, last)
            if self.window is not None:
                first = np.maximum(position - self.window + 1, first)
        return first, last

    def blocks(self, queries: int, keys: int, rows: int, columns: int) -> np.ndarray:
        """[n, 2]: (block of `rows` queries, block of `columns` keys) that the mask can reach."""
        first, last = self.reach(queries, keys)
        starts = np.arange(0, queries, rows)
        # Both ends grow with the query.
        low, high = first[starts], last[np.minimum(starts + rows, queries) - 1]
        key = np.arange(0, keys, columns)
        pinned = key < (self.always_visible if self.window is not None else 0)
        seen = (np.minimum(key + columns, keys) > low[:, None]) | pinned
        seen &= key <= high[:, None]
        seen[:, 0] |= ~seen.any(1)  # a uniform average, as in `dense`, of something
        return np.argwhere(seen)


def _positions(given, length, start=0):
    return start + jnp.arange(length, dtype=jnp.int32)[None] if given is None else given


def _default(value, fallback):
    return fallback if value is None else value
