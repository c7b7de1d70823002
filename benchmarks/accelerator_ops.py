"""Checks and timings of benchmarks/accelerator.py for the scans and the bitwise head.

One `Op` each: random inputs, the call, what is differentiated, and the least it can compute and
move. The mLSTM has sections of its own, since attention and the step of 32 layers stand beside it.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import common
from benchmarks.accelerator_checks import apart, precise, verdict
from benchmarks.accelerator_speed import attempt, rate, seconds
from kernels.bitwise import bitwise_cross_entropy, sample_bits
from kernels.errors import NotSupported
from kernels.selective_scan import selective_scan
from kernels.ssd import ssd


class Op(NamedTuple):
    """A kernel's public call on random inputs of one size."""

    inputs: Sequence[jax.Array]  # float arrays that are differentiated, then others
    call: Callable  # (impl, *inputs) -> arrays
    graded: int  # how many of the inputs have a gradient; 0: no backward pass
    flops: float  # of the forward pass's products (those of chunks of 128 for the SSD)
    moved: int  # bytes: each large input and result once


def _documents(rows: int, length: int):
    """Document of each token, a new one after about 100."""
    ends = jax.random.bernoulli(jax.random.key(99), 0.01, (rows, length))
    return jnp.cumsum(ends, axis=1).astype(jnp.int32)


def scan(rows: int, length: int, quick: bool, dtype) -> Op:
    """Mamba-1's scan at Hymba 1.5B's sizes."""
    channels, states = (64, 8) if quick else (3200, 16)
    wide, narrow = (rows, length, channels), (rows, length, states)
    A = -jnp.tile(jnp.arange(1.0, states + 1), (channels, 1))

    def draw(normal):
        u, delta, z = (normal(i, *wide, dtype=dtype) for i in range(3))
        B, C = (normal(i, *narrow, dtype=dtype) for i in (3, 4))
        return u, delta, A, B, C, normal(5, channels), z, _documents(rows, length)

    inputs = common.drawn(draw)

    def call(impl, u, delta, A, B, C, D, z, documents):
        return selective_scan(u, delta, A, B, C, D, z=z, segment_ids=documents, impl=impl)

    size = rows * length * jnp.dtype(dtype).itemsize
    return Op(inputs, call, 7, 0.0, size * (4 * channels + 2 * states))


def state_space_dual(rows: int, length: int, quick: bool, dtype) -> Op:
    """Mamba-2's scan at the 2.7B's sizes."""
    heads, width, states = (2, 32, 32) if quick else (80, 64, 128)
    wide, narrow = (rows, length, heads, width), (rows, length, 1, states)

    def draw(normal):
        A = -jnp.linspace(1.0, 16.0, heads)
        B, C = (normal(i, *narrow, dtype=dtype) for i in (0, 1))
        x, delta, D = normal(2, *wide, dtype=dtype), normal(3, *wide[:3]), normal(4, heads)
        return x, delta, A, B, C, D, _documents(rows, length)

    inputs = common.drawn(draw)

    def call(impl, x, delta, A, B, C, D, documents):
        return ssd(x, delta, A, B, C, D, segment_ids=documents, impl=impl)

    within, across = 128 * (states + width) // 2, 2 * states * width
    size = rows * length * jnp.dtype(dtype).itemsize
    flops = 2 * rows * length * heads * (within + across)
    return Op(inputs, call, 6, flops, size * (2 * heads * width + 2 * states))


def _head(rows: int, length: int, quick: bool, dtype):
    channels, bits = (64, 16) if quick else (2048, 32)

    def draw(normal):
        x = normal(0, rows, length, channels, dtype=dtype)
        w, b = normal(1, channels, bits) * channels**-0.5, normal(2, bits)
        return x, w, b, normal(3, rows, channels) * 0.1, normal(4, rows, channels) * 0.1

    return common.drawn(draw)


def bitwise_loss(rows: int, length: int, quick: bool, dtype) -> Op:
    """The bitwise head and its loss at the 2B generator's sizes."""
    inputs = _head(rows, length, quick, dtype)
    bits = jax.random.bits(jax.random.key(9), (rows, length, 1), jnp.uint32)

    def call(impl, x, w, b, scale, shift, bits):
        return bitwise_cross_entropy(x, w, b, bits, scale=scale, shift=shift, impl=impl)

    x, w = inputs[:2]
    return Op((*inputs, bits), call, 5, 2.0 * x.size * w.shape[1], x.nbytes)


def bitwise_draw(rows: int, length: int, quick: bool, dtype) -> Op:
    """Drawing of bits with guidance."""
    x, w, b, *modulation = _head(rows, length, quick, dtype)
    (uncond,) = common.drawn(lambda normal: [normal(8, *x.shape, dtype=dtype)])
    uniforms = jax.random.uniform(jax.random.key(9), (*x.shape[:2], w.shape[1]))

    def call(impl, x, w, b, scale, shift, uncond, uniforms):
        return sample_bits(
            x, w, b, uniforms, x_uncond=uncond, guidance=3.0, top_p=0.97, scale=scale, shift=shift,
            impl=impl,
        )[1]  # fmt: skip

    flops, moved = 4.0 * x.size * w.shape[1], 2 * x.nbytes + 2 * uniforms.nbytes
    return Op((x, w, b, *modulation, uncond, uniforms), call, 0, flops, moved)


OPS = {
    "selective_scan": scan,
    "ssd": state_space_dual,
    "bitwise_cross_entropy": bitwise_loss,
    "sample_bits": bitwise_draw,
}


def _weights(op: Op) -> tuple[jax.Array, ...]:
    """Random weights of the results, drawn once: a draw costs more than some of the kernels."""
    out = jax.eval_shape(functools.partial(op.call, "ref"), *op.inputs)
    leaves = jax.tree.leaves(out)

    def draw(normal):
        return [normal(i, *x.shape, dtype=x.dtype) for i, x in enumerate(leaves)]

    return common.drawn(draw)


def _total(op: Op, impl: str, weights, *inputs):
    """Sum of the results under `weights`, and the results."""
    out = jax.tree.leaves(op.call(impl, *inputs))
    total = sum((x.astype(jnp.float32) * w).sum() for x, w in zip(out, weights, strict=True))
    return total, out


def _everything(op: Op, impl: str, weights, *inputs):
    """Results, and gradients where there are any."""
    if not op.graded:
        return op.call(impl, *inputs)
    total = functools.partial(_total, op, impl, weights)
    return jax.grad(total, tuple(range(op.graded)), has_aux=True)(*inputs)


@precise
def check(name: str, quick: bool, peaks: dict) -> list[dict]:
    """Each implementation against the reference: values and gradients."""
    del peaks
    found = []
    for dtype, limit in (("float32", 1e-4), ("bfloat16", 2e-2)):
        op = OPS[name](2, 40 if quick else 600, quick, dtype)
        exact = [
            x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in op.inputs
        ]
        weights = _weights(op)
        want = jax.jit(functools.partial(_everything, op, "ref"))(weights, *exact)
        for impl in ("xla", *({"tpu", "gpu"} & {jax.default_backend()})):
            row = {"dtype": dtype, "impl": impl}
            try:
                got = jax.jit(functools.partial(_everything, op, impl))(weights, *op.inputs)
            except NotSupported as error:
                found.append({"check": name, **row, "not_supported": str(error)})
                continue
            found.append(verdict(name, _distance(op, got, want), limit, **row))
    return found


def _distance(op: Op, got, want) -> float:
    """As `apart`; of draws the share of those that differ, where rounding may decide a few."""
    if op.graded:
        return apart(got, want)
    return float((jnp.sign(got) != jnp.sign(want)).mean())


def timing(name: str, quick: bool, peaks: dict) -> list[dict]:
    """A constant number of tokens in rows of several lengths; the backward pass counts twice."""
    tokens, found = (256 if quick else 65_536), []
    impls = ("xla", *({"tpu", "gpu"} & {jax.default_backend()}))
    for length, impl in itertools.product((128,) if quick else (1024, 8192, 65_536), impls):
        rows = tokens // length
        op = OPS[name](rows, length, quick, jnp.bfloat16)
        passes = {"forward": (functools.partial(op.call, impl), op.inputs, 1)}
        if op.graded:
            inputs, which = (_weights(op), *op.inputs), tuple(range(1, op.graded + 1))
            total = functools.partial(_total, op, impl)
            passes["and backward"] = jax.grad(lambda *x, f=total: f(*x)[0], which), inputs, 3
        for label, (function, inputs, times) in passes.items():
            row = {"what": f"{name.replace('_', ' ')} {impl}", "length": length, "rows": rows}
            run = functools.partial(jax.jit(function), *inputs)
            work = dict(flops=op.flops * times, moved=op.moved * times)
            measure = lambda run=run, w=work: rate(seconds(run), peaks, **w)  # noqa: E731
            found.append(attempt(row | {"pass": label}, measure))
    return found


CHECKS = {f"check_{name}": functools.partial(check, name) for name in OPS}
TIMINGS = {name: functools.partial(timing, name) for name in OPS}
