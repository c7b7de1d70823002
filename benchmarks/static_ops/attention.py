"""Attention's part of tpu_static: splash attention at Hymba 1.5B's heads, `args.tokens` tokens
behind 128 meta tokens, in its local layers and in its global ones; and scale-causal at Infinity
2B's heads, for pictures of two shapes and two sizes. What runs on GPUs is cuDNN's, which no
compiler here shows."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks import static

HYMBA = ((25, 64), (5, 64), (5, 128))  # of q, k, v: how many, how wide
META, WINDOW = 128, 1025
INFINITY = ((16, 128),) * 3


class Case(NamedTuple):
    """One row of tokens that attend to each other."""

    heads: tuple[tuple[int, int], ...]
    tokens: int
    mask: Any
    columns: Mapping[str, Any] = {}


def hymba(window: int | None, args) -> Case:
    """A layer of Hymba 1.5B."""
    from kernels.attention import MaskSpec

    mask = MaskSpec(window=window, always_visible=META if window else 0)
    return Case(HYMBA, META + args.tokens, mask)


def infinity(ratio: float, budget: str, args) -> Case:
    """A layer of Infinity 2B; shares of all T^2 pairs: visible ones, those in the kernels' blocks,
    FLOPs of the XLA form, forward and backward."""
    import jax
    import jax.numpy as jnp

    from eval.flops import count_flops
    from kernels.attention import MaskSpec, attention
    from kernels.attention import tpu as kernels
    from models.tokenizers.quantisers import schedules

    schedule = schedules.infinity(ratio, budget)
    tokens = schedules.tokens(schedule)
    mask = MaskSpec(causal=False, scales=tuple(h * w for h, w in schedule))
    heads, width = INFINITY[0]
    x = jax.ShapeDtypeStruct((1, tokens, heads, width), jnp.bfloat16)
    total = lambda *x: attention(*x, mask, impl="xla").sum()  # noqa: E731
    flops = count_flops(jax.grad(total, (0, 1, 2)), x, x, x)
    block = args.chunk or kernels.block_of(mask, tokens, tokens)
    blocks = len(mask.blocks(tokens, tokens, block, block))
    visible = int(mask.reach(tokens, tokens)[1].sum()) + tokens
    shares = dict(visible=visible, kernels=blocks * block**2, xla=flops / (2 * heads * 7 * width))
    columns = dict(tokens=tokens, blocks=blocks, dense_blocks=(-(-tokens // block)) ** 2)
    columns |= {f"share_{k}": round(n / tokens**2, 4) for k, n in shares.items()}
    return Case(INFINITY, tokens, mask, columns)


def tpu(case, topology, device, args) -> static.TpuOp:
    """Forward and gradient of the kernels, and of XLA at three sizes of blocks. Grid steps are
    those that multiply; those of blocks outside of the mask do nothing and are left out."""
    import jax
    import jax.numpy as jnp

    from kernels.attention import tpu as kernels
    from kernels.attention import xla

    heads, tokens, mask, columns = case(args)
    place = jax.sharding.SingleDeviceSharding(device)
    array = lambda *n: jax.ShapeDtypeStruct((1, tokens, *n), jnp.bfloat16, sharding=place)  # noqa: E731
    inputs = [array(*x) for x in heads]
    options = dict(scale=heads[0][1] ** -0.5, softcap=None)
    block = args.chunk or kernels.block_of(mask, tokens, tokens)

    def run(size, q, k, v):
        if size:
            return xla.attention(q, k, v, mask, **options, chunk=size)
        return kernels.attention(q, k, v, mask, **options, block=block)

    def forward(size):
        return static.Program(functools.partial(run, size), inputs)

    def gradient(size):
        # Of a weighted sum, so that the gradient of the result is an array as in a model.
        def total(weight, *x):
            return (run(size, *x).astype(jnp.float32) * weight).sum()

        weight = array(heads[0][0], heads[2][1])
        return static.Program(jax.grad(total, argnums=(1, 2, 3)), (weight, *inputs))

    length = -(-tokens // block) * block
    steps = heads[0][0] * len(mask.blocks(length, length, block, block))
    names, sizes = ("fwd", "dq", "dkv"), (256, 512, 1024)
    return static.TpuOp(
        columns=dict(block=block) | columns,
        # Gradients of the keys are added up over heads: no part of that grid is parallel.
        kernels={x: static.TpuKernel(f"splash_mha_{x}", steps, parallel=x != "dkv") for x in names},
        programs={"forward": forward(0), "forward + backward": gradient(0)},
        uses={"forward": names[:1], "forward + backward": names},
        xla={
            "forward": {n: forward(n) for n in sizes},
            "forward + backward": {n: gradient(n) for n in sizes},
        },
    )


CASES = {
    "attention_local": functools.partial(hymba, WINDOW),
    "attention_global": functools.partial(hymba, None),
}
CASES |= {
    f"attention_scales_{ratio}_{budget}": functools.partial(infinity, ratio, budget)
    for ratio in (1.0, 1.5)
    for budget in ("0.25M", "1M")
}
TPU = {name: functools.partial(tpu, case) for name, case in CASES.items()}
