"""The selective scan's part of tpu_static and gpu_static, at Hymba 1.5B's sizes."""

import functools

from benchmarks import static

CHANNELS, STATES = 3200, 16


def arrays(device, tokens: int, rows: int = 1):
    """(u, delta, A, B, C, D, z, delta_bias) on an unattached device: bfloat16 per token."""
    import jax
    import jax.numpy as jnp

    place = jax.sharding.SingleDeviceSharding(device)

    def array(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    wide, narrow = array(rows, tokens, CHANNELS), array(rows, tokens, STATES)
    A, D = (array(CHANNELS, *rest, dtype=jnp.float32) for rest in ((STATES,), ()))
    return wide, wide, A, narrow, narrow, D, wide, D


def call(impl: str, chunk=None):
    """y of `arrays`."""
    from kernels.selective_scan import selective_scan

    def run(u, delta, A, B, C, D, z, bias):
        options = dict(z=z, delta_bias=bias, impl=impl, chunk=chunk)
        return selective_scan(u, delta, A, B, C, D, **options)[0]

    return run


def gradient(impl: str, chunk=None):
    """Gradients to all of `arrays` of a sum of y weighted by an array, as in a model."""
    import jax
    import jax.numpy as jnp

    def total(weight, *inputs):
        return (call(impl, chunk)(*inputs).astype(jnp.float32) * weight).sum()

    return jax.grad(total, argnums=tuple(range(1, 9)))


def tpu(topology, device, args) -> static.TpuOp:
    """Forward and gradient of the kernels, and of XLA at two chunks.

    What the mathematics asks of the vector unit per state and token: forward Δ A, Δ u B, a h and a
    sum, for y a product and a sum; backward all that once more, 4 for G and P, and a product and a
    sum for each of du, dΔ, dA, dB, dC. Exponentials are another unit's: one forward, two backward.
    """
    from kernels.selective_scan import tpu as kernel

    inputs = arrays(device, args.tokens)
    tile, width = args.chunk or kernel.TILE, kernel._width(CHANNELS)
    steps = args.tokens // tile * (CHANNELS // width)
    registers = args.tokens * CHANNELS * STATES / 1024
    pairs = tile // kernel.BLOCK // 2

    def each(name, trips, vector, exponentials):
        return static.TpuKernel(
            f"selective_scan_{name}", steps, trips, vector * registers, exponentials * registers
        )

    weighted = (inputs[0], *inputs)
    return static.TpuOp(
        columns=dict(chunk=tile),
        kernels={
            "forward": each("forward", (pairs, pairs), 6, 1),
            "backward": each("backward", (pairs, pairs, pairs), 20, 2),
        },
        programs={
            "forward": static.Program(call("tpu", tile), inputs),
            "forward + backward": static.Program(gradient("tpu", tile), weighted),
        },
        uses={"forward": ("forward",), "forward + backward": ("forward", "backward")},
        xla={
            "forward": {n: static.Program(call("xla", n), inputs) for n in (16, 64)},
            "forward + backward": {
                n: static.Program(gradient("xla", n), weighted) for n in (16, 64)
            },
        },
    )


def _whole(backward: bool, topology, device, args) -> static.GpuProgram:
    """Bytes of a forward: u, Δ, z, y; of a gradient those again and their gradients. 16
    exponentials and 4 special functions of softplus and gate a channel and token, 16 a cycle and
    multiprocessor at 1.755 GHz."""
    inputs, numbers = arrays(device, args.tokens), args.tokens * CHANNELS
    moved, special = (4 + 7 if backward else 4) * 2 * numbers, 16 + 4
    if backward:
        special += 2 * 16 + 6
    rate = 132 * 16 * 1.755e9
    weighted = (inputs[0], *inputs)
    return static.GpuProgram(
        function=gradient("gpu") if backward else call("gpu"),
        arrays=weighted if backward else inputs,
        kernels=["backward", "forward"] if backward else ["forward"],
        columns=dict(
            tokens=args.tokens,
            ms_special_functions=round(numbers * special / rate * 1e3, 3),
            ms_memory=round(moved / topology.chip.hbm_rate * 1e3, 3),
        ),
    )


GPU = {
    "forward": functools.partial(_whole, False),
    "forward + backward": functools.partial(_whole, True),
}
