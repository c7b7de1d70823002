"""One token of the mLSTM on Hopper GPUs: one kernel (Pallas Mosaic GPU), which reads each head's
memory once and writes it once.

A block of threads holds a slab [K, 32] of C in registers, 16 bytes of a row a thread, so that all
of it is on its way at once: 128 blocks for one row of xLSTM 7B's 8 heads of 256 x 512. What has no
C in it is O(K) per head; every block computes it again, which costs less than the launches of
kernels of its own.

C is not updated in place. In a scan over layers XLA gives the kernel the slice of one stack to read
and that of another to write; a kernel that wrote where it reads would leave the second one empty.
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
from kernels.linear_attention import State
from kernels.linear_attention.blocks import merge
from kernels.linear_attention.gpu import HOPPER
from kernels.mlstm.ref import EPS

COLUMNS = 32  # of a slab: a row of it is one line of the cache, 128 bytes
ROWS = 16  # of a slab that 128 threads hold with 4 numbers each
MOST_ROWS = 512  # more would not fit the registers
TYPES = {"float32", "bfloat16"}  # of q, k, v
# Of 16 rows each of four warps has four, a row has eight threads, a thread four numbers.
_SLAB = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, COLUMNS), (4, COLUMNS), (4,))), warp_dims=(-5,), lane_dims=(-3, -2),
    vector_dim=-1,
)  # fmt: skip
_ALONG_K, _ALONG_V = _SLAB.reduce(1), _SLAB.reduce(0)


def step(
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h v"],
    i: Float[Array, "b h"],
    f: Float[Array, "b h"],
    state: State,
    *,
    eps: float = EPS,
    interpret: bool = False,
) -> tuple[Float[Array, "b h v"], State]:
    """The reference's step for float32 states and float32 or bfloat16 q, k, v; no gradient.

    interpret: on the CPU, for tests.
    """
    rows, heads, width = q.shape
    out = v.shape[-1]
    if state.C.dtype != jnp.float32 or not {x.dtype.name for x in (q, k, v)} <= TYPES:
        raise NotSupported(
            "mlstm_step on GPU takes float32 states and float32 or bfloat16 q, k, v, not "
            f"{state.C.dtype} and {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if width % ROWS or width > MOST_ROWS or out % COLUMNS:
        raise NotSupported(
            f"mlstm_step on GPU takes keys of a multiple of {ROWS} up to {MOST_ROWS} numbers and "
            f"values of a multiple of {COLUMNS}, not {width} and {out}"
        )
    if not interpret and not dispatch.device_kind().startswith(HOPPER):
        raise NotSupported("mlstm_step on GPU takes Hopper (H100, H200)")
    joined = rows * heads
    call = plgpu.kernel(
        functools.partial(_kernel, width**-0.5, eps),
        kernel_name="mlstm_step",
        out_type=[
            jax.ShapeDtypeStruct((joined, out), v.dtype),
            *(jax.ShapeDtypeStruct((joined, *x.shape[2:]), jnp.float32) for x in state),
        ],
        scratch_types=[plgpu.SMEM((COLUMNS,), v.dtype), plgpu.SMEM((width,), jnp.float32)],
        grid=(joined, out // COLUMNS),
        grid_names=("head", "slab"),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    gates = (x.astype(jnp.float32) for x in (i, f))
    h, *new = call(*map(merge, (q, k, v, *gates, *state)))
    h, *new = (x.reshape(rows, heads, *x.shape[1:]) for x in (h, *new))
    return h, State(*new)


def _kernel(scale, eps, q, k, v, i, f, C, n, m, h_out, C_out, n_out, m_out, h_staged, n_staged):
    head, slab = lax.axis_index("head"), lax.axis_index("slab")
    columns = pl.ds(slab * COLUMNS, COLUMNS)

    def load(ref, layout):
        # "Optimised" loads to registers would have to come from shared memory.
        return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

    def spread(x, axis):
        return lax.broadcast_in_dim(x, old.shape, (axis,))

    old = load(C.at[head, :, columns], _SLAB)  # first: what follows hides behind it
    # log sigmoid(f), written out: the compiler knows no log1p.
    log_f = jnp.minimum(f[head], 0.0) - jnp.log(1.0 + jnp.exp(-jnp.abs(f[head])))
    decayed = log_f + m[head]
    gauge = jnp.maximum(decayed, i[head])
    keep, write = jnp.exp(decayed - gauge), jnp.exp(i[head] - gauge)
    query, key = scale * load(q.at[head], _ALONG_K), write * load(k.at[head], _ALONG_K)
    new = keep * old + spread(key, 0) * spread(load(v.at[head, columns], _ALONG_V), 1)
    C_out.at[head, :, columns][...] = new
    normaliser = keep * load(n.at[head], _ALONG_K) + key
    bound = jnp.maximum(jnp.abs((normaliser * query).sum()), jnp.exp(-gauge)) + eps
    h_staged[...] = ((spread(query, 0) * new).sum(0) / bound).astype(h_staged.dtype)
    n_staged[...] = normaliser
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(h_staged, h_out.at[head, columns])

    @pl.when(slab == 0)
    def _():
        plgpu.copy_smem_to_gmem(n_staged, n_out.at[head])
        m_out[head] = gauge

    plgpu.wait_smem_to_gmem(0)
