"""The selective scan on Hopper GPUs: one Pallas (Mosaic GPU) kernel forward, one backward.

A block of threads takes 32 channels of a row, all its tokens: 100 blocks for one row of Hymba's
3,200 channels. Softplus, D u and the gate are in the kernel; of the states only those before tiles
of 64 tokens reach the device's memory, when there is a gradient to come. Backward a tile's states
are computed once more, into shared memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels import dispatch
from kernels.errors import NotSupported
from kernels.selective_scan import gpu_kernels
from kernels.selective_scan.gpu_kernels import CHANNELS, LN2, SLOTS, STATES, TILE, Options
from kernels.selective_scan.ref import Inputs
from kernels.selective_scan.xla import NEVER

HOPPER = ("NVIDIA H100", "NVIDIA H20", "NVIDIA GH200")
TYPES = {"float32", "bfloat16"}


def selective_scan(
    inputs: Inputs, *, chunk: int | None = None, interpret: bool = False
) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """The reference's function for float32 and bfloat16 and up to 16 states.

    chunk: 64 is the only one. interpret: on the CPU, for tests.
    """
    types = {x.dtype.name for x in inputs[:5] if x is not None}
    if not types <= TYPES or inputs.wide != jnp.float32:
        raise NotSupported(f"selective_scan on GPU takes float32 or bfloat16, not {types}")
    if not interpret and not dispatch.device_kind().startswith(HOPPER):
        raise NotSupported("selective_scan on GPU takes Hopper (H100, H200): TMA is of no older")
    if chunk not in (None, TILE):
        raise NotSupported(f"selective_scan on GPU has chunks of {TILE}, not {chunk}")
    (_, length, channels), states = inputs.u.shape, inputs.A.shape[1]
    if states > STATES:
        raise NotSupported(f"selective_scan on GPU takes up to {STATES} states, not {states}")
    y, h = _scan(interpret, _padded(inputs))
    return y[:, :length, :channels], h[:, :channels, :states]


def _padded(inputs: Inputs) -> Inputs:
    """Whole tiles of tokens (Δ = 0 there keeps the state) and channels, 16 states."""

    def pad(x, *multiples, fill=0):
        if x is None:
            return None
        more = [(0, -size % m) for size, m in zip(x.shape, multiples, strict=True)]
        return jnp.pad(x, more, constant_values=fill)

    tokens, narrow, state = (1, TILE, CHANNELS), (1, TILE, STATES), (CHANNELS, STATES)
    fresh = inputs.fresh
    return Inputs(
        pad(inputs.u, *tokens),
        pad(inputs.delta, *tokens, fill=NEVER),
        pad(inputs.B, *narrow),
        pad(inputs.C, *narrow),
        pad(inputs.z, *tokens),
        None if fresh is None else pad(fresh.astype(jnp.int32), 1, TILE),
        pad(inputs.A, *state),
        pad(inputs.D, CHANNELS),
        pad(inputs.bias, CHANNELS),
        pad(inputs.h0, 1, *state),
        pad(inputs.reset, 1, *state),
    )


def _options(inputs: Inputs, interpret: bool, keep=False) -> Options:
    packed = inputs.fresh is not None
    return Options(inputs.z is not None, packed, keep, inputs.reset.shape[0] == 1, interpret)


def _call(kernel, options: Options, inputs: Inputs, extra, outputs, scratch):
    """plgpu.kernel over rows and blocks of channels."""
    rows, length, channels = inputs.u.shape
    given = [inputs.u, inputs.delta, inputs.B, inputs.C, inputs.A / LN2, inputs.D, inputs.bias]
    given += [*extra]
    given += [inputs.z] if options.gated else []
    given += [inputs.fresh, inputs.reset] if options.packed else []
    return plgpu.kernel(
        functools.partial(kernel, options, length),
        kernel_name=f"selective_scan_{kernel.__name__}",
        out_type=outputs,
        scratch_types=[scratch],
        grid=(rows, channels // CHANNELS),
        grid_names=("row", "block"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if options.interpret else None,
    )(*given)


def _streams(inputs: Inputs, slots: int, *more):
    """Shared memory for the tiles that TMA brings."""
    wide, narrow = (slots, TILE, CHANNELS), (slots, TILE, STATES)
    arrays = [inputs.u, inputs.delta, inputs.B, inputs.C, inputs.z, *more]
    return tuple(
        plgpu.SMEM(narrow if x is inputs.B or x is inputs.C else wide, x.dtype)
        for x in arrays
        if x is not None
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(interpret, inputs: Inputs):
    return _run(interpret, inputs, False)[0]


# Jitted, so that a model traces the kernel once and not for every layer.
@functools.partial(jax.jit, static_argnums=(0, 2))
def _run(interpret, inputs: Inputs, keep: bool):
    """((y, last state), states before every tile)."""
    options = _options(inputs, interpret, keep)
    u, state = inputs.u, inputs.h0.shape
    outputs = [
        jax.ShapeDtypeStruct(u.shape, u.dtype),
        jax.ShapeDtypeStruct(state, jnp.float32),
    ]
    if keep:
        tiles = u.shape[1] // TILE
        outputs.append(jax.ShapeDtypeStruct((state[0], tiles, *state[1:]), jnp.float32))
    streams = _streams(inputs, SLOTS)
    rows = plgpu.SMEM((TILE, CHANNELS), jnp.float32)
    staged = plgpu.SMEM((TILE, CHANNELS), u.dtype)
    full = plgpu.Barrier(num_arrivals=len(streams), num_barriers=SLOTS)
    scratch = (streams, rows, rows, rows, staged, full)
    y, h, *before = _call(gpu_kernels.forward, options, inputs, [inputs.h0], outputs, scratch)
    return (y, h), before


def _forward(interpret, inputs):
    out, before = _run(interpret, inputs, True)
    return out, (inputs, *before)


@functools.partial(jax.jit, static_argnums=0)
def _backward(interpret, residuals, cotangents):
    inputs, before = residuals
    dy, dh = cotangents
    options, u, state = _options(inputs, interpret), inputs.u, inputs.h0.shape
    rows, length, channels = u.shape
    shape = jax.ShapeDtypeStruct
    partial = shape((rows, channels // CHANNELS, length, STATES), jnp.float32)
    weight = shape((rows, channels), jnp.float32)
    outputs = [shape(x.shape, x.dtype) for x in (u, inputs.delta)]
    outputs += [partial, partial, shape(state, jnp.float32), weight, weight]
    outputs += [shape(state, jnp.float32)]
    outputs += [shape(u.shape, inputs.z.dtype)] if options.gated else []
    outputs += [shape(state, jnp.float32)] if options.packed else []
    narrow = all(x is None or x.dtype.itemsize == 2 for x in inputs[:5])
    slots = SLOTS if narrow else 1
    streams = _streams(inputs, slots, dy)
    row = plgpu.SMEM((TILE, CHANNELS), jnp.float32)
    scratch = (
        *(streams, row, row, row, row, row),
        plgpu.SMEM((TILE + 1, CHANNELS, STATES), jnp.float32),
        plgpu.SMEM((2, TILE, STATES), jnp.float32),
        plgpu.SMEM((2, CHANNELS), jnp.float32),
        plgpu.Barrier(num_arrivals=len(streams), num_barriers=slots),
    )
    extra = [dy, before, dh]
    found = _call(gpu_kernels.backward, options, inputs, extra, outputs, scratch)
    du, ddelta, dB, dC, dA, dD, dbias, dh, *more = found
    dz = more.pop(0) if options.gated else None
    dreset = more.pop(0) if options.packed else jnp.zeros_like(inputs.reset)
    if options.packed and inputs.reset.shape[0] == 1:
        dreset = dreset.sum(0, keepdims=True)
    dB, dC = (d.sum(1).astype(x.dtype) for d, x in ((dB, inputs.B), (dC, inputs.C)))
    tokens = (du, ddelta, dB, dC, dz, None)
    return (Inputs(*tokens, dA.sum(0), dD.sum(0), dbias.sum(0), dh, dreset),)


_scan.defvjp(_forward, _backward)
