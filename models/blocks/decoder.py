"""Transformer decoders: one config, one scanned layer stack.

Differences between families are fields. Gemma 1, 2, 3 (building_blocks.md section 1; the defaults):
post-norms and soft-caps (2), q/k norms and a second RoPE base (3), the pattern of local and global
layers (2: alternating, 3: five to one). Llama 2, 3, Qwen 2, OLMo 2: models/llama.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.attention import MaskSpec
from models.blocks import kv_cache
from models.blocks.attention import Attention, CacheUse
from models.blocks.common import (
    Linear,
    constrain,
    over_layers,
    remat_block,
    scan_layers,
    state_of_layers,
)
from models.blocks.norms import RMSNorm
from models.blocks.rope import RopeBands, RopeTable, rope_table

ACTIVATIONS = {"gelu_tanh": functools.partial(nn.gelu, approximate=True), "silu": nn.silu}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; Gemma's published ones are in SIZES."""

    vocab_size: int
    width: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    pattern: tuple[str, ...] = ("local", "global")
    window: int = 4096  # of local layers, the query itself counts; 0 makes every layer see all
    attn_softcap: float | None = None
    final_softcap: float | None = None
    query_scale: float | None = None  # None: head_dim^-1/2
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: str = ""  # head | all (models/blocks/attention.py)
    qkv_bias: bool = False
    activation: str = "gelu_tanh"  # gelu_tanh | silu
    rope_theta: float = 10_000.0
    rope_theta_global: float | None = None  # None: rope_theta
    rope_scale_global: float = 1.0
    rope_bands: RopeBands | None = None  # Llama 3.1's longer contexts
    norm_eps: float = 1e-6
    norm_offset: float = 1.0  # Gemma's norms multiply by 1 + w; 0: by w
    init_std: float | None = None  # of every matrix; None: fan-in, and D^-1/2 for the embedding
    embed_scale: bool = True
    tie: bool = True

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}, allowed: {', '.join(ACTIVATIONS)}")
        if self.qk_norm not in ("", "head", "all"):
            raise ValueError(f"qk_norm={self.qk_norm!r}, allowed: '', head, all")
        if not self.pattern or set(self.pattern) - {"local", "global"}:
            raise ValueError(f"pattern={self.pattern}, allowed: a tuple of 'local' and 'global'")

    @property
    def repeats(self) -> int:
        """Whole patterns in the stack; the scan runs over them."""
        return self.layers // len(self.pattern)

    @property
    def tail(self) -> tuple[str, ...]:
        """Kinds of the layers left over behind the last whole pattern."""
        return self.pattern[: self.layers % len(self.pattern)]

    @property
    def kernel_init(self) -> Callable | None:
        """Initialiser of every matrix, None for Linear's own."""
        return nn.initializers.normal(self.init_std) if self.init_std else None

    def window_of(self, kind: str) -> int | None:
        """Window of a layer of this kind, None without one."""
        return self.window if kind == "local" and self.window else None


_GEMMA2 = dict(
    vocab_size=256_000, attn_softcap=50.0, final_softcap=30.0, post_norms=True, head_dim=256
)
_GEMMA3 = dict(
    pattern=("local",) * 5 + ("global",),
    post_norms=True,
    qk_norm="head",
    rope_theta_global=1e6,
    head_dim=256,
)


def _sizes(width, layers, mlp, heads, kv_heads, **rest):
    return DecoderConfig(
        width=width, layers=layers, mlp=mlp, heads=heads, kv_heads=kv_heads, **rest
    )


_GEMMA1 = dict(vocab_size=256_000, head_dim=256, pattern=("global",))

SIZES = {
    "gemma_2b": _sizes(2048, 18, 16384, 8, 1, **_GEMMA1),
    "gemma_7b": _sizes(3072, 28, 24576, 16, 16, **_GEMMA1),
    "gemma2_2b": _sizes(2304, 26, 9216, 8, 4, **_GEMMA2),
    "gemma2_9b": _sizes(3584, 42, 14336, 16, 8, **_GEMMA2),
    "gemma2_27b": _sizes(
        4608, 46, 36864, 32, 16, **{**_GEMMA2, "head_dim": 128, "query_scale": 144**-0.5}
    ),
    "gemma3_1b": _sizes(1152, 26, 6912, 4, 1, vocab_size=262_144, window=512, **_GEMMA3),
    "gemma3_4b": _sizes(
        2560, 34, 10240, 8, 4, vocab_size=262_208, window=1024, rope_scale_global=8.0, **_GEMMA3
    ),
    # UniFluid's smaller model: the paper gives no dimensions (unifluid.md section 3).
    "unifluid_0p7b": _sizes(1536, 18, 6144, 8, 4, **_GEMMA2),
    # Gemma-2-shaped models for CPUs; the vocabulary comes with the data.
    "small": _sizes(256, 4, 1024, 4, 2, **{**_GEMMA2, "head_dim": 64, "vocab_size": 8192}),
    "tiny": _sizes(160, 3, 640, 4, 2, **{**_GEMMA2, "head_dim": 40, "vocab_size": 2048}),
    "debug": _sizes(64, 2, 128, 2, 1, **{**_GEMMA2, "head_dim": 32, "vocab_size": 512}),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Shared:
    """What every layer of a call reads."""

    mask: MaskSpec | None
    rope: dict[str, tuple[RopeTable, RopeTable]]  # of queries and keys, by kind of layer
    use: CacheUse | None


class GatedMlp(nn.Module):
    """(activation(x W_gate) ⊙ x W_up) W_down; Gemma's activation is gelu_tanh."""

    hidden: int
    dtype: Any = jnp.float32
    activation: Callable = ACTIVATIONS["gelu_tanh"]
    read_init: Callable | None = None  # of W_gate and W_up; None as in Linear
    write_init: Callable | None = None  # of W_down

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        def linear(features, axes, init, name):
            return Linear((features,), axes, self.dtype, kernel_init=init, name=name)

        up = ("embed", "mlp")
        gate = self.activation(linear(self.hidden, up, self.read_init, "gate")(x))
        hidden = gate * linear(self.hidden, up, self.read_init, "up")(x)
        hidden = constrain(hidden, "batch", "length", "act_mlp")
        return linear(x.shape[-1], ("mlp", "embed"), self.write_init, "down")(hidden)


class Block(nn.Module):
    """One layer: attention and gated MLP, each between a pre-norm and (Gemma 2, 3) a post-norm."""

    cfg: DecoderConfig
    kind: str
    dtype: Any = jnp.float32
    impl: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], shared: _Shared, cache, layer):
        cfg = self.cfg

        def norm(name, y, wanted):
            return RMSNorm(cfg.norm_eps, offset=cfg.norm_offset, name=name)(y) if wanted else y

        attend = Attention(
            cfg.heads,
            cfg.kv_heads,
            cfg.head_dim,
            self.dtype,
            scale=cfg.query_scale,
            softcap=cfg.attn_softcap,
            window=cfg.window_of(self.kind),
            qk_norm=cfg.qk_norm,
            norm_eps=cfg.norm_eps,
            norm_offset=cfg.norm_offset,
            qkv_bias=cfg.qkv_bias,
            kernel_init=cfg.kernel_init,
            impl=self.impl,
            name="attn",
        )
        y, cache = attend(
            norm("pre_attn_norm", x, cfg.pre_norms),
            shared.mask,
            shared.rope[self.kind],
            cache=cache,
            layer=layer,
            use=shared.use,
        )
        x = x + norm("post_attn_norm", y, cfg.post_norms)
        init = cfg.kernel_init
        mlp = GatedMlp(cfg.mlp, self.dtype, ACTIVATIONS[cfg.activation], init, init, name="mlp")
        y = mlp(norm("pre_mlp_norm", x, cfg.pre_norms))
        x = x + norm("post_mlp_norm", y, cfg.post_norms)
        return constrain(x, "batch", "length", "act_embed"), cache


class Group(nn.Module):
    """One repeat of the layer pattern, the body of the scan; the cache rides in the carry."""

    cfg: DecoderConfig
    dtype: Any
    remat: str
    impl: str

    @nn.compact
    def __call__(self, carry, layer, shared):
        x, caches = carry
        block = remat_block(Block, self.remat, looped=self.cfg.repeats > 1)
        out = {}
        for i, kind in enumerate(self.cfg.pattern):
            name = f"{i}_{kind}"
            cache = None if caches is None else caches[name]
            x, out[name] = block(self.cfg, kind, self.dtype, self.impl, name=name)(
                x, shared, cache, layer
            )
        return (x, None if caches is None else out), None


class Decoder(nn.Module):
    """Embedding, layer stack and (tied) output head as three methods."""

    cfg: DecoderConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    impl: str = "auto"
    apart: bool = False  # parameters and cache of the layers, as over_layers takes them

    def setup(self):
        cfg = self.cfg
        init = nn.initializers.normal(cfg.init_std or cfg.width**-0.5)
        init = nn.with_logical_partitioning(init, ("vocab", "embed"))
        shape = (cfg.vocab_size, cfg.width)
        self.embedding = self.param("embedding", init, shape, jnp.float32)
        if not cfg.tie:
            self.head = self.param("head", init, shape, jnp.float32)
        self.final_norm = RMSNorm(cfg.norm_eps, offset=cfg.norm_offset)

    def table(self) -> Float[Array, "v d"]:
        """Output embedding in float32, what the chunked cross-entropy multiplies with."""
        return self.embedding if self.cfg.tie else self.head

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Rows of the embedding times sqrt(D), the factor rounded to the compute type first."""
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        if self.cfg.embed_scale:
            x = x * jnp.asarray(math.sqrt(self.cfg.width), self.dtype)
        return constrain(x, "batch", "length", "act_embed")

    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: MaskSpec | None = None,
        positions: Int[Array, "b t"] | None = None,
        cache=None,
        lengths: Int[Array, "b"] | None = None,
        turns: tuple[Int[Array, "b t *axes"], Int[Array, "b t *axes"]] | None = None,
    ):
        """Hidden states after the final norm, and the cache after this call (None without one).

        turns: positions by which rotary embedding turns queries and keys, where these are not
        `positions`.

        Without a cache, or with one and T > 1 and a mask (prefill: tokens 0..T-1 of right-padded
        rows), x attends to itself under `mask`. With a cache and T = 1, or no mask, each row
        continues at its own positions and sees every stored key up to them.
        """
        x = constrain(x.astype(self.dtype), "batch", "length", "act_embed")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        step = cache is not None and (x.shape[1] == 1 or mask is None)
        use = None if cache is None else CacheUse(positions, lengths, step)
        if mask is None and not step:
            mask = MaskSpec()
        shared = _Shared(mask, self._rope_tables(*(turns or (positions, positions))), use)
        x, cache = self._stack(x, shared, cache)
        return self.final_norm(x), cache

    @nn.compact
    def _stack(self, x, shared, cache):
        """The scanned repeats of the pattern, then the layers left over."""
        cfg, done = self.cfg, {}
        if cfg.repeats:
            # Decoding gains nothing from unrolling: no backward pass.
            unroll = cache is None and self.remat == "none"

            def stack(name, count, x, cache):
                scan = scan_layers(Group, count, (0, nn.broadcast), unroll=unroll)
                layers = scan(cfg, self.dtype, self.remat, self.impl, name=name)
                return layers((x, cache), jnp.arange(count, dtype=jnp.int32), shared)[0]

            held = None if cache is None else cache["layers"]
            x, done["layers"] = over_layers(stack, "layers", cfg.repeats, x, held, apart=self.apart)
        block = remat_block(Block, self.remat, looped=False)
        for i, kind in enumerate(cfg.tail):
            name = f"tail_{i}"
            x, done[name] = block(cfg, kind, self.dtype, self.impl, name=name)(
                x, shared, None if cache is None else cache[name], 0
            )
        return x, None if cache is None else done

    def logits(self, hidden: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """Soft-capped scores of every vocabulary row, float32."""
        table = self.table().astype(self.dtype)
        out = jnp.einsum(
            "...d,vd->...v", hidden.astype(self.dtype), table, preferred_element_type=jnp.float32
        )
        cap = self.cfg.final_softcap
        return cap * jnp.tanh(out / cap) if cap else out

    def text(
        self, tokens: Int[Array, "b t"], mask: MaskSpec | None = None, positions=None
    ) -> Float[Array, "b t v"]:
        """Logits of a plain language model; also the method that initialises every parameter."""
        return self.logits(self(self.embed(tokens), mask, positions)[0])

    def _rope_tables(self, queries, keys):
        cfg = self.cfg

        def both(theta, scale=1.0):
            table = rope_table(queries, cfg.head_dim, theta, scale, cfg.rope_bands)
            if keys is queries:
                return table, table
            return table, rope_table(keys, cfg.head_dim, theta, scale, cfg.rope_bands)

        local = both(cfg.rope_theta)
        if cfg.rope_theta_global is None and cfg.rope_scale_global == 1.0:
            return {"local": local, "global": local}
        everywhere = both(cfg.rope_theta_global or cfg.rope_theta, cfg.rope_scale_global)
        return {"local": local, "global": everywhere}


def init_cache(
    cfg: DecoderConfig, batch: int, max_len: int, dtype=jnp.float32, *, apart: bool = False
):
    """Empty cache for rows of up to max_len tokens; every leaf is [n, B, G, S, K] (rows on axis 1).

    S is max_len, and min(window, max_len) where a local layer can do with a ring.
    """

    def entry(kind, layers):
        window = cfg.window_of(kind)
        slots = max_len if window is None else min(window, max_len)
        return kv_cache.empty(layers, batch, slots, cfg.kv_heads, cfg.head_dim, dtype)

    caches = {f"tail_{i}": entry(kind, 1) for i, kind in enumerate(cfg.tail)}
    if cfg.repeats:
        caches["layers"] = state_of_layers(
            lambda n: {f"{i}_{kind}": entry(kind, n) for i, kind in enumerate(cfg.pattern)},
            cfg.repeats,
            apart,
        )
    return caches
