"""xLSTM 7B (arXiv 2503.13427): mLSTM blocks without attention and without positions.

    x = x + mLSTM(RMSNorm(x));   x = x + W_down(silu(W_gate n) * (W_up n)),  n = RMSNorm(x)
    logits = 30 tanh(W_head RMSNorm(x) / 30)

The mLSTM layer, with heads of q, k size dq and v size dv:

    q, k, v = n Wq, n Wk, n Wv;  o = sigmoid(n Wo);  i, f = cap(n Wi + bi), cap(n Wf + bf)
    out = W_out(o * LayerNorm_per_head(cell(q, k, v, i, f))),    cap(z) = 15 tanh(z / 15)

The cell is kernels/mlstm. Its state does not grow with the text: generation costs the same at any
length. Documents packed in a row start afresh at every change of segment id, exactly.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from export.weights import WeightMap, heads_in, heads_out, linear, plain
from kernels.mlstm import State, empty_state, mlstm, mlstm_step
from models import Model, language
from models.blocks.common import (
    Linear,
    constrain,
    over_layers,
    remat_block,
    scan_layers,
    state_of_layers,
)
from models.blocks.decoder import GatedMlp
from models.blocks.norms import RMSNorm, layer_norm

CLOSED, OPEN = -1e30, 1e30  # gates of a token that is not there: nothing written, nothing forgotten


@dataclasses.dataclass(frozen=True)
class XLSTMConfig:
    """Sizes; `qk_factor` is dq over dv, `ffn_factor` the FFN's width over the model's."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    qk_factor: float = 0.5
    ffn_factor: float = 2.667
    ffn_multiple: int = 64
    gate_cap: float | None = 15.0
    logit_cap: float | None = 30.0
    norm_eps: float = 1e-6
    head_norm_eps: float = 1e-6
    input_bias: float = -10.0  # of the input gate: nearly shut at first
    forget_bias: tuple[float, float] = (3.0, 6.0)  # of the first and the last head
    learn_input_gate: bool = True  # False: i stays at input_bias, the paper's ablation

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")

    @property
    def dv(self) -> int:
        """Value size of a head."""
        return self.width // self.heads

    @property
    def dq(self) -> int:
        """Query and key size of a head."""
        return int(self.dv * self.qk_factor)

    @property
    def ffn(self) -> int:
        """Width of the FFN, rounded up."""
        return math.ceil(self.width * self.ffn_factor / self.ffn_multiple) * self.ffn_multiple


SIZES = {
    "165m": XLSTMConfig(50_304, 768, 12, 4),
    "1.3b": XLSTMConfig(50_304, 2048, 24, 4),
    "2.7b": XLSTMConfig(50_304, 2560, 32, 5),
    "7b": XLSTMConfig(50_304, 4096, 32, 8),
    # For CPUs; the vocabulary comes with the data.
    "tiny": XLSTMConfig(4096, 192, 4, 4),
    "mini": XLSTMConfig(4096, 128, 2, 4),
    "debug": XLSTMConfig(512, 64, 2, 2),
}


def cap(z, limit: float | None):
    """limit tanh(z / limit)."""
    return limit * jnp.tanh(z / limit) if limit else z


def small_init(width: int):
    """N(0, 2 / (5 d)), for everything that reads the residual stream."""
    return nn.initializers.normal((2 / (5 * width)) ** 0.5)


def output_init(layers: int, width: int):
    """std 2 / (layers sqrt(d)), for everything that writes to it; d is the model's width."""
    return nn.initializers.normal(2 / layers / width**0.5)


def head_norm(h: Float[Array, "b t h v"], weight: Float[Array, "h v"], eps: float):
    """LayerNorm of every head without bias, statistics in float32."""
    return (layer_norm(h.astype(jnp.float32), eps=eps) * weight).astype(h.dtype)


class Cell(nn.Module):
    """The mLSTM layer: projections, gates, cell, norm per head, output gate."""

    cfg: XLSTMConfig
    dtype: Any = jnp.float32
    impl: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: State | None,
        segment_ids: Int[Array, "b t"] | None,
        valid: Bool[Array, "b t"] | None,
    ) -> tuple[Float[Array, "b t d"], State]:
        cfg, read = self.cfg, small_init(self.cfg.width)

        def heads(name, size):
            axes = ("embed", "heads", "head_dim")
            shape = (cfg.heads, size)
            return Linear(shape, axes, self.dtype, kernel_init=read, name=name)(x)

        q, k, v = heads("q", cfg.dq), heads("k", cfg.dq), heads("v", cfg.dv)
        i, f = self._gates(x)
        if valid is not None:
            i = jnp.where(valid[..., None], i, CLOSED)
            f = jnp.where(valid[..., None], f, OPEN)
        if x.shape[1] == 1 and state is not None and segment_ids is None:
            h, state = mlstm_step(*(a[:, 0] for a in (q, k, v, i, f)), state)
            h = h[:, None]
        else:
            q, k, v, i, f = (jnp.swapaxes(a, 1, 2) for a in (q, k, v, i, f))
            h, state = mlstm(q, k, v, i, f, state=state, segment_ids=segment_ids, impl=self.impl)
            h = jnp.swapaxes(h, 1, 2)
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ("heads", "head_dim"))
        weight = self.param("norm", ones, (cfg.heads, cfg.dv), jnp.float32)
        h = head_norm(h, weight, cfg.head_norm_eps)
        zero = nn.initializers.zeros_init()
        o = Linear(
            (cfg.heads, cfg.dv), ("embed", "heads", "head_dim"), self.dtype,
            kernel_init=zero, name="o",
        )(x)  # fmt: skip
        h = constrain(nn.sigmoid(o) * h, "batch", "length", "act_heads", None)
        out = Linear(
            (cfg.width,), ("heads", "head_dim", "embed"), self.dtype, 2,
            kernel_init=output_init(cfg.layers, cfg.width), name="out",
        )(h)  # fmt: skip
        return out, state

    def _gates(self, x):
        """Capped pre-activations [b, t, h], in float32 throughout."""
        cfg = self.cfg
        x = x.astype(jnp.float32)

        def gate(name, bias):
            zero = nn.initializers.zeros_init()
            linear = Linear(
                (cfg.heads,), ("embed", "heads"), jnp.float32, bias=True,
                kernel_init=zero, bias_init=bias, name=name,
            )  # fmt: skip
            return cap(linear(x), cfg.gate_cap)

        def rising(key, shape, dtype):
            return jnp.linspace(*cfg.forget_bias, shape[0], dtype=dtype)

        i = gate("i", nn.initializers.constant(cfg.input_bias))
        if not cfg.learn_input_gate:
            i = jnp.full_like(i, cfg.input_bias)
        return i, gate("f", rising)


class Block(nn.Module):
    """mLSTM and FFN, each behind an RMSNorm; shaped as the body of a scan over layers."""

    cfg: XLSTMConfig
    dtype: Any = jnp.float32
    impl: str = "auto"
    keep_state: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], state, segment_ids, valid):
        cfg = self.cfg

        def norm(name):
            return RMSNorm(cfg.norm_eps, offset=0.0, name=name)(x)

        cell = Cell(cfg, self.dtype, self.impl, name="mlstm")
        y, state = cell(norm("norm_mlstm"), state, segment_ids, valid)
        x = x + y
        mlp = GatedMlp(
            cfg.ffn,
            self.dtype,
            nn.silu,
            small_init(cfg.width),
            output_init(cfg.layers, cfg.width),
            name="ffn",
        )
        x = x + mlp(norm("norm_ffn"))
        return constrain(x, "batch", "length", "act_embed"), state if self.keep_state else None


class XLSTM(language.Net):
    """Embedding, blocks and untied head."""

    cfg: XLSTMConfig
    float32 = ("i", "f")  # gates

    def setup(self):
        init = small_init(self.cfg.width)
        self.embedding, self.head = self.rows("embedding", init), self.rows("head", init)
        self.final_norm = RMSNorm(self.cfg.norm_eps, offset=0.0)

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
        """Hidden states after the final norm, and every layer's state (layers first) if kept.

        state: of `init_state` or an earlier call; tokens where `valid` is False leave it as it is.
        positions: not used, the cell knows the order.
        """
        x, state = self._stack(self.embed(tokens), state, segment_ids, valid, keep_state)
        return self.final_norm(x), state

    @nn.compact
    def _stack(self, x, state, segment_ids, valid, keep_state):
        cfg = self.cfg
        block = remat_block(Block, self.remat, looped=cfg.layers > 1)
        unroll = not keep_state and self.remat == "none"
        axes = (0, nn.broadcast, nn.broadcast)

        def stack(name, count, x, state):
            scan = scan_layers(block, count, axes, unroll=unroll)
            layers = scan(cfg, self.dtype, self.impl, keep_state, name=name)
            return layers(x, state, segment_ids, valid)

        return over_layers(stack, "layers", cfg.layers, x, state, apart=self.apart)

    def table(self) -> Float[Array, "v d"]:
        """Output rows."""
        return self.head

    @property
    def softcap(self) -> float | None:
        """Cap of the scores."""
        return self.cfg.logit_cap


def init_state(cfg: XLSTMConfig, rows: int, max_len: int = 0, *, apart: bool = False) -> State:
    """Empty state of all layers, on a leading axis; float32, whatever the text's length.

    apart: as over_layers takes it.
    """
    one = empty_state(rows, cfg.heads, cfg.dq, cfg.dv)

    def make(count):
        return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), one)

    return state_of_layers(make, cfg.layers, apart)


def weight_map(cfg: XLSTMConfig) -> WeightMap:
    """Names of NX-AI/xLSTM-7b as transformers loads it."""
    block = "backbone.blocks.{layer}."
    cell, ffn, stacked = block + "mlstm_layer.", block + "ffn.", dict(stack=(1,))
    rules = {
        "embedding": plain("backbone.embeddings.weight"),
        "final_norm/scale": plain("backbone.out_norm.weight"),
        "head": plain("lm_head.weight"),
        "layers/norm_mlstm/scale": plain(block + "norm_mlstm.weight", **stacked),
        "layers/norm_ffn/scale": plain(block + "norm_ffn.weight", **stacked),
        "layers/ffn/gate/kernel": linear(ffn + "proj_up_gate.weight", **stacked),
        "layers/ffn/up/kernel": linear(ffn + "proj_up.weight", **stacked),
        "layers/ffn/down/kernel": linear(ffn + "proj_down.weight", **stacked),
    }
    return WeightMap(rules | _cell_names(cfg, cell, stacked))


def _cell_names(cfg: XLSTMConfig, cell: str, stacked: dict) -> dict:
    path = "layers/mlstm/"
    rules = {
        f"{path}{ours}/kernel": heads_in(f"{cell}{name}.weight", cfg.heads, **stacked)
        for ours, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "ogate_preact"))
    }
    for ours, name in (("i", "igate_preact"), ("f", "fgate_preact")):
        rules[f"{path}{ours}/kernel"] = linear(f"{cell}{name}.weight", **stacked)
        rules[f"{path}{ours}/bias"] = plain(f"{cell}{name}.bias", **stacked)
    rules[f"{path}out/kernel"] = heads_out(f"{cell}out_proj.weight", cfg.heads, **stacked)
    rules[f"{path}norm"] = heads_in(f"{cell}multihead_norm.weight", cfg.heads, **stacked)
    return rules


def build(config) -> Model:
    """The language model behind the seam of models/__init__.py."""

    def start(net, params, rows, max_len):
        return init_state(net.cfg, rows, max_len, apart=net.apart)

    return language.build(config, SIZES, XLSTM, start, weight_map)
