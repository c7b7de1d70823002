"""Attention's part of tpu_static: splash attention at Hymba 1.5B's heads, `args.tokens` tokens
behind 128 meta tokens, in its local layers and in its global ones. What runs on GPUs is cuDNN's,
which no compiler here shows."""

import functools

from benchmarks import static

HEADS = ((25, 64), (5, 64), (5, 128))  # of q, k, v: how many, how wide
META, WINDOW = 128, 1025


def arrays(device, tokens: int):
    """q, k, v of one row on an unattached device, bfloat16."""
    import jax
    import jax.numpy as jnp

    place = jax.sharding.SingleDeviceSharding(device)
    return [
        jax.ShapeDtypeStruct((1, META + tokens, *x), jnp.bfloat16, sharding=place) for x in HEADS
    ]


def tpu(window: int | None, topology, device, args) -> static.TpuOp:
    """Forward and gradient of the kernels, and of XLA at three sizes of blocks. Grid steps are
    those that multiply; those of blocks outside of the mask do nothing and are left out."""
    import jax
    import jax.numpy as jnp

    from kernels.attention import MaskSpec, xla
    from kernels.attention import tpu as kernels

    mask = MaskSpec(window=window, always_visible=META if window else 0)
    inputs = arrays(device, args.tokens)
    options = dict(scale=HEADS[0][1] ** -0.5, softcap=None)

    def run(size, q, k, v):
        if size:
            return xla.attention(q, k, v, mask, **options, chunk=size)
        return kernels.attention(q, k, v, mask, **options)

    def forward(size):
        return static.Program(functools.partial(run, size), inputs)

    def gradient(size):
        # Of a weighted sum, so that the gradient of the result is an array as in a model.
        def total(weight, *x):
            return (run(size, *x).astype(jnp.float32) * weight).sum()

        weight = jax.ShapeDtypeStruct(
            (*inputs[0].shape[:3], HEADS[2][1]), jnp.bfloat16, sharding=inputs[0].sharding
        )
        return static.Program(jax.grad(total, argnums=(1, 2, 3)), (weight, *inputs))

    block = kernels.BLOCK_IN_WINDOW if window else kernels.BLOCK
    length = -(-inputs[0].shape[1] // block) * block
    steps = HEADS[0][0] * len(mask.blocks(length, length, block, block))
    names, sizes = ("fwd", "dq", "dkv"), (256, 512, 1024)
    return static.TpuOp(
        columns=dict(block=block),
        # Gradients of the keys are added up over heads: no part of that grid is parallel.
        kernels={x: static.TpuKernel(f"splash_mha_{x}", steps, parallel=x != "dkv") for x in names},
        programs={"forward": forward(0), "forward + backward": gradient(0)},
        uses={"forward": names[:1], "forward + backward": names},
        xla={
            "forward": {n: forward(n) for n in sizes},
            "forward + backward": {n: gradient(n) for n in sizes},
        },
    )


TPU = {
    "attention_local": functools.partial(tpu, WINDOW),
    "attention_global": functools.partial(tpu, None),
}
