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
    """Forward and gradient of the kernels, and of XLA at the chunk that it takes by itself.

    What the mathematics asks of the vector unit per state and token: forward Δ A, Δ u B, a h and a
    sum, for y a product and a sum; backward all that once more, 4 for G and P, and a product and a
    sum for each of du, dΔ, dA, dB, dC. Exponentials are another unit's: one forward, two backward.
    """
    from kernels.selective_scan import tpu as kernel

    inputs = arrays(device, args.tokens)
    tile, width = args.chunk or kernel.TILE, kernel.tile_width(CHANNELS)
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
            "forward": {n: static.Program(call("xla", n), inputs) for n in (64,)},
            "forward + backward": {n: static.Program(gradient("xla", n), weighted) for n in (64,)},
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


def _token(device, rows: int):
    """(u, delta, A, B, C, D, z, bias) of one token."""
    import jax

    def one(x):
        shape = (rows, x.shape[2]) if x.ndim == 3 else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

    return [one(x) for x in arrays(device, 1)]


def _states(like, *lead: int):
    import jax
    import jax.numpy as jnp

    shape = (*lead, CHANNELS, STATES)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=like.sharding)


def _step_call(impl: str, u, delta, A, B, C, D, z, bias, h):
    from kernels.selective_scan import selective_scan_step

    return selective_scan_step(u, delta, A, B, C, D, h, z=z, delta_bias=bias, impl=impl)


def _step(topology, device, args) -> static.GpuProgram:
    """One token of one row: A and the state in, the state out."""
    inputs = _token(device, 1)
    moved = 3 * 4 * CHANNELS * STATES
    return static.GpuProgram(
        function=functools.partial(_step_call, "gpu"),
        arrays=[*inputs, _states(inputs[0], 1)],
        kernels=["step"],
        columns=dict(ms_memory=round(moved / topology.chip.hbm_rate * 1e3, 5)),
        temporaries=False,
    )


def gpu_rows(topology, device, args) -> list[dict]:
    """Passes over the states in a scan over layers, as models call the step; 8 rows, so that no
    other array has their size."""
    import jax

    from benchmarks.gpu_static import passes

    layers, rows, found = 32, 8, []
    u, delta, A, B, C, D, z, bias = _token(device, rows)
    weights, states = _states(u, layers), _states(u, layers, rows)

    for impl in ("xla", "gpu"):

        def whole(u, A, h, *others, impl=impl):
            delta, B, C, D, z, bias = others

            def body(u, layer):
                return _step_call(impl, u, delta, layer[0], B, C, D, z, bias, layer[1])

            return jax.lax.scan(body, u, (A, h))

        given = (u, weights, states, delta, B, C, D, z, bias)
        text = static.compile_gpu(topology, device, whole, *given, donate=2).as_text()
        inside, around = passes(text, rows * CHANNELS * STATES, layers)
        row = dict(program="step", rows=rows, impl=impl, passes_in_scan=inside)
        found.append(row | dict(passes_around_scan=around))
    return found


GPU = {
    "forward": functools.partial(_whole, False),
    "forward + backward": functools.partial(_whole, True),
    "step": _step,
}
