"""Mamba-1 and Mamba-2 language models (arXiv 2312.00752, 2405.21060): x = x + Mixer(RMSNorm(x)).

Mamba-1:  u, z = n W_in;  Mixer = W_out( scan(silu(conv(u)), Δ, B, C) * silu(z) )
Mamba-2:  z, x, B, C, δ = n W_in;  x, B, C = silu(conv([x, B, C]));
          Mixer = W_out RMSNorm_per_group( ssd(x, softplus(δ + b), A, B, C) * silu(z) )

The scans are kernels/selective_scan and kernels/ssd. The memory of a layer does not grow with the
text. Documents packed in a row start afresh, exactly; right padding leaves the memory as it is.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from export.weights import Rule, WeightMap, linear, plain
from kernels.ssd import ssd, ssd_step
from models import Model, language
from models.blocks.common import (
    Linear,
    constrain,
    over_layers,
    remat_block,
    scan_layers,
    state_of_layers,
)
from models.blocks.mamba import Conv, Memory, SelectiveSSM, Text, step_bias, text_of, uniform
from models.blocks.norms import RMSNorm, rms_norm


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """Sizes; head_dim and groups are Mamba-2's."""

    vocab_size: int
    width: int
    layers: int
    version: int = 1
    state: int = 16
    taps: int = 4
    expand: int = 2
    head_dim: int = 64
    groups: int = 1
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.version not in (1, 2):
            raise ValueError(f"version={self.version}, allowed: 1, 2")
        if self.version == 2 and self.inner % self.head_dim:
            raise ValueError(f"head_dim={self.head_dim} must divide expand * width = {self.inner}")

    @property
    def inner(self) -> int:
        """Channels of the scan."""
        return self.expand * self.width

    @property
    def rank(self) -> int:
        """Of Mamba-1's Δ."""
        return -(-self.width // 16)

    @property
    def heads(self) -> int:
        """Of Mamba-2."""
        return self.inner // self.head_dim

    @property
    def conv(self) -> int:
        """Channels of the convolution."""
        return self.inner + (2 * self.groups * self.state if self.version == 2 else 0)


def _second(width, layers) -> MambaConfig:
    return MambaConfig(50_288, width, layers, version=2, state=128)


SIZES = {
    "mamba_130m": MambaConfig(50_280, 768, 24),
    "mamba_370m": MambaConfig(50_280, 1024, 48),
    "mamba_790m": MambaConfig(50_280, 1536, 48),
    "mamba_1.4b": MambaConfig(50_280, 2048, 48),
    "mamba_2.8b": MambaConfig(50_280, 2560, 64),
    "mamba2_130m": _second(768, 24),
    "mamba2_370m": _second(1024, 48),
    "mamba2_780m": _second(1536, 48),
    "mamba2_1.3b": _second(2048, 48),
    "mamba2_2.7b": _second(2560, 64),
    # For CPUs; the vocabulary comes with the data.
    "tiny": MambaConfig(4096, 208, 9),
    "tiny2": MambaConfig(4096, 192, 11, version=2, state=64, head_dim=32),
    "debug": MambaConfig(512, 64, 2),
    "debug2": MambaConfig(512, 64, 2, version=2, state=16, head_dim=16),
}


def project(features, cfg: MambaConfig, dtype, name, x, axes=("embed", "mlp")):
    """A part of W_in; torch's U(±d^-1/2)."""
    init = uniform(cfg.width**-0.5)
    return Linear(features, axes, dtype, kernel_init=init, name=name)(x)


def output(cfg: MambaConfig, dtype, y):
    """W_out, smaller with every layer that adds to the residual stream."""
    init = uniform((cfg.inner * cfg.layers) ** -0.5)
    return Linear((cfg.width,), ("mlp", "embed"), dtype, kernel_init=init, name="out_proj")(y)


class Mixer1(nn.Module):
    """Mamba-1."""

    cfg: MambaConfig
    dtype: Any
    impl: str

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], memory: Memory, text: Text, step: bool):
        cfg = self.cfg
        u, z = (project((cfg.inner,), cfg, self.dtype, name, x) for name in "uz")
        ssm = SelectiveSSM(cfg.state, cfg.taps, cfg.rank, self.dtype, impl=self.impl, name="ssm")
        y, memory = ssm(u, z, memory, text, step=step)
        return output(cfg, self.dtype, y), memory


class Mixer2(nn.Module):
    """Mamba-2."""

    cfg: MambaConfig
    dtype: Any
    impl: str

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], memory: Memory, text: Text, step: bool):
        cfg = self.cfg
        rows, length = x.shape[:2]
        shape, inner = (cfg.groups, cfg.state), cfg.inner
        z, u = (project((inner,), cfg, self.dtype, name, x) for name in "zx")
        bc = project((2 * cfg.groups * cfg.state,), cfg, self.dtype, "BC", x, ("embed", None))
        delta = project((cfg.heads,), cfg, self.dtype, "dt", x, ("embed", "heads"))
        u, tail = Conv(cfg.taps, name="conv")(u, memory.conv[..., :inner], text)
        bc, more = Conv(cfg.taps, name="conv_BC")(bc, memory.conv[..., inner:], text)
        u, z = (a.reshape(rows, length, cfg.heads, cfg.head_dim) for a in (u, z))
        B, C = (a.reshape(rows, length, *shape) for a in jnp.split(bc, 2, axis=-1))

        def own(name, init):
            init = nn.with_logical_partitioning(init, ("heads",))
            return self.param(name, init, (cfg.heads,), jnp.float32)

        def log_uniform(key, shape, dtype):
            return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))

        A, D = -jnp.exp(own("A_log", log_uniform)), own("D", nn.initializers.ones_init())
        options = dict(delta_bias=own("dt_bias", step_bias()), impl=self.impl)
        h = jnp.broadcast_to(memory.h, (rows, *memory.h.shape[1:]))
        if step:
            one = (a[:, 0] for a in (u, delta, B, C, z))
            u, delta, B, C, z = one
            y, h = ssd_step(u, delta, A, B, C, D, h, z=z, **options)
        else:
            options |= dict(segment_ids=text.segment_ids, mask=text.valid)
            y, h = ssd(u, delta, A, B, C, D, z=z, h0=h, **options)
        # A norm for each group of heads that share B and C.
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ("mlp",))
        scale = self.param("norm", ones, (inner,), jnp.float32).reshape(cfg.groups, -1)
        y = rms_norm(y.reshape(rows, length, cfg.groups, -1), scale, cfg.norm_eps, 0.0)
        y = y.reshape(rows, length, inner)
        return output(cfg, self.dtype, y), Memory(jnp.concatenate([tail, more], -1), h)


class Block(nn.Module):
    """The mixer behind a norm; shaped as the body of a scan over layers."""

    cfg: MambaConfig
    dtype: Any = jnp.float32
    impl: str = "auto"
    keep_state: bool = False
    step: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], memory: Memory, text: Text):
        cfg = self.cfg
        n = RMSNorm(cfg.norm_eps, offset=0.0, name="norm")(x)
        mixer = {1: Mixer1, 2: Mixer2}[cfg.version](cfg, self.dtype, self.impl, name="mixer")
        y, memory = mixer(n, memory, text, self.step)
        x = constrain(x + y, "batch", "length", "act_embed")
        return x, memory if self.keep_state else None


class Mamba(language.Net):
    """Embedding, blocks, tied head."""

    cfg: MambaConfig

    def setup(self):
        self.embedding = self.rows("embedding", nn.initializers.normal(0.02))
        self.final_norm = RMSNorm(self.cfg.norm_eps, offset=0.0)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        state: Memory | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        valid: Bool[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        *,
        keep_state: bool = False,
    ) -> tuple[Float[Array, "b t d"], Memory | None]:
        """Hidden states after the final norm, and every layer's memory (layers first) if kept."""
        x = self.embed(tokens)
        step = state is not None and tokens.shape[1] == 1 and valid is None
        if state is None:
            state = init_state(self.cfg, 1, self.dtype, apart=self.apart)
        x, state = self._stack(x, state, text_of(segment_ids, valid), keep_state, step)
        return self.final_norm(x), state

    @nn.compact
    def _stack(self, x, state, text, keep_state, step):
        cfg = self.cfg
        block = remat_block(Block, self.remat, looped=cfg.layers > 1)
        unroll = not keep_state and self.remat == "none"

        def stack(name, count, x, state):
            scan = scan_layers(block, count, (0, nn.broadcast), unroll=unroll)
            layers = scan(cfg, self.dtype, self.impl, keep_state, step, name=name)
            return layers(x, state, text)

        return over_layers(stack, "layers", cfg.layers, x, state, apart=self.apart)


def init_state(cfg: MambaConfig, rows: int, dtype=jnp.float32, *, apart: bool = False) -> Memory:
    """Empty memory of all layers, on a leading axis; apart: as over_layers takes it."""
    h = (cfg.inner, cfg.state)
    if cfg.version == 2:
        h = (cfg.heads, cfg.head_dim, cfg.state)

    def make(count):
        conv = jnp.zeros((count, rows, cfg.taps - 1, cfg.conv), dtype)
        return Memory(conv, jnp.zeros((count, rows, *h), jnp.float32))

    return state_of_layers(make, cfg.layers, apart)


def conv_kernel(name: str, **stacking) -> Rule:
    """Ours [K, channels], published [channels, 1, K]."""
    return Rule(name, lambda x: np.expand_dims(x.T, 1), lambda x: x[:, 0].T, **stacking)


def parts(rule: Rule, sizes: dict[str, int]) -> dict[str, Rule]:
    """One rule for each of the leaves that are published as one tensor's rows, in this order."""
    ends = np.cumsum([0, *sizes.values()]).tolist()
    return {
        name: rule._replace(part=(start, stop, ends[-1]))
        for name, start, stop in zip(sizes, ends, ends[1:])
    }


def weight_map(cfg: MambaConfig) -> WeightMap:
    """Names of state-spaces' checkpoints as transformers loads them."""
    stacked, block = dict(stack=(1,)), "backbone.layers.{layer}."
    mixer = block + "mixer."
    names = {
        "embedding": plain("backbone.embeddings.weight"),
        "final_norm/scale": plain("backbone.norm_f.weight"),
        "layers/norm/scale": plain(block + "norm.weight", **stacked),
        "layers/mixer/out_proj/kernel": linear(mixer + "out_proj.weight", **stacked),
    }
    into = linear(mixer + "in_proj.weight", **stacked)
    inner, more = cfg.inner, 2 * cfg.groups * cfg.state
    if cfg.version == 1:
        found = parts(into, {"u/kernel": inner, "z/kernel": inner}) | {
            "ssm/conv/kernel": conv_kernel(mixer + "conv1d.weight", **stacked),
            "ssm/conv/bias": plain(mixer + "conv1d.bias", **stacked),
            "ssm/x_proj/kernel": linear(mixer + "x_proj.weight", **stacked),
            "ssm/dt_proj/kernel": linear(mixer + "dt_proj.weight", **stacked),
            "ssm/dt_bias": plain(mixer + "dt_proj.bias", **stacked),
            "ssm/A_log": plain(mixer + "A_log", **stacked),
            "ssm/D": plain(mixer + "D", **stacked),
        }
    else:
        sizes = {"z": inner, "x": inner, "BC": more, "dt": cfg.heads}
        found = parts(into, {f"{name}/kernel": size for name, size in sizes.items()})
        for leaf, rule in (("kernel", conv_kernel), ("bias", plain)):
            published = mixer + "conv1d." + ("weight" if leaf == "kernel" else "bias")
            convs = {f"conv/{leaf}": inner, f"conv_BC/{leaf}": more}
            found |= parts(rule(published, **stacked), convs)
        found |= {x: plain(mixer + x, **stacked) for x in ("A_log", "D", "dt_bias")}
        found["norm"] = plain(mixer + "norm.weight", **stacked)
    names |= {f"layers/mixer/{path}": rule for path, rule in found.items()}
    return WeightMap(names, ignore=("lm_head.weight",))


def build(config) -> Model:
    """The language model behind the seam of models/__init__.py."""

    def start(net, params, rows, max_len):
        return init_state(net.cfg, rows, net.dtype, apart=net.apart)

    return language.build(config, SIZES, Mamba, start, weight_map)
