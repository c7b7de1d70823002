"""Infinity's transformer (arXiv 2412.04431): the bits of a picture, scale after scale.

A scale's tokens are predicted all at once from the scales before: the input of scale k + 1 is the
sum of the codes so far, resized to its grid, that of the first scale a vector pooled from the text.
Every token sees its own scale and the earlier ones, and the text by cross-attention. A token is d
bits, each predicted on its own (kernels/bitwise), or, as in VAR (arXiv 2404.02905), to compare, one
of 2^d codes. Mathematics: FoundationVision/Infinity.

This file: sizes, positions, modules. Training and the model seam: models/infinity_build.py.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels.attention import MaskSpec, attention
from models.blocks import kv_cache
from models.blocks.common import Linear, constrain, remat_block, scan_layers
from models.blocks.norms import LayerNorm, RMSNorm, layer_norm
from models.infinity_scales import Rope2d, apply_rope2d, rope2d
from models.tokenizers.quantisers.schedules import Schedule, tokens

LEVELS = 15  # rows of the table that tells the scales apart
MODULATION = ("gamma1", "gamma2", "scale1", "scale2", "shift1", "shift2")
MOST_INDEXED = 18  # bits of a token whose code has a row of a table
LARGEST_SCALE = math.log(100.0)  # of cosine attention's logits


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of one transformer; bits of a token, width and most tokens of the text before it."""

    width: int
    depth: int
    heads: int
    bits: int = 32
    text_width: int = 2048
    text_length: int = 512
    drop_path: float = 0.1  # of the last block; grows linearly from 0
    chunks: int = 4  # groups that the blocks are published in; 1: in none
    head: str = "bits"  # bits, or index: a score for each of the 2^bits codes
    cross: bool = True  # blocks attend to the text; False: its pooled vector is all they know

    def __post_init__(self):
        if self.width % self.heads or self.head_dim % 4:
            raise ValueError(
                f"width={self.width} over heads={self.heads} must be a multiple of 4: rotary "
                "embedding turns pairs for rows and pairs for columns"
            )
        if self.depth % self.chunks:
            raise ValueError(f"depth={self.depth} must be a multiple of chunks={self.chunks}")
        if self.head not in ("bits", "index"):
            raise ValueError(f"head={self.head!r}: allowed are bits, index")
        if self.head == "index" and self.bits > MOST_INDEXED:
            raise ValueError(
                f"head='index' scores all 2^{self.bits} codes; at most {MOST_INDEXED} bits"
            )
        if self.width % self.pool_heads:
            raise ValueError(f"width={self.width} must be a multiple of {self.pool_heads}")

    @property
    def head_dim(self) -> int:
        """Numbers of one head."""
        return self.width // self.heads

    @property
    def mlp(self) -> int:
        """Hidden width: 4 C in whole 256s, halves to even as Python rounds."""
        return max(round(4 * self.width / 256), 1) * 256

    @property
    def pool_heads(self) -> int:
        """Heads of the pooling of the text: 128 numbers of the text each, 64 for wide models."""
        return max(1, self.text_width // (64 if self.width > 4096 else 128))

    @property
    def std(self) -> float:
        """Of every matrix and table at the start."""
        return math.sqrt(1 / (3 * self.width))


SIZES = {
    "layer12": TransformerConfig(768, 12, 8),
    "layer16": TransformerConfig(1152, 16, 12),
    "layer24": TransformerConfig(1536, 24, 16),
    "2b": TransformerConfig(2048, 32, 16, chunks=8),
    "layer32": TransformerConfig(2080, 32, 20),
    "layer40": TransformerConfig(2688, 40, 24),
    "layer48": TransformerConfig(3360, 48, 28),
    "8b": TransformerConfig(3584, 40, 28, bits=56, chunks=8),  # 14 bits of 2 x 2 latents
    "20b": TransformerConfig(4608, 58, 36, drop_path=0.25, chunks=1),
    # For CPUs; the bits and the text's width come with the tokenizer and the encoder.
    "small": TransformerConfig(160, 5, 4, bits=16, text_length=32, drop_path=0.0, chunks=1),
    "debug": TransformerConfig(64, 2, 2, bits=16, text_length=32, drop_path=0.0, chunks=1),
}


# ---------------------------------------------------------------- functions


def unit(x: Float[Array, "*n k"]) -> Float[Array, "*n k"]:
    """x over its norm (at least 1e-12), in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def modulated(x, scale: Float[Array, "b c"], shift: Float[Array, "b c"]) -> Float[Array, "b l c"]:
    """LayerNorm without affine, times 1 + scale, plus shift."""
    return layer_norm(x) * (1.0 + scale[:, None]) + shift[:, None]


# ---------------------------------------------------------------- modules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """What the text gives: start and modulation of each row, and what blocks attend to, if they
    do."""

    pooled: Float[Array, "b c"]
    modulation: Float[Array, "b six c"]
    memory: Float[Array, "b p c"] | None
    valid: Bool[Array, "b p"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """What every block of a call reads.

    begin: tokens that the cache holds before these. mix_at: block behind which, while sampling, the
    first half of the rows (with the text) and the second (without) become guidance * first +
    (1 - guidance) * second; -1: none.
    """

    condition: Condition
    rope: Rope2d
    mask: MaskSpec | None
    guidance: Float[Array, ""] | float = 1.0
    begin: int = dataclasses.field(default=0, metadata=dict(static=True))
    mix_at: int = dataclasses.field(default=-1, metadata=dict(static=True))


class PerLayer(NamedTuple):
    """What differs between blocks: number, what drop path multiplies each row's two branches with,
    and keys and values of the text where they have been computed before."""

    index: Int[Array, ""]
    keep: Float[Array, "2 b"] | None = None
    text: tuple[Float[Array, "b p h k"], Float[Array, "b p h k"]] | None = None


def _table(init, shape, *names):
    return nn.with_logical_partitioning(init, names), shape, jnp.float32


class _Projections(nn.Module):
    """What both attentions of a block and the pooling share: heads in, heads out."""

    cfg: TransformerConfig
    dtype: Any = jnp.float32

    def into(self, name, x, bias, heads=0):
        """x in heads."""
        cfg = self.cfg
        heads = heads or cfg.heads
        shape, axes = (heads, cfg.width // heads), ("embed", "heads", "head_dim")
        init = nn.initializers.normal(cfg.std)
        return Linear(shape, axes, self.dtype, 1, bias, init, name=name)(x)

    def out(self, x, std):
        """Heads back in one vector."""
        axes, init = ("heads", "head_dim", "embed"), nn.initializers.normal(std)
        return Linear((self.cfg.width,), axes, self.dtype, 2, True, init, name="o")(x)

    @property
    def small(self) -> float:
        """Standard deviation of what is added to the residual stream."""
        return self.cfg.std / math.sqrt(2 * self.cfg.depth)


class SelfAttention(_Projections):
    """Cosine attention with a scale per head, then RoPE; cached keys are normalised and turned."""

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"], shared: Shared, cache, layer):
        q, k, v = self.into("q", x, True), self.into("k", x, False), self.into("v", x, True)
        start = nn.with_logical_partitioning(nn.initializers.constant(math.log(4.0)), ("heads",))
        scale = self.param("scale", start, (self.cfg.heads,), jnp.float32)
        q = unit(q) * jnp.exp(jnp.minimum(scale, LARGEST_SCALE))[:, None]
        q, k = (apply_rope2d(t, shared.rope).astype(v.dtype) for t in (q, unit(k)))
        if cache is not None:
            cache = kv_cache.write_prompt(cache, layer, k, v, None, first=shared.begin)
            end = shared.begin + k.shape[1]
            size = (1, *cache.k.shape[1:3], end, cache.k.shape[4])
            at = (layer, 0, 0, 0, 0)
            k, v = (jnp.swapaxes(jax.lax.dynamic_slice(t, at, size)[0], 1, 2) for t in cache)
        q = constrain(q, "batch", "length", "act_heads", None)
        out = attention(q, k.astype(q.dtype), v.astype(q.dtype), shared.mask, scale=1.0)
        return self.out(out, self.small), cache


class CrossAttention(_Projections):
    """Attention to the text; its keys and values are one linear layer without norm or position."""

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"], condition: Condition, text=None):
        q = self.into("q", x, True)
        memory = condition.memory
        k, v = text or (self.into("k", memory, False), self.into("v", memory, True))
        out = attention(q, k, v, MaskSpec(causal=False, kv_valid=condition.valid))
        return self.out(out, self.small)


class TextPool(_Projections):
    """One learned query attends to the text: [b, p, text_width] -> [b, width]."""

    @nn.compact
    def __call__(self, text: Float[Array, "b p t"], valid: Bool[Array, "b p"]):
        cfg, heads = self.cfg, self.cfg.pool_heads
        shape = (heads, cfg.width // heads)
        query = self.param(
            "query", *_table(nn.initializers.normal(cfg.std), shape, None, "head_dim")
        )
        q = jnp.broadcast_to(query, (text.shape[0], 1, *shape)).astype(self.dtype)
        k, v = self.into("k", text, False, heads), self.into("v", text, True, heads)
        out = attention(q, k, v, MaskSpec(causal=False, kv_valid=valid))
        return self.out(out, cfg.std)[:, 0]


class Mlp(nn.Module):
    """W2 gelu(W1 x + b1) + b2, the tanh approximation."""

    cfg: TransformerConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l c"]:
        cfg = self.cfg
        wide, small = (nn.initializers.normal(cfg.std / s) for s in (1, math.sqrt(2 * cfg.depth)))
        into = Linear((cfg.mlp,), ("embed", "mlp"), self.dtype, 1, True, wide, name="in")
        x = constrain(nn.gelu(into(x), approximate=True), "batch", "length", "act_mlp")
        return Linear((cfg.width,), ("mlp", "embed"), self.dtype, 1, True, small, name="out")(x)


def modulation_init(key, shape, dtype):
    """N(0, 1/C), the gates times 5e-6 and the rest times 1e-3."""
    rows = jnp.array([5e-6 if name.startswith("gamma") else 1e-3 for name in MODULATION], dtype)
    return jax.random.normal(key, shape, dtype) / math.sqrt(shape[-1]) * rows[:, None]


class Block(nn.Module):
    """Gated self-attention, attention to the text, gated MLP; the residual stream is float32.

    Shaped as the body of a scan over layers; the cache rides in the carry.
    """

    cfg: TransformerConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, carry, layer: PerLayer, shared: Shared):
        (x, cache), cfg = carry, self.cfg
        own = self.param("modulation", *_table(modulation_init, (6, cfg.width), None, "embed"))
        m = dict(zip(MODULATION, jnp.moveaxis(shared.condition.modulation + own, 1, 0)))

        def kept(branch, y):
            y = y.astype(jnp.float32)
            return y if layer.keep is None else layer.keep[branch][:, None, None] * y

        y = modulated(x, m["scale1"], m["shift1"])
        y, cache = SelfAttention(cfg, self.dtype, name="sa")(y, shared, cache, layer.index)
        x = x + kept(0, y * m["gamma1"][:, None])
        if cfg.cross:
            y = LayerNorm(name="ca_norm")(x)
            attend = CrossAttention(cfg, self.dtype, name="ca")
            x = x + attend(y, shared.condition, layer.text).astype(jnp.float32)
        y = modulated(x, m["scale2"], m["shift2"])
        x = x + kept(1, Mlp(cfg, self.dtype, name="mlp")(y) * m["gamma2"][:, None])
        if shared.mix_at >= 0:
            with_text, without = jnp.split(x, 2)
            both = shared.guidance * with_text + (1.0 - shared.guidance) * without
            x = jnp.where(layer.index == shared.mix_at, jnp.concatenate([both, both]), x)
        return (constrain(x, "batch", "length", "act_embed"), cache), None


class Head(NamedTuple):
    """What turns hidden states into log odds: w and b are column "1" minus column "0" of each bit,
    scale and shift one of each per row."""

    w: Float[Array, "c d"]
    b: Float[Array, "d"]
    scale: Float[Array, "b c"]
    shift: Float[Array, "b c"]


class IndexHead(NamedTuple):
    """What turns hidden states into scores of all codes: a row of the table each, no bias; bit i of
    a row's number is bit i of its code. scale and shift as in Head."""

    table: Float[Array, "v c"]
    scale: Float[Array, "b c"]
    shift: Float[Array, "b c"]


def unconditional_init(key, shape, dtype):
    """N(0, 1.2^2 / width), cut at +-2 / sqrt(width)."""
    drawn = jax.random.truncated_normal(key, -2 / 1.2, 2 / 1.2, shape, dtype)
    return 1.2 / math.sqrt(shape[-1]) * drawn


class Infinity(nn.Module):
    """The trainable transformer, as methods; text and bits come from outside."""

    cfg: TransformerConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self):
        cfg = self.cfg
        init, dim = nn.initializers.normal(cfg.std), cfg.width
        shape = (cfg.text_length, cfg.text_width)
        self.uncond = self.param("uncond", *_table(unconditional_init, shape, "positions", "embed"))
        self.text_norm = RMSNorm(offset=0.0)
        self.text_pool = TextPool(cfg)
        dense = lambda out, axes, dtype=jnp.float32: Linear(out, axes, dtype, 1, True, init)  # noqa: E731
        if cfg.cross:
            self.text_in = dense((dim,), ("embed", "mlp"))
            self.text_out = dense((dim,), ("mlp", "embed"))
        self.modulation = dense((6, dim), ("embed", None, "width_out"))
        self.pos_start = self.param("pos_start", *_table(init, (dim,), "norm"))
        self.level = self.param("level", *_table(init, (LEVELS, dim), "positions", "embed"))
        self.word = dense((dim,), ("width_in", "embed"), self.dtype)
        small = nn.initializers.normal(cfg.std * 1e-3)
        axes = ("embed", None, "width_out")
        self.head_modulation = Linear((2, dim), axes, jnp.float32, 1, True, small)
        small = nn.initializers.normal(cfg.std * 0.02)
        if cfg.head == "index":
            table = _table(small, (2**cfg.bits, dim), "vocab", "embed")
            self.head_table = self.param("head_table", *table)
            return
        kernel = _table(small, (dim, cfg.bits, 2), "embed", None, None)
        self.head_kernel = self.param("head_kernel", *kernel)
        bias = _table(nn.initializers.zeros_init(), (cfg.bits, 2), "norm", None)
        self.head_bias = self.param("head_bias", *bias)

    def condition(
        self, text: Float[Array, "b p t"], valid: Bool[Array, "b p"], drop: Bool[Array, "b"] | None
    ) -> Condition:
        """Text of an encoder -> what the blocks take; rows where `drop` is set get the learned
        table instead, as long as their own text. All in float32."""
        text = text.astype(jnp.float32)
        if drop is not None:
            text = jnp.where(drop[:, None, None], self.uncond[: text.shape[1]], text)
        text = self.text_norm(text)
        pooled = self.text_pool(text, valid)
        memory = None
        if self.cfg.cross:
            hidden = nn.gelu(self.text_in(text), approximate=True)
            memory = self.text_out(constrain(hidden, "batch", None, "act_mlp"))
            memory = constrain(memory.astype(self.dtype), "batch", None, "act_embed")
        return Condition(
            constrain(pooled, "batch", "act_embed"),
            constrain(self.modulation(nn.silu(pooled)), "batch", None, "act_embed"),
            memory,
            valid,
        )

    def start(self, condition: Condition) -> Float[Array, "b 1 c"]:
        """The first scale's input."""
        return (condition.pooled + self.pos_start)[:, None]

    def embed(self, codes: Float[Array, "b m d"]) -> Float[Array, "b m c"]:
        """Inputs of the later scales."""
        return self.word(codes).astype(jnp.float32)

    def trunk(self, x, ids, layer: PerLayer, shared: Shared, cache=None):
        """Inputs [b, l, c] of the scales `ids` [l] -> (hidden states, float32, cache)."""
        x = constrain(x + self.level[ids], "batch", "length", "act_embed")
        return self._stack((x, cache), layer, shared)

    @nn.compact
    def _stack(self, carry, layer, shared):
        """The scanned blocks; sampling gains nothing from writing a short stack out."""
        cfg, block = self.cfg, remat_block(Block, self.remat, looped=self.cfg.depth > 1)
        unroll = carry[1] is None and self.remat == "none"
        scan = scan_layers(block, cfg.depth, (0, nn.broadcast), unroll=unroll)
        return scan(cfg, self.dtype, name="layers")(carry, layer, shared)[0]

    def head(self, condition: Condition) -> Head | IndexHead:
        """The two columns of each bit as their difference, and the rows' modulation."""
        scale, shift = jnp.moveaxis(self.head_modulation(nn.silu(condition.pooled)), 1, 0)
        if self.cfg.head == "index":
            return IndexHead(self.head_table, scale, shift)
        w = self.head_kernel[..., 1] - self.head_kernel[..., 0]
        return Head(w, self.head_bias[..., 1] - self.head_bias[..., 0], scale, shift)

    def __call__(self, text):
        """Touches every parameter once; used for initialisation only."""
        condition = self.condition(text, jnp.ones(text.shape[:2], bool), None)
        shared = Shared(condition, rope2d(((1, 1),), self.cfg.head_dim), None)
        x = self.start(condition) + self.embed(jnp.zeros((text.shape[0], 1, self.cfg.bits)))
        index = PerLayer(jnp.arange(self.cfg.depth))
        return self.trunk(x, np.zeros(1, np.int32), index, shared)[0], self.head(condition)


def init(rng: Array, cfg: TransformerConfig):
    """Boxed parameters of the transformer."""
    return Infinity(cfg).init(rng, jnp.zeros((1, 1, cfg.text_width)))["params"]


def drop_path(cfg: TransformerConfig, keys: Array) -> Float[Array, "depth 2 b"] | None:
    """What each row's branches are multiplied with: 0, or 1 over the share of branches kept."""
    if not cfg.drop_path:
        return None
    keep = 1.0 - jnp.linspace(0.0, cfg.drop_path, cfg.depth)[:, None]
    coins = jax.vmap(lambda key: jax.random.uniform(key, (cfg.depth, 2)))(keys)
    return jnp.moveaxis((coins < keep) / keep, 0, -1)


def text_cache(params, cfg: TransformerConfig, condition: Condition):
    """Keys and values [depth, b, p, h, k] of the text in every block, for sampling: computed once
    for all scales; None where blocks do not attend to it."""
    if not cfg.cross:
        return None
    attend = params["layers"]["ca"]
    out = []
    for name in ("k", "v"):
        kernel = attend[name]["kernel"].astype(condition.memory.dtype)
        x = jnp.einsum("bpc,nchk->nbphk", condition.memory, kernel)
        bias = attend[name].get("bias")
        out.append(x if bias is None else x + bias[:, None, None].astype(x.dtype))
    return tuple(out)


def init_cache(cfg: TransformerConfig, rows: int, schedule: Schedule, dtype) -> kv_cache.KVCache:
    """Empty keys and values of all scales."""
    return kv_cache.empty(cfg.depth, rows, tokens(schedule), cfg.heads, cfg.head_dim, dtype)
