"""Hymba (arXiv 2411.13676): attention heads and Mamba heads side by side in every layer.

    h = RMSNorm(x)
    x = x + W_out( (RMSNorm(attention(h)) + RMSNorm(mamba(h))) / 2 )
    x = x + W_down(silu(W_gate n) * (W_up n)),  n = RMSNorm(x)

All but a few layers attend to a window; neighbours share keys and values; M learnt meta tokens
stand in front of every text and start its Mamba states. They do not depend on the text, so they
are read once, in a row of their own, and every text of every row begins where they ended: the same
code packs documents, continues a prompt, and trains. Value heads are wider than query heads.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.attention import MaskSpec, attention
from models import language
from models.blocks import kv_cache
from models.blocks.common import Linear, constrain, over_layers, remat_block, scan_layers
from models.blocks.decoder import GatedMlp
from models.blocks.kv_cache import KVCache
from models.blocks.mamba import Memory, SelectiveSSM, Text, text_of
from models.blocks.norms import RMSNorm
from models.blocks.rope import RopeTable, apply_rope, rope_table

FUSIONS = ("mean", "concat", "alternate", "attention", "mamba")


@dataclasses.dataclass(frozen=True)
class HymbaConfig:
    """Sizes; layers that are in no sharing group own their keys and values.

    fusion: mean of the two normed branches (the paper's), concat of them, alternate (a Mamba layer,
    then an attention layer: the sequential hybrid), or one branch alone.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    meta: int = 128
    window: int = 1024  # a query sees itself and this many tokens before it, and the meta tokens
    global_layers: tuple[int, ...] = ()  # these see everything
    groups: tuple[tuple[int, ...], ...] = ()  # neighbours that share the first one's keys, values
    fusion: str = "mean"
    state: int = 16
    taps: int = 4
    expand: int = 2
    dt_rank: int = 0  # of Δ; 0: width / 16
    rope_theta: float = 10_000.0
    rope_stretch: float = 4.0  # longest context over the first one; 1: theta as it is
    norm_eps: float = 1e-6
    decode_window_compat: bool = False  # the published decoding: one key fewer than in training

    def __post_init__(self):
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion={self.fusion!r}, allowed: {', '.join(FUSIONS)}")
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} must divide width={self.width} and be a multiple of "
                f"kv_heads={self.kv_heads}"
            )
        for group in self.groups:
            if list(group) != list(range(group[0], group[0] + len(group))):
                raise ValueError(f"groups: {group} are not neighbours")
            if set(group) & set(self.global_layers):
                raise ValueError(f"groups: {group} has a global layer, which owns its keys")

    @property
    def inner(self) -> int:
        """Channels of either branch."""
        return self.expand * self.width

    @property
    def head_dim(self) -> int:
        """Of queries and keys."""
        return self.width // self.heads

    @property
    def value_dim(self) -> int:
        """Of values."""
        return self.inner // self.heads

    @property
    def rank(self) -> int:
        """Of Δ."""
        return self.dt_rank or -(-self.width // 16)

    @property
    def theta(self) -> float:
        """Base of the rotary positions, changed once for longer contexts ("ntk")."""
        power = self.head_dim / (self.head_dim - 2)
        return self.rope_theta * (2 * self.rope_stretch - 1) ** power

    def runs(self) -> tuple["Run", ...]:
        """The stack as runs of equal units, each of which is scanned over."""
        starts = {group[0]: len(group) for group in self.groups}
        found, at = [], 0
        while at < self.layers:
            size = starts.get(at, 1)
            if self.fusion == "alternate":
                size = 2
            unit = tuple(self._layer(at, i, size) for i in range(size))
            if found and found[-1].unit == unit:
                found[-1] = found[-1]._replace(count=found[-1].count + 1)
            else:
                found.append(Run(unit, 1, at))
            at += size
        if at != self.layers:
            raise ValueError(f"layers={self.layers} end inside a unit of {size}")
        return tuple(found)

    def _layer(self, start: int, i: int, size: int) -> "Layer":
        everywhere = start + i in self.global_layers
        if self.fusion == "alternate":
            return Layer(i == 1, i == 0, everywhere, i == 1)
        attends, scans = self.fusion != "mamba", self.fusion != "attention"
        return Layer(attends, scans, everywhere, attends and i == 0)


class Layer(NamedTuple):
    """What a layer does."""

    attends: bool
    scans: bool
    everywhere: bool  # attends without a window
    owns: bool  # its keys and values; else those of the layer before


class Run(NamedTuple):
    """`count` equal units, the first of which begins with layer `first`."""

    unit: tuple[Layer, ...]
    count: int
    first: int


def sharing(layers: int, everywhere: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The published grouping: pairs between the global layers, a triple first where it is odd."""
    groups, start = [], 0
    for end in (*everywhere, layers):
        left = end - start
        while left > 1:
            size = 3 if left % 2 else 2
            groups.append(tuple(range(end - left, end - left + size)))
            left -= size
        start = end + 1
    return tuple(groups)


def _sizes(vocab_size, width, layers, heads, kv_heads, mlp, **rest) -> HymbaConfig:
    everywhere = (0, layers // 2 - 1, layers - 1)
    groups = sharing(layers, everywhere)
    fixed = dict(global_layers=everywhere, groups=groups)
    return HymbaConfig(vocab_size, width, layers, heads, kv_heads, mlp, **fixed | rest)


SIZES = {
    # Sharing groups of the two smaller ones are not published: the rule of the largest.
    "125m": _sizes(32_001, 512, 24, 8, 4, 1664),
    "350m": _sizes(32_001, 768, 32, 12, 4, 2432),
    "1.5b": _sizes(32_001, 1600, 32, 25, 5, 5504),
    # For CPUs; the vocabulary comes with the data.
    "tiny": HymbaConfig(
        4096,
        160,
        6,
        4,
        2,
        512,
        meta=16,
        window=64,
        rope_stretch=1.0,
        global_layers=(0, 5),
        groups=((1, 2), (3, 4)),
    ),
    "debug": HymbaConfig(
        512,
        64,
        4,
        2,
        1,
        128,
        meta=8,
        window=16,
        rope_stretch=1.0,
        global_layers=(0, 3),
        groups=((1, 2),),
    ),
}


class LayerState(NamedTuple):
    """Of the layers at one place of a run, on a leading axis; None where a layer has none."""

    memory: Memory | None
    cache: KVCache | None


class State(NamedTuple):
    """Of all layers, by run and place, and how many tokens each row has read (meta apart)."""

    layers: dict[str, dict[str, LayerState]]
    length: Int[Array, "b"]


class Past(NamedTuple):
    """What stands before the tokens of a call, in one layer."""

    memory: Memory | None
    k: Float[Array, "#b m g k"] | None = None  # of the meta tokens
    v: Float[Array, "#b m g v"] | None = None
    cache: KVCache | None = None
    layer: Any = None  # index into the cache


class Found(NamedTuple):
    """What a layer leaves: for the layers that share its keys, and for the state."""

    kv: tuple[Array, Array] | None  # everything that was attended to
    own: tuple[Array, Array] | None  # of this call's tokens
    memory: Memory | None
    cache: KVCache | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """What every layer of a call reads."""

    rope: RopeTable
    text: Text
    positions: Int[Array, "b t"]  # meta tokens included
    lengths: Int[Array, "b"] | None  # of a prompt that is stored, meta tokens included
    offset: int = dataclasses.field(metadata=dict(static=True))  # meta tokens before this call's
    step: bool = dataclasses.field(metadata=dict(static=True))

    def mask(self, window: int | None) -> MaskSpec:
        """Causal; under a window with the meta tokens always visible, by every document."""
        own = self.text.segment_ids
        keys = None
        if own is not None and self.offset:
            meta = jnp.full((own.shape[0], self.offset), -1, own.dtype)
            keys = jnp.concatenate([meta, own], axis=1)
        return MaskSpec(
            q_segment_ids=own,
            kv_segment_ids=keys,
            window=window,
            always_visible=self.offset,
            query_offset=self.offset,
            contiguous=own is not None,
        )


matrix_init = nn.initializers.normal(0.02)


class Block(nn.Module):
    """One layer: the fused branches and the MLP, each behind a norm."""

    cfg: HymbaConfig
    layer: Layer
    dtype: Any = jnp.float32
    impl: str = "auto"

    def _linear(self, features, axes, name, x, ins=1):
        return Linear(features, axes, self.dtype, ins, kernel_init=matrix_init, name=name)(x)

    def _norm(self, name, x):
        return RMSNorm(self.cfg.norm_eps, offset=0.0, name=name)(x)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], past: Past, kv, shared: Shared
    ) -> tuple[Float[Array, "b t d"], Found]:
        """kv: what the layer before attended to, for a layer that does not own keys."""
        cfg, layer = self.cfg, self.layer
        h = self._norm("norm", x)
        branches, memory, own, cache = [], None, None, past.cache
        if layer.attends:
            y, kv, own, cache = self._attend(h, past, kv, shared)
            branches.append(self._norm("attn_norm", y))
        if layer.scans:
            u, z = (self._linear((cfg.inner,), ("embed", "mlp"), name, h) for name in "uz")
            ssm = SelectiveSSM(
                cfg.state, cfg.taps, cfg.rank, self.dtype, True, cfg.norm_eps, matrix_init,
                self.impl, name="ssm",
            )  # fmt: skip
            y, memory = ssm(u, z, past.memory, shared.text, step=shared.step)
            branches.append(self._norm("ssm_norm", y))
        if cfg.fusion == "concat":
            fused = jnp.concatenate(branches, axis=-1)
        else:
            fused = sum(branches) / len(branches)
        x = x + self._linear((cfg.width,), ("mlp", "embed"), "out", fused)
        mlp = GatedMlp(cfg.mlp, self.dtype, nn.silu, matrix_init, matrix_init, name="mlp")
        x = x + mlp(self._norm("mlp_norm", x))
        return constrain(x, "batch", "length", "act_embed"), Found(kv, own, memory, cache)

    def _attend(self, h, past, kv, shared):
        """(heads joined [b, t, E], everything attended to, own keys and values, cache)."""
        cfg, cache, own = self.cfg, past.cache, None
        window = None if self.layer.everywhere else cfg.window + 1
        heads = ("embed", "heads", "head_dim")
        q = self._linear((cfg.heads, cfg.head_dim), heads, "q", h)
        q = apply_rope(q, shared.rope)
        if self.layer.owns:
            heads = ("embed", "kv_heads", "head_dim")
            k = self._linear((cfg.kv_heads, cfg.head_dim), heads, "k", h)
            v = self._linear((cfg.kv_heads, cfg.value_dim), heads, "v", h)
            own = k, v = apply_rope(k, shared.rope), v
            if shared.step:
                cache = kv_cache.write_tokens(
                    cache, past.layer, k, v, shared.positions, window is not None, cfg.meta
                )
                k, v = (a.astype(self.dtype) for a in kv_cache.read(cache, past.layer))
            else:
                if past.k is not None:
                    k, v = (
                        jnp.concatenate([jnp.broadcast_to(m, (len(a), *m.shape[1:])), a], axis=1)
                        for m, a in ((past.k.astype(k.dtype), k), (past.v.astype(v.dtype), v))
                    )
                if cache is not None:
                    cache = kv_cache.write_prompt(cache, past.layer, k, v, shared.lengths, cfg.meta)
            kv = k, v
        if shared.step:
            mask = kv_cache.mask_after_write(
                kv[0].shape[1], shared.positions, window is not None, cfg.meta
            )
            mask = dataclasses.replace(
                mask,
                window=window and window - cfg.decode_window_compat,
                always_visible=cfg.meta,
            )
        else:
            mask = shared.mask(window)
        q = constrain(q, "batch", "length", "act_heads", None)
        k, v = (constrain(a, "batch", None, "act_kv_heads", None) for a in kv)
        self.sow("attended", "seen", (q, k, mask))  # kept only where `attended` asks for it
        y = attention(q, k, v, mask, impl=self.impl)
        return y.reshape(*y.shape[:2], cfg.inner), kv, own, cache


class Unit(nn.Module):
    """Layers that share keys and values; the body of a scan over a run's units.

    The meta tokens' row rides along while there is no state: what they leave in a layer is what
    the texts start from there.
    """

    cfg: HymbaConfig
    run: Run
    dtype: Any
    impl: str
    keep: bool  # the meta tokens' keys, values and memories

    @nn.compact
    def __call__(self, carry, memories, index, meta_shared: Shared | None, shared: Shared | None):
        cfg = self.cfg
        x, meta, caches = carry
        kv = meta_kv = None
        caches, left = dict(caches), {}
        for i, layer in enumerate(self.run.unit):
            name = str(i)
            block = Block(cfg, layer, self.dtype, self.impl, name=name)
            if memories is None:
                past = Past(empty_memory(cfg, 1, self.dtype) if layer.scans else None)
                if meta is not None:
                    meta, found = block(meta, past, meta_kv, meta_shared)
                    meta_kv = found.kv
                    past = Past(found.memory, *(found.own or (None, None)))
                    left[name] = past
            else:
                past = self._stored(name, layer, memories[name], caches.get(name), index, shared)
            if x is not None:
                x, found = block(x, past, kv, shared)
                kv = found.kv
                if memories is not None:
                    left[name] = found.memory
                    if layer.owns:
                        caches[name] = found.cache
        return (x, meta, caches), left if self.keep else None

    def _stored(self, name, layer, memory, cache, index, shared):
        if cache is None:
            return Past(memory)
        k = v = None
        if not shared.step and self.cfg.meta:
            k, v = (a[:, : self.cfg.meta] for a in kv_cache.read(cache, index))
        return Past(memory, k, v, cache, index)


class Hymba(language.Net):
    """Meta tokens, embedding, blocks, tied head."""

    cfg: HymbaConfig

    def setup(self):
        cfg = self.cfg
        self.embedding = self.rows("embedding", matrix_init)
        if cfg.meta:
            init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("positions", "embed"))
            self.meta = self.param("meta", init, (cfg.meta, cfg.width), jnp.float32)
        self.final_norm = RMSNorm(cfg.norm_eps, offset=0.0)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        state: State | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        valid: Bool[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        *,
        keep_state: bool = False,
    ) -> tuple[Float[Array, "b t d"], State | None]:
        """Hidden states after the final norm, meta tokens left out, and the state.

        With a state: a prompt, which must be the first call, or one token to each row.
        """
        x = self.embed(tokens)
        text = text_of(segment_ids, valid)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
            positions = positions if text.place is None else text.place
        if state is None:
            shared = self._shared(positions, text)
            return self.final_norm(self._stack(x, self._meta(), None, shared, False)[0]), None
        count = tokens.shape[1] if valid is None else valid.sum(-1, dtype=jnp.int32)
        length, step = state.length + count, tokens.shape[1] == 1 and valid is None
        if step:
            positions = state.length[:, None]
        shared = self._shared(positions, text, length + self.cfg.meta, step)
        x, layers = self._stack(x, None, state.layers, shared, True)
        return self.final_norm(x), State(layers, length) if keep_state else None

    def prefix(self) -> dict[str, dict[str, Past]]:
        """What the meta tokens leave in every layer: memory, keys and values of one row."""
        return self._stack(None, self._meta(), None, None, True)[1]

    def _meta(self):
        return self.meta.astype(self.dtype)[None] if self.cfg.meta else None

    def _shared(self, positions, text, lengths=None, step=False, offset=None) -> Shared:
        cfg = self.cfg
        offset = cfg.meta if offset is None else offset
        positions = positions + offset
        rope = rope_table(positions, cfg.head_dim, cfg.theta)
        return Shared(rope, text, positions, lengths, offset, step)

    @nn.compact
    def _stack(self, x, meta, states, shared, keep):
        cfg, left = self.cfg, {}
        meta_shared = None
        if meta is not None:
            meta_shared = self._shared(jnp.arange(cfg.meta)[None], Text(), offset=0)
        unroll = states is None and self.remat == "none"
        for number, run in enumerate(cfg.runs()):
            name = f"run{number}"
            unit = remat_block(Unit, self.remat, looped=run.count > 1)
            axes = (0, 0, nn.broadcast, nn.broadcast)

            def stack(name, count, carry, states, run=run, unit=unit, axes=axes):
                scan = scan_layers(unit, count, axes, unroll=unroll)
                caches, memories = {}, None
                if states is not None:
                    caches = {i: s.cache for i, s in states.items() if s.cache is not None}
                    memories = {i: s.memory for i, s in states.items()}
                (*carry, caches), found = scan(cfg, run, self.dtype, self.impl, keep, name=name)(
                    (*carry, caches), memories, jnp.arange(count), meta_shared, shared
                )
                if states is not None:
                    found = {i: LayerState(found[i], caches.get(i)) for i in memories}
                return tuple(carry), found

            held = None if states is None else states[name]
            (x, meta), left[name] = over_layers(
                stack, name, run.count, (x, meta), held, apart=self.apart
            )
        return x, left


def attended(net: Hymba, params, batch) -> list[tuple[Array, Array, MaskSpec]]:
    """Queries [b, t, h, k], keys [b, m + t, g, k] and mask of every attending layer, in order; the
    first m keys are the meta tokens'."""
    positions = batch.get("positions")
    call = functools.partial(net.apply, {"params": params}, mutable="attended")
    _, left = call(batch["tokens"], None, batch["segment_ids"], None, positions)
    found = {}
    for number, run in enumerate(net.cfg.runs()):
        for i, layer in enumerate(run.unit):
            if layer.attends:
                seen = left["attended"][f"run{number}"][str(i)]["seen"][-1]  # [0] is the meta row's
                for n in range(run.count):
                    at = run.first + n * len(run.unit) + i
                    found[at] = jax.tree.map(lambda x, n=n: x[n], seen)
    return [found[layer] for layer in sorted(found)]


def empty_memory(cfg: HymbaConfig, rows: int, dtype, layers: tuple[int, ...] = ()) -> Memory:
    """Before any token."""
    conv = jnp.zeros((*layers, rows, cfg.taps - 1, cfg.inner), dtype)
    return Memory(conv, jnp.zeros((*layers, rows, cfg.inner, cfg.state), jnp.float32))


def slots(cfg: HymbaConfig, layer: Layer, max_len: int) -> int:
    """Of a layer's cache: the meta tokens, then a ring of window + 1 or everything."""
    return kv_cache.padded(
        cfg.meta + (max_len if layer.everywhere else min(cfg.window + 1, max_len))
    )


@functools.partial(jax.jit, static_argnums=0)
def prefix(net: Hymba, params) -> dict[str, dict[str, Past]]:
    """What the meta tokens leave in every layer; depends on the checkpoint alone."""
    return language.apply(net, params, method="prefix")


def init_state(net: Hymba, params, rows: int, max_len: int, read=None) -> State:
    """The state of rows that have read the meta tokens and nothing else, for max_len tokens more.

    read: `prefix(net, params)`, where it is kept.
    """
    cfg = net.cfg
    if read is None and cfg.meta:
        read = prefix(net, params)
    layers = {}
    for number, run in enumerate(cfg.runs()):
        name = f"run{number}"
        make = functools.partial(_unit_state, net, run, rows, max_len)
        if not net.apart:
            layers[name] = make(read[name] if cfg.meta else None, run.count)
        else:
            pasts = read[name] if cfg.meta else (None,) * run.count
            layers[name] = tuple(make(past, 1) for past in pasts)
    return State(layers, jnp.zeros((rows,), jnp.int32))


def _unit_state(net: Hymba, run: Run, rows: int, max_len: int, pasts, count: int):
    """State of `count` units, behind what the meta tokens left in them."""
    cfg, units = net.cfg, {}
    for i, layer in enumerate(run.unit):
        past = pasts[str(i)] if cfg.meta else Past(None)
        memory = cache = None
        if layer.scans:
            memory = past.memory or empty_memory(cfg, 1, net.dtype, (count,))
            spread = lambda a: jnp.repeat(a, rows, axis=1)  # noqa: E731
            memory = Memory(spread(memory.conv), spread(memory.h))
        if layer.owns:
            size = slots(cfg, layer, max_len)
            cache = kv_cache.empty(
                count, rows, size, cfg.kv_heads, cfg.head_dim, net.dtype, cfg.value_dim
            )
            if cfg.meta:
                cache = _with_meta(cache, past)
        units[str(i)] = LayerState(memory, cache)
    return units


def _with_meta(cache: KVCache, past: Past) -> KVCache:
    def put(old, new):  # [n, b, g, s, k], [n, 1, m, g, k]
        new = jnp.swapaxes(new, 2, 3).astype(old.dtype)
        new = jnp.broadcast_to(new, (*old.shape[:3], *new.shape[3:]))
        return jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis=3)

    return KVCache(put(cache.k, past.k), put(cache.v, past.v))
