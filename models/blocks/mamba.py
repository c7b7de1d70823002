"""What Mamba-1, Mamba-2 and Hymba share: the causal convolution and the selective state space.

A layer's memory is a `Memory`: the last K - 1 inputs of the convolution and the state of the scan.
Where a text begins, in a fresh row or behind another document of the same row, both are those of
`start`: empty for a Mamba, what the meta tokens left for a Hymba.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.selective_scan import selective_scan, selective_scan_step
from models.blocks.common import Linear, constrain
from models.blocks.norms import RMSNorm


class Memory(NamedTuple):
    """Of one layer, or of several on a leading axis."""

    conv: Float[Array, "b k e"]  # the last K - 1 inputs
    h: Float[Array, "b e n"]  # float32; Mamba-2's is [b, h, p, n]


class Text(NamedTuple):
    """Which tokens belong together; None where there is nothing to say."""

    segment_ids: Int[Array, "b t"] | None = None  # documents of a row
    place: Int[Array, "b t"] | None = None  # of a token in its document, of those
    valid: Bool[Array, "b t"] | None = None  # False: right padding


def text_of(segment_ids, valid) -> Text:
    """Counts every token's place in its document."""
    if segment_ids is None:
        return Text(valid=valid)
    at = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    new = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    begun = jax.lax.cummax(jnp.where(new, at, 0), axis=1)
    return Text(segment_ids, at - begun, valid)


def causal_conv(
    u: Float[Array, "b t e"],
    kernel: Float[Array, "k e"],
    bias: Float[Array, "e"],
    before: Float[Array, "#b k1 e"],
    place: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t e"]:
    """Σ_j kernel[j] u[t - K + 1 + j] + bias per channel; `before` stands in front of every text.

    place: of each token in its document, so that none sees the document before.
    """
    taps, length = kernel.shape[0], u.shape[1]
    before = jnp.broadcast_to(before.astype(u.dtype), (u.shape[0], *before.shape[1:]))
    row = jnp.concatenate([before, u], axis=1)
    out = u * kernel[-1] + bias
    for back in range(1, taps):
        past = row[:, taps - 1 - back : taps - 1 - back + length]
        if place is not None:
            # Token `place` of a document reaches place - back < 0: `before`, counted from its end.
            index = jnp.clip(taps - 1 - back + place, 0, taps - 2)
            first = jnp.take_along_axis(before, index[..., None], axis=1)
            past = jnp.where((place >= back)[..., None], past, first)
        out = out + past * kernel[taps - 1 - back]
    return out


def conv_tail(u, before, valid) -> Float[Array, "b k1 e"]:
    """The last K - 1 inputs of each row, those of `before` included; padding does not count."""
    count = before.shape[1]
    before = jnp.broadcast_to(before.astype(u.dtype), (u.shape[0], *before.shape[1:]))
    row = jnp.concatenate([before, u], axis=1)
    if valid is None:
        return row[:, -count:]
    index = valid.sum(1, dtype=jnp.int32)[:, None] + jnp.arange(count)
    return jnp.take_along_axis(row, index[..., None], axis=1)


def uniform(bound: float):
    """U(-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def step_bias(low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4):
    """softplus^-1(δ) of δ log-uniform between low and high."""

    def draw(key, shape, dtype=jnp.float32):
        u = jax.random.uniform(key, shape, dtype)
        delta = jnp.exp(u * (math.log(high) - math.log(low)) + math.log(low))
        delta = jnp.maximum(delta, floor)
        return delta + jnp.log(-jnp.expm1(-delta))

    return draw


def log_counting(key, shape, dtype=jnp.float32):
    """log(1..N) for every channel."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


class Conv(nn.Module):
    """silu of the causal convolution, with its memory."""

    taps: int
    init: Any = None  # None: U(±K^-1/2), as torch

    @nn.compact
    def __call__(
        self, u: Float[Array, "b t e"], start, text: Text
    ) -> tuple[Float[Array, "b t e"], Float[Array, "b k1 e"]]:
        init, width = self.init or uniform(self.taps**-0.5), u.shape[-1]
        kernel = nn.with_logical_partitioning(init, ("time", "mlp"))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("mlp",))
        kernel = self.param("kernel", kernel, (self.taps, width), jnp.float32)
        bias = self.param("bias", zeros, (width,), jnp.float32)
        kernel, bias = kernel.astype(u.dtype), bias.astype(u.dtype)
        out = nn.silu(causal_conv(u, kernel, bias, start, text.place))
        return constrain(out, "batch", "length", "act_mlp"), conv_tail(u, start, text.valid)


class SelectiveSSM(nn.Module):
    """Mamba-1's heads: u' = silu(conv(u)); y = scan(u', softplus(W_dt dt + b), A, B, C) silu(z).

    dt, B and C are projections of u', with norms of their own where `inner_norms` (Hymba).
    """

    state: int
    taps: int
    rank: int  # of dt
    dtype: Any = jnp.float32
    inner_norms: bool = False
    norm_eps: float = 1e-6
    kernel_init: Any = None  # of the convolution and of x_proj; None: torch's
    impl: str = "auto"

    @nn.compact
    def __call__(
        self,
        u: Float[Array, "b t e"],
        z: Float[Array, "b t e"],
        start: Memory,
        text: Text,
        *,
        step: bool = False,
    ) -> tuple[Float[Array, "b t e"], Memory]:
        """(y, memory after the last valid token). start: of one row for all, or of each.

        step: one token that continues `start`.
        """
        width, n, rank = u.shape[-1], self.state, self.rank
        u, tail = Conv(self.taps, self.kernel_init, name="conv")(u, start.conv, text)
        init = self.kernel_init or uniform(width**-0.5)
        joined = Linear(
            (rank + 2 * n,), ("mlp", None), self.dtype, kernel_init=init, name="x_proj"
        )(u)
        dt, B, C = jnp.split(joined, (rank, rank + n), axis=-1)
        if self.inner_norms:
            dt, B, C = (
                RMSNorm(self.norm_eps, offset=0.0, name=f"{name}_norm")(x)
                for name, x in (("dt", dt), ("B", B), ("C", C))
            )
        init = uniform(rank**-0.5)
        delta = Linear((width,), (None, "mlp"), self.dtype, kernel_init=init, name="dt_proj")(dt)

        def own(name, init, axes, *shape):
            return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

        bias = own("dt_bias", step_bias(), ("mlp",), width)
        A = -jnp.exp(own("A_log", log_counting, ("mlp", "state"), width, n))
        D = own("D", nn.initializers.ones_init(), ("mlp",), width)
        h = jnp.broadcast_to(start.h, (u.shape[0], *start.h.shape[1:]))
        if step:
            y, h = selective_scan_step(
                *(x[:, 0] for x in (u, delta)), A, B[:, 0], C[:, 0], D, h,
                z=z[:, 0], delta_bias=bias, impl=self.impl,
            )  # fmt: skip
            return y[:, None], Memory(tail, h)
        y, h = selective_scan(
            u, delta, A, B, C, D, z=z, delta_bias=bias, h0=h, impl=self.impl,
            segment_ids=text.segment_ids, reset_to=start.h, mask=text.valid,
        )  # fmt: skip
        return y, Memory(tail, h)
