"""Multi-head attention with grouped keys: Gemma's (RoPE, cache, soft-cap) and ViT's (biases)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.attention import MaskSpec, attention, shares_rows
from models.blocks import kv_cache
from models.blocks.common import Linear, constrain
from models.blocks.norms import RMSNorm
from models.blocks.rope import RopeTable, apply_rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheUse:
    """How one call uses the cache: store a prompt (step=False) or continue at positions."""

    positions: Int[Array, "b t"]
    lengths: Int[Array, "b"] | None
    step: bool = dataclasses.field(metadata=dict(static=True))


class Attention(nn.Module):
    """softmax(softcap(q kᵀ scale) + mask) v projected back to the input's width."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: Any = jnp.float32
    scale: float | None = None  # None: head_dim^-1/2
    softcap: float | None = None
    window: int | None = None  # of a local layer; its cache is a ring
    qk_norm: str = ""  # head: RMSNorm of each head (Gemma 3); all: of the joined heads (OLMo 2)
    norm_eps: float = 1e-6
    norm_offset: float = 1.0
    bias: bool = False  # of all projections
    qkv_bias: bool = False  # of those of q, k and v (Qwen 2)
    kernel_init: Callable | None = None
    impl: str = "auto"

    def _project(self, name, heads, axis, x):
        shape, axes = (heads, self.head_dim), ("embed", axis, "head_dim")
        bias = self.bias or self.qkv_bias
        return Linear(shape, axes, self.dtype, 1, bias, self.kernel_init, name=name)(x)

    def _norm(self, name, x):
        joined = x.reshape(*x.shape[:2], -1) if self.qk_norm == "all" else x
        norm = RMSNorm(self.norm_eps, offset=self.norm_offset, name=name)
        return norm(joined).reshape(x.shape)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: MaskSpec | None,
        rope: tuple[RopeTable, RopeTable] | None = None,  # of the queries, of the keys
        *,
        keys_from: Float[Array, "b s d"] | None = None,
        cache: kv_cache.KVCache | None = None,
        layer: Any = None,
        use: CacheUse | None = None,
    ) -> tuple[Float[Array, "b t d"], kv_cache.KVCache | None]:
        source = x if keys_from is None else keys_from
        q = self._project("q", self.heads, "heads", x)
        k = self._project("k", self.kv_heads, "kv_heads", source)
        v = self._project("v", self.kv_heads, "kv_heads", source)
        if self.qk_norm:
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        if rope is not None:
            q, k = apply_rope(q, rope[0]), apply_rope(k, rope[1])
        if cache is not None:
            k, v, mask, cache = self._through_cache(k, v, mask, cache, layer, use)
        if mask is not None and self.window is not None:
            mask = mask.with_window(self.window)
        q = constrain(q, "batch", "length", "act_heads", None)
        # Devices that share a row exchange the keys that the mask can reach, not all of them.
        tokens = "length" if shares_rows(q.shape[1], k.shape[1]) else None
        k = constrain(k, "batch", tokens, "act_kv_heads", None)
        v = constrain(v, "batch", tokens, "act_kv_heads", None)
        out = attention(q, k, v, mask, scale=self.scale, softcap=self.softcap, impl=self.impl)
        axes = ("heads", "head_dim", "embed")
        project = Linear((x.shape[-1],), axes, self.dtype, 2, self.bias, self.kernel_init, name="o")
        return project(out), cache

    def _through_cache(self, k, v, mask, cache, layer, use):
        """Stores k, v; a prompt attends to itself, a step to everything stored up to it."""
        ring = self.window is not None
        if not use.step:
            return k, v, mask, kv_cache.write_prompt(cache, layer, k, v, use.lengths)
        slots = cache.slots
        if ring and k.shape[1] > 1 and slots == self.window:
            raise ValueError(
                f"{k.shape[1]} tokens in one step would overwrite a ring of {slots} slots; feed one"
            )
        cache = kv_cache.write_tokens(cache, layer, k, v, use.positions, ring)
        k, v = (x.astype(self.dtype) for x in kv_cache.read(cache, layer))
        return k, v, kv_cache.mask_after_write(slots, use.positions, ring), cache
