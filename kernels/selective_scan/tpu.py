"""The selective scan on TPUs: one Pallas (Mosaic) kernel forward, one backward.

Grid (rows, tiles of channels, tiles of tokens), the last in order: the state of a tile's channels
stays in VMEM while its tokens stream through. u, Δ, z are read once and y is written once;
softplus, D u and the gate are in the kernel; no state reaches HBM but those before tiles of 256
tokens, when there is a gradient to come. Backward, the tiles come in reverse: a tile's states are
computed once more from the one before it, into VMEM, then the gradient of the state runs back over
its tokens.

tpu_kernels.py says what is done with a tile. States are padded to 16 (they stay 0), channels to
whole lanes, tokens to whole tiles (Δ = 0 there keeps the state).
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels.errors import NotSupported
from kernels.selective_scan import tpu_kernels
from kernels.selective_scan.ref import Inputs
from kernels.selective_scan.tpu_kernels import BLOCK, LANES, LN2
from kernels.selective_scan.xla import NEVER
from kernels.tpu_call import named_call

TILE = 256  # tokens: what a grid step costs by itself is small beside them
GROUPS = (5, 4, 3, 2, 1)  # registers side by side: 3,200 channels are five tiles of 640
VMEM = 48 * 2**20  # bytes a kernel may take: the backward's states are 10 MiB


class Options(NamedTuple):
    """What is fixed when compiling."""

    tile: int
    width: int
    interpret: bool


def selective_scan(
    inputs: Inputs, *, chunk: int | None = None, interpret: bool = False
) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """The reference's function for float32 and bfloat16.

    chunk: tokens of a tile, a multiple of 128 (of 32 when the row is shorter).
    interpret: on the CPU, for tests.
    """
    dtype = inputs.u.dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotSupported(f"selective_scan on TPU takes float32 or bfloat16, not {dtype}")
    (_, length, channels), states = inputs.u.shape, inputs.A.shape[1]
    tile = chunk or min(TILE, length + -length % (2 * BLOCK if length <= LANES else LANES))
    if tile % (2 * BLOCK) or (tile > LANES and tile % LANES):
        raise NotSupported(
            f"selective_scan on TPU needs a chunk of 32, 64, 96 or a multiple of 128, not {tile}"
        )
    width = tile_width(channels)
    y, h = _scan(Options(tile, width, interpret), _padded(inputs, tile, width))
    return y[:, :length, :channels], jnp.swapaxes(h, 1, 2)[:, :channels, :states]


def tile_width(channels: int) -> int:
    """Channels of a tile: the widest of those that pad least."""
    groups = -(-channels // LANES)
    return LANES * min(GROUPS, key=lambda g: (groups + -groups % g, -g))


def _padded(inputs: Inputs, tile: int, width: int) -> Inputs:
    """Whole tiles; states before channels."""

    def pad(x, *multiples, fill=0.0):
        if x is None:
            return None
        more = [(0, -size % m) for size, m in zip(x.shape, multiples, strict=True)]
        return jnp.pad(x, more, constant_values=fill)

    tokens, narrow = (1, tile, width), (1, tile, 16)
    swap = lambda x: jnp.swapaxes(x, -1, -2)  # noqa: E731
    fresh = inputs.fresh
    return Inputs(
        pad(inputs.u, *tokens),
        pad(inputs.delta, *tokens, fill=NEVER),
        pad(inputs.B.astype(jnp.float32), *narrow),
        pad(inputs.C.astype(jnp.float32), *narrow),
        pad(inputs.z, *tokens),
        None if fresh is None else pad(fresh.astype(jnp.int32), 1, tile, fill=0),
        pad(swap(inputs.A), 16, width),
        pad(inputs.D, width),
        pad(inputs.bias, width),
        pad(swap(inputs.h0), 1, 16, width),
        pad(swap(inputs.reset), 1, 16, width),
    )


class _Plan(NamedTuple):
    """Sizes of one call; block specs of every kind of array."""

    rows: int
    length: int
    channels: int
    states: int
    tile: int
    width: int
    reverse: bool

    @property
    def grid(self):
        return self.rows, self.channels // self.width, self.length // self.tile

    def _at(self, t):
        return self.grid[2] - 1 - t if self.reverse else t

    def tokens(self):
        """[rows, T, E]."""
        return pl.BlockSpec((None, self.tile, self.width), lambda b, e, t: (b, self._at(t), e))

    def columns(self):
        """[rows, T / 128, N, 128], or of one short tile [rows, 1, N, 128]."""
        shape = (None, -(-self.tile // LANES), self.states, LANES)
        return pl.BlockSpec(shape, lambda b, e, t: (b, self._at(t), 0, 0))

    def flags(self):
        """[rows, 1, T], numbers that decide and are not computed with."""
        return pl.BlockSpec(
            (None, 1, self.tile), lambda b, e, t: (b, 0, self._at(t)), memory_space=pltpu.SMEM
        )

    def weight(self, rows: int):
        """[rows, E]."""
        return pl.BlockSpec((rows, self.width), lambda b, e, t: (0, e))

    def state(self, rows: int, shared=False):
        """[rows, N or 1, E]: stays in VMEM while tokens stream through."""
        return pl.BlockSpec((None, rows, self.width), lambda b, e, t: (0 if shared else b, 0, e))

    def boundary(self):
        """[rows, tiles, N, E]."""
        return pl.BlockSpec(
            (None, None, self.states, self.width), lambda b, e, t: (b, self._at(t), 0, e)
        )

    def partial(self):
        """[rows, tiles of channels, T / BLOCK, BLOCK * N]."""
        shape = (None, None, self.tile // BLOCK, BLOCK * self.states)
        return pl.BlockSpec(shape, lambda b, e, t: (b, e, self._at(t), 0))

    def scratch(self, dtype) -> dict:
        """What both kernels keep in VMEM."""
        groups, block = self.width // LANES, BLOCK * self.states
        rows = pltpu.VMEM((groups, self.tile, LANES), jnp.float32)
        matrices = pltpu.VMEM((self.tile, block), dtype)
        buffer = pltpu.VMEM((groups, block, LANES), dtype)
        return dict(step=rows, input=rows, readers=matrices, even=buffer, odd=buffer)


def _plan(options: Options, inputs: Inputs, reverse=False) -> _Plan:
    rows, length, channels = inputs.u.shape
    states = inputs.A.shape[0]
    return _Plan(rows, length, channels, states, options.tile, options.width, reverse)


def _call(kernel, options, plan: _Plan, inputs: Mapping, outputs: Mapping, scratch: Mapping, work):
    """One named_call; work: (FLOPs, exponentials)."""
    flops, exponentials = work
    return named_call(
        functools.partial(kernel, plan.tile, not options.interpret),
        f"selective_scan_{kernel.__name__}",
        plan.grid,
        inputs,
        outputs,
        scratch,
        flops=flops,
        exponentials=exponentials,
        vmem=VMEM,
        interpret=options.interpret,
    )


def _shape(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _columns(x, tile: int):
    """[b, t, n] -> [b, t / 128, n, 128]; tiles of fewer tokens are padded."""
    rows, _, states = x.shape
    x = jnp.pad(x.reshape(rows, -1, tile, states), ((0, 0), (0, 0), (0, -tile % LANES), (0, 0)))
    return jnp.swapaxes(x.reshape(rows, -1, LANES, states), 2, 3)


def _given(plan: _Plan, inputs: Inputs) -> dict:
    """What both kernels read: {name: (array, spec)}."""
    u, delta, B, C, z, fresh, A, D, bias, h0, reset = inputs
    given = dict(
        u=(u, plan.tokens()),
        delta=(delta, plan.tokens()),
        B=(_columns(B, plan.tile), plan.columns()),
        C=(_columns(C, plan.tile), plan.columns()),
        A=(A / LN2, plan.weight(plan.states)),
        D=(D[None], plan.weight(1)),
        bias=(bias[None], plan.weight(1)),
    )
    if z is not None:
        given["z"] = z, plan.tokens()
    if fresh is not None:
        given["fresh"] = fresh[:, None], plan.flags()
        given["reset"] = reset, plan.state(plan.states, shared=reset.shape[0] == 1)
    return given


def _work(plan: _Plan, products: int, exponentials: int, operations: int) -> tuple[int, int]:
    """(FLOPs, exponentials): per token and channel, of its states, and of a block's products."""
    states = plan.rows * plan.length * plan.channels * plan.states
    return states * (2 * BLOCK * products + operations), states * exponentials


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options, inputs: Inputs):
    return _run(options, inputs, False)[0]


# Jitted, so that a model traces the kernel once and not for every layer: with its tokens spelled
# out that takes seconds.
@functools.partial(jax.jit, static_argnums=(0, 2))
def _run(options, inputs: Inputs, keep: bool):
    """((y, last state), states before every tile)."""
    plan, h0 = _plan(options, inputs), inputs.h0
    given = _given(plan, inputs) | dict(h0=(h0, plan.state(plan.states)))
    u, state = inputs.u, (_shape(*h0.shape), plan.state(plan.states))
    outputs = dict(y=(_shape(*u.shape, dtype=u.dtype), plan.tokens()), h=state)
    if keep:
        before = _shape(plan.rows, plan.grid[2], *h0.shape[1:])
        outputs["before"] = before, plan.boundary()
    work = _work(plan, products=1, exponentials=1, operations=4)
    scratch = plan.scratch(u.dtype)
    found = _call(tpu_kernels.forward, options, plan, given, outputs, scratch, work)
    return (found["y"], found["h"]), found.get("before")


def _forward(options, inputs):
    out, before = _run(options, inputs, True)
    return out, (inputs, before)


@functools.partial(jax.jit, static_argnums=0)
def _backward(options, residuals, cotangents):
    inputs, before = residuals
    dy, dh = cotangents
    plan = _plan(options, inputs, reverse=True)
    rows, tiles, _ = plan.grid
    u, N, E = inputs.u, plan.states, plan.channels
    given = _given(plan, inputs) | dict(
        dout=(dy, plan.tokens()),
        before=(before, plan.boundary()),
        dh_last=(dh, plan.state(N)),
    )

    def tokens(x):
        return _shape(*x.shape, dtype=x.dtype), plan.tokens()

    parts = _shape(rows, tiles, plan.length // BLOCK, BLOCK * N), plan.partial()
    state, weight = (_shape(rows, N, E), plan.state(N)), (_shape(rows, 1, E), plan.state(1))
    outputs = dict(du=tokens(u), ddelta=tokens(inputs.delta), dB=parts, dC=parts)
    outputs |= dict(dA=state, dD=weight, dbias=weight, dh=state)
    if inputs.z is not None:
        outputs["dz"] = tokens(inputs.z)
    if inputs.fresh is not None:
        outputs["dreset"] = state
    scratch = plan.scratch(u.dtype)
    groups = plan.width // LANES
    scratch |= dict(dy=scratch["step"], writers=scratch["readers"])
    scratch |= {"G even": scratch["even"], "G odd": scratch["odd"]}
    scratch["states"] = pltpu.VMEM((groups, (plan.tile + 1) * N, LANES), jnp.float32)
    for name in ("bias parts", "D parts"):
        scratch[name] = pltpu.VMEM((plan.tile // BLOCK, plan.width), jnp.float32)
    work = _work(plan, products=5, exponentials=2, operations=13)
    found = _call(tpu_kernels.backward, options, plan, given, outputs, scratch, work)
    dB, dC = (found[name].sum(1).reshape(rows, plan.length, N) for name in ("dB", "dC"))
    dreset = jnp.zeros_like(inputs.reset)
    if inputs.fresh is not None:
        dreset = found["dreset"]
        dreset = dreset.sum(0, keepdims=True) if inputs.reset.shape[0] == 1 else dreset
    dA, dD, dbias = (found[name].sum(0) for name in ("dA", "dD", "dbias"))
    grads = (found["du"], found["ddelta"], dB, dC, found.get("dz"), None)
    return (Inputs(*grads, dA, dD[0], dbias[0], found["dh"], dreset),)


_scan.defvjp(_forward, _backward)
