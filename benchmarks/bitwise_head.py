"""The bitwise head against the same head unfused and against index heads over 2^16 and 2^18 codes.

    python -m benchmarks.bitwise_head --out=benchmarks/results/bitwise_head.json

Loss and all gradients of one picture of a megapixel (10,521 tokens) at the 2B generator's width,
bfloat16 hidden states, 32 bits. Compiled only: bytes of parameters and of temporaries, FLOPs of the
products, and for TPUs the compiler's own estimate of the time (of the fused head's kernels: bytes
over bandwidth; their schedules are tpu_static's); a program that does not fit says by how much.
Needs the extra `aot` for the TPU rows. Then seconds on this machine's CPU at sizes that fit.

The unfused head is the published one: two logits per bit in float32. The index heads are the
language models' cross-entropy, with all scores in memory and in slices of 8,192 codes.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp

from benchmarks import common, static

CHIPS = ("v5e:2x2", "v5p:2x2x1")
TOKENS, WIDTH, BITS = 10521, 2048, 32
VOCABULARIES = (2**16, 2**18)


def modulated(x, scale, shift):
    """Layer norm without affine, scaled and shifted, float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return x * (1.0 + scale[:, None]) + shift[:, None]


def fused(impl, x, w, b, scale, shift, labels):
    """Sum of the loss; w is half of the published parameters, by folding two columns."""
    from kernels.bitwise import bitwise_cross_entropy

    options = dict(scale=scale, shift=shift, impl=impl)
    return bitwise_cross_entropy(
        x, w[:, 1::2] - w[:, ::2], b[1::2] - b[::2], labels, **options
    ).sum()


def unfused(x, w, b, scale, shift, labels):
    """Two logits per bit, log-softmax, mean over bits."""
    from kernels.bitwise import bits

    d = w.shape[1] // 2
    logits = jnp.matmul(modulated(x, scale, shift), w, precision="highest") + b
    logs = jax.nn.log_softmax(logits.reshape(*x.shape[:-1], d, 2))
    ones = bits.unpack(labels, d)[..., None]
    return -jnp.take_along_axis(logs, ones, -1).mean((-1, -2)).sum()


def index(form, x, table, scale, shift, labels):
    """Cross-entropy over codes."""
    from models.blocks import losses

    hidden = modulated(x, scale, shift).astype(x.dtype)[0]
    function = getattr(losses, f"{form}_cross_entropy")
    return function(hidden, table, labels[0, :, 0], jnp.ones(x.shape[1]))[0]


def heads(tokens: int, width: int, bits: int, vocabularies, impl: str, place=None) -> list:
    """[(columns, loss function, abstract arguments, products' FLOPs)]; the last argument is what no
    gradient flows to. place: sharding of an absent device."""

    def array(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    x, row = array(1, tokens, width, dtype=jnp.bfloat16), array(1, width)
    # What a product costs: forward, for x's gradient, for the weight's; computed again: once more.
    product = 2 * tokens * width
    words = array(1, tokens, -(-bits // 32), dtype=jnp.uint32)
    given = (x, array(width, 2 * bits), array(2 * bits), row, row, words)
    label = dict(bits=bits)
    found = [
        (
            label | dict(head="bitwise, fused"),
            functools.partial(fused, impl),
            given,
            4 * product * bits,
        ),
        (label | dict(head="bitwise, unfused"), unfused, given, 3 * product * 2 * bits),
    ]
    for size in vocabularies:
        given = (x, array(size, width), row, row, array(1, tokens, 1, dtype=jnp.int32))
        for form, times in (("plain", 3), ("chunked", 4)):
            columns = dict(head=f"index, {form}", vocabulary=size)
            found.append((columns, functools.partial(index, form), given, times * product * size))
    return found


def graded(function, given):
    """Jitted loss and gradients to all but the labels."""
    return jax.jit(jax.value_and_grad(function, tuple(range(len(given) - 1))))


def compiled(topology: str) -> list[dict]:
    """Rows of one chip, or of this machine's CPU for an empty topology."""
    from eval import hlo
    from training import topology as topologies

    if topology:
        where = topologies.parse(topology)
        device = topologies.devices(where)[0]
        place, mesh = jax.sharding.SingleDeviceSharding(device), [device]
    else:
        place, mesh = None, jax.devices()[:1]
    rows = []
    for columns, function, given, flops in heads(
        TOKENS, WIDTH, BITS, VOCABULARIES, "tpu" if topology else "xla", place
    ):
        weights = sum(a.size * a.dtype.itemsize for a in given[1:-3])
        row = dict(chip=where.kind if topology else "cpu") | columns
        row |= dict(parameter_bytes=weights, product_flops=flops)
        try:
            with jax.set_mesh(jax.sharding.Mesh(mesh, ("data",))):
                program = graded(function, given).lower(*given).compile()
        except jax.errors.JaxRuntimeError as error:
            rows.append(row | dict(does_not_fit=str(error).splitlines()[0][:200]))
            continue
        row["temporary_bytes"] = common.temp_bytes(program)
        if topology:
            work = hlo.analyse(program.as_text(), 1)
            chip = where.chip
            kernels = (max(k.flops / chip.peak, k.moved / chip.hbm_rate) for k in work.kernels)
            row["estimated_ms"] = common.digits(1e3 * (work.cycles / chip.clock + sum(kernels)))
        rows.append(row)
    return rows


def timed(tokens: int, width: int, bits: int, vocabularies, rounds: int) -> list[dict]:
    """Seconds in turns on this machine: fused, unfused, index heads."""
    runs, labels = {}, {}
    for columns, function, given, _ in heads(tokens, width, bits, vocabularies, "xla"):
        keys = jax.random.split(jax.random.key(0), len(given))
        arrays = [
            (jax.random.normal(key, a.shape) * 0.05).astype(a.dtype)
            if jnp.issubdtype(a.dtype, jnp.floating)
            else jnp.arange(a.size, dtype=a.dtype).reshape(a.shape)
            for key, a in zip(keys, given)
        ]
        runs[columns["head"]] = functools.partial(graded(function, given), *arrays)
        labels[columns["head"]] = columns
    times = common.interleave(runs, rounds)
    setup = dict(what="seconds", tokens=tokens, width=width)
    rows = [setup | labels[name] | common.spread(times[name]) for name in runs]
    for name in [*runs][1:]:
        ratio = common.ratio(times[name], times["bitwise, fused"])
        rows.append(dict(what=f"{name} / fused, seconds", tokens=tokens, width=width) | ratio)
    return rows


def arguments(argv=None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of CPU timing; 0: none")
    parser.add_argument("--out", default="", help="JSON file for the results")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """All rows."""
    args = arguments(argv)
    if args.one:
        print(json.dumps(compiled(args.one)))
        return
    rows = static.compiled_everywhere("benchmarks.bitwise_head", compiled, CHIPS)
    if args.rounds:
        rows += timed(521, 256, 16, (2**16,), args.rounds)
        rows += timed(2521, 1024, 32, (), args.rounds)
    for row in rows:
        common.show(row)
    common.save(args.out, f"python -m benchmarks.bitwise_head --rounds={args.rounds}", rows)


if __name__ == "__main__":
    main()
