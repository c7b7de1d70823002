"""Key/value cache: arrays [n, B, G, S, K] for n stacked layers, rows right-padded and ragged.

Token p of a row sits in slot p, or in slot p mod S where S = window slots serve a local layer
(a ring). A ring may have `pinned` slots in front that keep the first tokens (Hymba's meta tokens):
token p then sits in slot p, or in slot pinned + (p - pinned) mod (S - pinned) behind them. What a
slot holds follows from the row's newest position alone, so nothing else is kept.
Heads come before slots because that is how a decoding step multiplies them: no transposed copy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.attention import MaskSpec, write_slots
from models.blocks.common import constrain

LANES = 128


class KVCache(NamedTuple):
    """Keys (RoPE applied) and values of n layers that share a place in the layer pattern."""

    k: Float[Array, "n b g s k"]
    v: Float[Array, "n b g s v"]

    @property
    def slots(self) -> int:
        """Tokens that a row can hold."""
        return self.k.shape[3]


def padded(slots: int) -> int:
    """Slots in whole lanes of a TPU where there are many: one slot more than that (1,153) makes its
    compiler multiply element by element, three times slower. A larger ring holds tokens that the
    window hides."""
    return slots if slots < 1024 else -(-slots // LANES) * LANES


def empty(
    layers: int, batch: int, slots: int, heads: int, head_dim: int, dtype, value_dim: int = 0
) -> KVCache:
    """Zeroed cache, sharded like the activations it will hold; value_dim: 0 = head_dim."""

    def zeros(dim):
        made = jnp.zeros((layers, batch, heads, slots, dim), dtype)
        return constrain(made, None, "batch", "act_kv_heads", None, None)

    return KVCache(zeros(head_dim), zeros(value_dim or head_dim))


def read(cache: KVCache, layer) -> tuple[Float[Array, "b s g k"], Float[Array, "b s g v"]]:
    """Keys and values of one layer; layer may be traced."""
    k, v = (jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in cache)
    return jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)


def write_prompt(
    cache: KVCache,
    layer,
    k,
    v,
    lengths: Int[Array, "b"] | None,
    pinned: int = 0,
    first: int = 0,
) -> KVCache:
    """Stores T tokens of right-padded rows; pads may land in slots nobody reads yet.

    first: position of the first of them, 0 or behind what is stored already (the keys of tokens
    that begin every row); lengths count from it. A prompt longer than the ring keeps each row's
    last real tokens, hence needs lengths.
    """
    slots, tokens = cache.slots, k.shape[1]
    if first + tokens > slots:
        if lengths is None:
            raise ValueError(
                f"a prompt of {tokens} tokens into {slots} cache slots needs lengths=[B]"
            )
        if first > pinned:
            raise ValueError(
                f"a prompt from position {first} on would overwrite the ring behind {pinned} slots"
            )
        held = _held(slots, first + lengths[:, None] - 1, pinned)[:, first:]
        source = jnp.maximum(held - first, 0)[..., None, None]
        k, v = (jnp.take_along_axis(x, source, axis=1) for x in (k, v))
    start = (layer, 0, 0, first, 0)
    return _once(
        jax.lax.dynamic_update_slice(old, jnp.swapaxes(new, 1, 2).astype(old.dtype)[None], start)
        for old, new in zip(cache, (k, v))
    )


def _once(written) -> KVCache:
    """Keys and values that XLA writes in place, and does not write again, into a copy of the whole
    cache, for the product that reads them."""
    return KVCache(*jax.lax.optimization_barrier(tuple(written)))


def _held(slots: int, newest: Int[Array, "b 1"], pinned: int) -> Int[Array, "b s"]:
    """Position that each slot of a ring holds; below `pinned` in the others: nothing yet."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    held = newest - (newest - slot) % (slots - pinned)
    return jnp.where(slot < pinned, slot, held) if pinned else held


def write_tokens(
    cache: KVCache, layer, k, v, positions: Int[Array, "b t"], ring: bool, pinned: int = 0
) -> KVCache:
    """Stores T tokens of each row at that row's own positions, in place inside a scan's carry.

    A position past the end of a full cache is dropped.
    """
    slots = positions
    if ring:
        turned = pinned + (positions - pinned) % (cache.slots - pinned)
        slots = jnp.where(positions < pinned, positions, turned) if pinned else turned
    return _once(write_slots(old, layer, new, slots) for old, new in zip(cache, (k, v)))


def mask_after_write(
    slots: int, positions: Int[Array, "b t"], ring: bool, pinned: int = 0
) -> MaskSpec:
    """Keys at positions <= the query's; a ring slot s holds newest - (newest - s) mod S."""
    if not ring:
        return MaskSpec(q_positions=positions, always_visible=pinned)
    held = _held(slots, positions[:, -1:], pinned)
    valid = held >= pinned
    if pinned:
        valid |= jnp.arange(slots) < pinned
    return MaskSpec(q_positions=positions, kv_positions=held, kv_valid=valid, always_visible=pinned)
