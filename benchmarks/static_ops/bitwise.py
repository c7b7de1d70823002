"""The bitwise head's part of tpu_static and gpu_static, at the 2B generator's sizes: one row of
2,048 channels, 32 bits a token."""

import functools

from benchmarks import static

CHANNELS, BITS = 2048, 32
LANES = 128


def arrays(device, tokens: int):
    """(x, w, b, weights, scale, shift, words) on an unattached device: x bfloat16."""
    import jax
    import jax.numpy as jnp

    place = jax.sharding.SingleDeviceSharding(device)

    def array(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    row = array(1, CHANNELS)
    head = array(CHANNELS, BITS), array(BITS)
    words = array(1, tokens, 1, dtype=jnp.uint32)
    return array(1, tokens, CHANNELS, dtype=jnp.bfloat16), *head, array(1, tokens), row, row, words


def call(impl: str, chunk=None):
    """Loss of every token of `arrays`."""
    from kernels.bitwise import bitwise_cross_entropy

    def run(x, w, b, weights, scale, shift, words):
        options = dict(weights=weights, scale=scale, shift=shift, impl=impl, chunk=chunk)
        return bitwise_cross_entropy(x, w, b, words, **options)

    return run


def gradient(impl: str, chunk=None):
    """Gradients to all of `arrays` but the labels, of the loss's sum."""
    import jax

    return jax.grad(lambda *inputs: call(impl, chunk)(*inputs).sum(), argnums=tuple(range(6)))


def samples(impl: str, chunk=None):
    """Words of bits drawn with guidance, from `_draws`."""
    from kernels.bitwise import sample_bits

    def run(x, w, b, uncond, uniforms, scale, shift, draw):
        options = dict(guidance=draw[0], temperature=draw[1], top_p=draw[2], impl=impl)
        options |= dict(x_uncond=uncond, scale=scale, shift=shift, chunk=chunk)
        return sample_bits(x, w, b, uniforms, **options)

    return run


def _draws(device, tokens: int):
    """What `samples` takes."""
    import jax
    import jax.numpy as jnp

    x, w, b, _, scale, shift, _ = arrays(device, tokens)
    more = (
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=x.sharding) for s in ((1, tokens, BITS), (3,))
    )
    uniforms, draw = more
    return x, w, b, x, uniforms, scale, shift, draw


def tpu(topology, device, args) -> static.TpuOp:
    """Loss, gradient and draws of the kernels, and of XLA in chunks and at once."""
    from kernels.bitwise import tpu as kernel

    inputs = arrays(device, args.tokens)
    tile = args.chunk or kernel.TILE
    steps = -(-args.tokens // tile)
    # What is prepared for a row's part: a loop over lanes, at the first of its blocks.
    trips = CHANNELS // LANES * (2 - steps % 2) / steps
    draws = _draws(device, args.tokens)

    def each(name, loops=1):
        return static.TpuKernel(f"bitwise_{name}", steps, (trips,) * loops)

    def xla(make, arrays=inputs):
        return {n: static.Program(make("xla", n), arrays) for n in (1024, args.tokens)}

    names = ("forward", "backward")
    return static.TpuOp(
        columns=dict(chunk=tile),
        kernels={"sample": each("sample", 2)} | {name: each(name) for name in names},
        programs={
            "sample": static.Program(samples("tpu", tile), draws),
            "forward": static.Program(call("tpu", tile), inputs),
            "forward + backward": static.Program(gradient("tpu", tile), inputs),
        },
        uses={"sample": ("sample",), "forward": names[:1], "forward + backward": names},
        xla={
            "sample": xla(samples, draws),
            "forward": xla(call),
            "forward + backward": xla(gradient),
        },
    )


def _gpu(what: str, topology, device, args) -> static.GpuProgram:
    """Limits: x in, dx out, x of conditional and unconditional tokens in; the folded head's
    products."""
    inputs, numbers = arrays(device, args.tokens), args.tokens * CHANNELS
    functions = {"forward": call("gpu"), "forward + backward": gradient("gpu")}
    functions["sample"] = samples("gpu")
    kernels = dict.fromkeys(functions, [what])
    kernels["forward + backward"] = ["backward", "forward"]
    passes = {"forward": 1, "forward + backward": 3, "sample": 2}[what]
    products = {"forward": 1, "forward + backward": 4, "sample": 2}[what]
    return static.GpuProgram(
        function=functions[what],
        arrays=_draws(device, args.tokens) if what == "sample" else inputs,
        kernels=kernels[what],
        columns=dict(
            tokens=args.tokens,
            ms_matrix_unit=round(products * 2 * numbers * BITS / topology.chip.peak * 1e3, 4),
            ms_memory=round(passes * 2 * numbers / topology.chip.hbm_rate * 1e3, 4),
        ),
    )


TPU = {"bitwise": tpu}
GPU = {x: functools.partial(_gpu, x) for x in ("forward", "forward + backward", "sample")}
