"""One token of the selective scan on Hopper GPUs: one kernel (Pallas Mosaic GPU), which reads each
state once and writes it once. XLA takes two or three kernels and, in a scan over layers, reads the
states twice.

As kernels/mlstm/gpu_step.py says, a kernel in such a scan cannot work in place.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels import dispatch
from kernels.errors import NotSupported
from kernels.selective_scan import gpu_kernels
from kernels.selective_scan.gpu import HOPPER, TYPES
from kernels.selective_scan.gpu_kernels import CHANNELS, STATES


def step(
    u: Float[Array, "b e"],
    delta: Float[Array, "b e"],
    B: Float[Array, "b n"],
    C: Float[Array, "b n"],
    z: Float[Array, "b e"] | None,
    A: Float[Array, "e n"],
    D: Float[Array, " e"],
    bias: Float[Array, " e"],
    h: Float[Array, "b e n"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "b e"], Float[Array, "b e n"]]:
    """The reference's step for float32 states; no gradient. interpret: on the CPU, for tests."""
    rows, channels, states = h.shape
    types = {x.dtype.name for x in (u, delta, B, C, z) if x is not None}
    if h.dtype != jnp.float32 or not types <= TYPES:
        raise NotSupported(
            "selective_scan_step on GPU takes float32 states and float32 or bfloat16 tokens, not "
            f"{h.dtype} and {', '.join(sorted(types))}"
        )
    if states != STATES or channels % CHANNELS:
        raise NotSupported(
            f"selective_scan_step on GPU takes {STATES} states and a multiple of {CHANNELS} "
            f"channels, not {states} and {channels}"
        )
    if not interpret and not dispatch.device_kind().startswith(HOPPER):
        raise NotSupported("selective_scan_step on GPU takes Hopper (H100, H200)")
    call = plgpu.kernel(
        functools.partial(_kernel, z is not None),
        kernel_name="selective_scan_step",
        out_type=[
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct(h.shape, h.dtype),
        ],
        scratch_types=[plgpu.SMEM((CHANNELS,), u.dtype)],
        grid=(rows, channels // CHANNELS),
        grid_names=("row", "block"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    gate = () if z is None else (z,)
    y, h = call(u, delta, B, C, A, D, bias, h, *gate)
    return y, h


def _kernel(gated, u, delta, B, C, A, D, bias, h, *refs):
    z, (y, h_out, staged) = refs[0] if gated else None, refs[gated:]
    row, first = lax.axis_index("row"), lax.axis_index("block") * CHANNELS
    mine = pl.ds(first, CHANNELS)
    state, channel, of_states = gpu_kernels.LAYOUTS

    def spread(x, axis):
        return lax.broadcast_in_dim(x, (CHANNELS, STATES), (axis,))

    load = gpu_kernels.load
    old = load(h.at[row, mine], state)  # first: what follows hides behind it
    u = load(u.at[row, mine], channel)
    wide = gpu_kernels.softplus(load(delta.at[row, mine], channel) + load(bias.at[mine], channel))
    written = spread(wide * u, 0) * spread(load(B.at[row], of_states), 1)
    new = jnp.exp(spread(wide, 0) * load(A.at[mine], state)) * old + written
    h_out.at[row, mine][...] = new
    out = (spread(load(C.at[row], of_states), 1) * new).sum(1) + load(D.at[mine], channel) * u
    if gated:
        gate = load(z.at[row, mine], channel)
        out = out * gate * gpu_kernels.sigmoid(gate)
    staged[...] = out.astype(staged.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, y.at[row, mine])
    plgpu.wait_smem_to_gmem(0)
