"""The mLSTM's part of tpu_static and gpu_static, at xLSTM 7B's head sizes."""

import functools
import math
import re

from benchmarks import static

CHUNK = 256  # of the TPU kernels
LAYERS = 32  # of xLSTM 7B


def tpu(topology, device, args) -> static.TpuOp:
    """Forward and gradient of the kernels, and of XLA at three chunks."""
    import jax
    import jax.numpy as jnp

    from kernels.mlstm import mlstm

    chunk = args.chunk or CHUNK
    array, inputs = static.mlstm_7b(device, args.tokens)
    b, h, t, _ = inputs[0].shape
    weighted = (array(*inputs[2].shape), *inputs)

    def forward(impl, size):
        return static.Program(lambda *x: mlstm(*x, impl=impl, chunk=size)[0], inputs)

    def gradient(impl, size):
        # Of a weighted sum, so that the gradient of h is an array as in a model.
        def total(weight, *x):
            return (mlstm(*x, impl=impl, chunk=size)[0].astype(jnp.float32) * weight).sum()

        return static.Program(jax.grad(total, argnums=(1, 2, 3, 4, 5)), weighted)

    names = ("forward", "states", "backward")
    kernel = functools.partial(static.TpuKernel, steps=b * h * t // chunk)
    return static.TpuOp(
        columns=dict(chunk=chunk),
        kernels={name: kernel(f"mlstm_{name}") for name in names},
        programs={
            "forward": forward("tpu", chunk),
            "forward + backward": gradient("tpu", chunk),
        },
        uses={"forward": names[:1], "forward + backward": names},
        xla={
            "forward": {size: forward("xla", size) for size in (64, 128, 256)},
            "forward + backward": {size: gradient("xla", size) for size in (64, 128, 256)},
        },
    )


def _whole(backward: bool, topology, device, args) -> static.GpuProgram:
    import jax
    import jax.numpy as jnp

    from kernels.mlstm import mlstm

    _, inputs = static.mlstm_7b(device, args.tokens)
    (b, h, t, k), v, length = inputs[0].shape, inputs[2].shape[3], 128

    def loss(*x):
        return (mlstm(*x, impl="gpu")[0].astype(jnp.float32) ** 2).sum()

    # Per token and head: products of 2 FLOPs; half of the scores are never needed.
    scores, values, memory = length * k, length * v, k * v
    flops, moved = scores + values + 4 * memory, 2 * (2 * k + 2 * v)
    if backward:
        flops += 3 * scores + 3 * values + 10 * memory
        moved += 2 * (4 * k + 3 * v)
    chip = topology.chip
    return static.GpuProgram(
        function=jax.grad(loss, argnums=(0, 1, 2, 3, 4)) if backward else loss,
        arrays=inputs,
        # C is computed again for the gradient.
        kernels=["C", "C", "dC", "dk", "dq", "dv", "h"] if backward else ["C", "h"],
        columns=dict(
            tokens=t,
            ms_matrix_unit=round(b * h * t * flops / chip.peak * 1e3, 3),
            ms_memory=round(b * h * t * moved / chip.hbm_rate * 1e3, 3),
        ),
    )


def _step(topology, device, args) -> static.GpuProgram:
    """One token of one row: the least that has to be moved."""
    from kernels.mlstm import mlstm_step

    inputs = _token(device, 1)
    heads, k, v = inputs[-1].C.shape[1:]
    moved = 2 * 4 * heads * k * v
    seconds = moved / topology.chip.hbm_rate
    return static.GpuProgram(
        function=functools.partial(mlstm_step, impl="gpu"),
        arrays=inputs,
        kernels=["step"],
        columns=dict(bytes_per_head=moved // heads, ms_memory=round(seconds * 1e3, 4)),
        temporaries=False,
    )


GPU = {
    "forward": functools.partial(_whole, False),
    "forward + backward": functools.partial(_whole, True),
    "step": _step,
}


def _token(device, rows: int, *layers: int):
    """(q, k, v, i, f, state) of one token, the state for each layer."""
    import jax.numpy as jnp

    from kernels.mlstm import State

    array, inputs = static.mlstm_7b(device, 1)
    heads, k, v = inputs[0].shape[1], inputs[0].shape[3], inputs[2].shape[3]
    inputs = (array(rows, heads, *x.shape[3:], dtype=x.dtype) for x in inputs)
    lead = (*layers, rows, heads)
    state = (array(*lead, *rest, dtype=jnp.float32) for rest in ((k, v), (k,), ()))
    return *inputs, State(*state)


def gpu_rows(topology, device, args) -> list[dict]:
    """Passes over C, alone and in a scan over layers with donated states, as models call it."""
    import jax

    from benchmarks.gpu_static import passes
    from kernels.mlstm import mlstm_step

    def layers(impl, q, k, v, i, f, states):
        return jax.lax.scan(lambda v, s: mlstm_step(q, k, v, i, f, s, impl=impl), v, states)

    found = []
    for rows in (1, 8):
        one, stack = _token(device, rows), _token(device, rows, LAYERS)
        size = math.prod(one[-1].C.shape)
        for impl in ("xla", "gpu"):
            call = functools.partial(mlstm_step, impl=impl)
            alone = static.compile_gpu(topology, device, call, *one).as_text()
            launches = len(
                re.findall(r" (?:fusion|custom-call|copy)\(", alone[alone.index("ENTRY") :])
            )
            call = functools.partial(layers, impl)
            scan = static.compile_gpu(topology, device, call, *stack, donate=5).as_text()
            inside, around = passes(scan, size, LAYERS)
            row = dict(program="step", rows=rows, impl=impl, launches=launches)
            row |= dict(passes=sum(passes(alone, size)), passes_in_scan=inside)
            found.append(row | dict(passes_around_scan=around))
    return found
