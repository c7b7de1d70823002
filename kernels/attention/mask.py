"""Attention masks as descriptions: a few small arrays, never a stored [B, T, S] tensor."""

import dataclasses

import jax
import jax.numpy as jnp
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

    prefix_length is [B], or [B, T] where each query has a prefix of its own. Positions default to
    0..T-1 for queries and 0..S-1 for keys.
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

    def with_window(self, window: int | None) -> "MaskSpec":
        """The same mask limited to the last `window` positions (the query itself counts)."""
        return dataclasses.replace(self, window=window)

    def dense(self, queries: int, keys: int) -> Bool[Array, "#b t s"]:
        """Boolean [B or 1, T, S], True where the key is visible; jit fuses it into the softmax."""
        q = _positions(self.q_positions, queries)[..., :, None]
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
        if self.kv_valid is not None:
            terms.append(self.kv_valid[..., None, :])
        mask = jnp.ones((1, queries, keys), bool)
        for term in terms:
            mask &= term
        return mask

    def rows(self, start, size: int, queries: int) -> "MaskSpec":
        """The mask of the queries start..start+size-1 alone; start may be traced."""

        def cut(x):
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1)

        prefix = self.prefix_length
        if prefix is not None and prefix.ndim == 2:
            prefix = cut(prefix)
        kv = dict(
            kv_segment_ids=_default(self.kv_segment_ids, self.q_segment_ids),
            kv_scale_ids=_default(self.kv_scale_ids, self.q_scale_ids),
        )
        return dataclasses.replace(
            self,
            prefix_length=prefix,
            q_positions=cut(_positions(self.q_positions, queries)),
            q_segment_ids=cut(self.q_segment_ids),
            q_scale_ids=cut(self.q_scale_ids),
            **kv,
        )


def _positions(given, length):
    return jnp.arange(length, dtype=jnp.int32)[None] if given is None else given


def _default(value, fallback):
    return fallback if value is None else value
