"""SSD's part of tpu_static and gpu_static, at Mamba-2 1.3B's sizes: 64 heads of 64, states of 128,
one group."""

import functools

from benchmarks import static

CHUNK = 256  # of the TPU kernels
HEADS, WIDTH, STATES = 64, 64, 128
LAYERS = 48


def arrays(device, rows: int, *tokens: int, layers: tuple[int, ...] = ()):
    """(x, delta, A, B, C, D, z, delta_bias, h) on an unattached device: bfloat16 per token, x and z
    with their heads in one axis, as projections give them."""
    import jax
    import jax.numpy as jnp

    place = jax.sharding.SingleDeviceSharding(device)

    def array(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    lead = (rows, *tokens)
    wide, shared = array(*lead, HEADS * WIDTH), array(*lead, 1, STATES)
    weight = array(HEADS, dtype=jnp.float32)
    h = array(*layers, rows, HEADS, WIDTH, STATES, dtype=jnp.float32)
    return wide, array(*lead, HEADS), weight, shared, shared, weight, wide, weight, h


def call(impl: str, chunk=None):
    """y of `arrays` from an empty state."""
    from kernels.ssd import ssd

    def run(x, delta, A, B, C, D, z, bias, h):
        heads = (*x.shape[:2], HEADS, WIDTH)
        options = dict(z=z.reshape(heads), delta_bias=bias, impl=impl, chunk=chunk)
        return ssd(x.reshape(heads), delta, A, B, C, D, **options)[0].reshape(x.shape)

    return run


def gradient(impl: str, chunk=None):
    """Gradients to all of `arrays` of a sum of y weighted by an array, as in a model."""
    import jax
    import jax.numpy as jnp

    def total(weight, *inputs):
        return (call(impl, chunk)(*inputs).astype(jnp.float32) * weight).sum()

    return jax.grad(total, argnums=tuple(range(1, 9)))


def tpu(topology, device, args) -> static.TpuOp:
    """Forward and gradient of the kernels, and of XLA at two chunks."""
    from kernels.linear_attention.tpu import packing

    chunk, inputs = args.chunk or CHUNK, arrays(device, 1, args.tokens)
    weighted = (inputs[0], *inputs)
    names = ("forward", "states", "backward")
    visits = HEADS // packing(1, HEADS, WIDTH)[0]
    kernel = functools.partial(static.TpuKernel, steps=visits * args.tokens // chunk)
    return static.TpuOp(
        columns=dict(chunk=chunk),
        kernels={name: kernel(f"ssd_{name}") for name in names},
        programs={
            "forward": static.Program(call("tpu", chunk), inputs),
            "forward + backward": static.Program(gradient("tpu", chunk), weighted),
        },
        uses={"forward": names[:1], "forward + backward": names},
        xla={
            "forward": {n: static.Program(call("xla", n), inputs) for n in (128, 256)},
            "forward + backward": {
                n: static.Program(gradient("xla", n), weighted) for n in (128, 256)
            },
        },
    )


def _whole(backward: bool, topology, device, args) -> static.GpuProgram:
    """Limits of what has to be computed: heads of 64, scores once for the group, half of them."""
    inputs, chunk = arrays(device, 1, args.tokens), 128
    scores, values, memory = chunk * STATES, HEADS * chunk * WIDTH, HEADS * STATES * WIDTH
    flops, moved = scores + values + 4 * memory, 2 * (2 * STATES + 3 * HEADS * WIDTH)
    if backward:
        flops += 3 * scores + 3 * values + 10 * memory
        moved += 2 * (4 * STATES + 5 * HEADS * WIDTH)
    weighted = (inputs[0], *inputs)
    return static.GpuProgram(
        function=gradient("gpu") if backward else call("gpu"),
        arrays=weighted if backward else inputs,
        # The memory is computed again for the gradient.
        kernels=["C", "C", "dC", "dk", "dq", "dv", "h"] if backward else ["C", "h"],
        columns=dict(
            tokens=args.tokens,
            ms_matrix_unit=round(args.tokens * flops / topology.chip.peak * 1e3, 3),
            ms_memory=round(args.tokens * moved / topology.chip.hbm_rate * 1e3, 3),
        ),
    )


GPU = {
    "forward": functools.partial(_whole, False),
    "forward + backward": functools.partial(_whole, True),
}


def gpu_rows(topology, device, args) -> list[dict]:
    """Passes of XLA's step over the state, alone and in a scan over layers with donated states."""
    import jax

    from benchmarks.gpu_static import passes
    from kernels.ssd import ssd_step

    def step(x, delta, A, B, C, D, z, bias, h):
        heads = (*x.shape[:1], HEADS, WIDTH)
        options = dict(z=z.reshape(heads), delta_bias=bias, impl="xla")
        y, h = ssd_step(x.reshape(heads), delta, A, B, C, D, h, **options)
        return y.reshape(x.shape), h

    def layers(*inputs):
        *token, states = inputs
        return jax.lax.scan(lambda x, h: step(x, *token[1:], h), token[0], states)

    found = []
    for rows in (1, 8):
        size = rows * HEADS * WIDTH * STATES
        alone = static.compile_gpu(topology, device, step, *arrays(device, rows)).as_text()
        stack = arrays(device, rows, layers=(LAYERS,))
        scan = static.compile_gpu(topology, device, layers, *stack, donate=8).as_text()
        inside, around = passes(scan, size, LAYERS)
        row = dict(program="step", rows=rows, impl="xla", passes=sum(passes(alone, size)))
        found.append(row | dict(passes_in_scan=inside, passes_around_scan=around))
    return found
