"""Bytes of compiled programs: by hand, and beside XLA's own count where nothing is in a loop."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from eval import hlo
from training import topology

LAYERS, ROWS, WIDTH = 5, 64, 256
MODULE = """HloModule m

%step (stack: f32[6,8,4], new: f32[8,4], i: s32[]) -> f32[6,8,4] {
  %stack = f32[6,8,4]{2,1,0} parameter(0)
  %new = f32[8,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %wide = f32[1,8,4]{2,1,0} bitcast(%new)
  ROOT %update = f32[6,8,4]{2,1,0} dynamic-update-slice(%stack, %wide, %i, %zero, %zero)
}

%read (stack: f32[6,8,4], i: s32[]) -> bf16[8,4] {
  %stack.1 = f32[6,8,4]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %narrow = bf16[6,8,4]{2,1,0} convert(%stack.1)
  %slice = bf16[1,8,4]{2,1,0} dynamic-slice(%narrow, %i.1, %zero.1, %zero.1)
  ROOT %flat = bf16[8,4]{1,0:S(1)} bitcast(%slice)
}

%cond (p: (s32[], f32[6,8,4])) -> pred[] {
  %p.1 = (s32[], f32[6,8,4]) parameter(0)
  %n = s32[] get-tuple-element(%p.1), index=0
  %bound = s32[] constant(3)
  ROOT %lt = pred[] compare(%n, %bound), direction=LT
}

%body (p: (s32[], f32[6,8,4])) -> (s32[], f32[6,8,4]) {
  %p = (s32[], f32[6,8,4]) parameter(0)
  %i.2 = s32[] get-tuple-element(%p), index=0
  %stack.2 = f32[6,8,4] get-tuple-element(%p), index=1
  %f1 = bf16[8,4]{1,0:S(1)} fusion(%stack.2, %i.2), kind=kLoop, calls=%read
  %k = f32[8,4] custom-call(%f1), custom_call_target="tpu_custom_call", backend_config={"custom_call_config": {"cost_estimate":{"flops":"70","bytes_accessed":"9"}}}
  %f2 = f32[6,8,4] fusion(%stack.2, %k, %i.2), kind=kLoop, calls=%step
  ROOT %t = (s32[], f32[6,8,4]) tuple(%i.2, %f2)
}

ENTRY %main (x: f32[6,8,4]) -> f32[6,8,4] {
  %x = f32[6,8,4]{2,1,0} parameter(0)
  %zero.2 = s32[] constant(0)
  %start = (f32[6,8,4]{2,1,0:S(1)}, f32[6,8,4]{2,1,0}, u32[]{:S(2)}) copy-start(%x)
  %done = f32[6,8,4]{2,1,0:S(1)} copy-done(%start)
  %own = f32[6,8,4]{2,1,0} custom-call(%done, %x), custom_call_target="own", output_to_operand_aliasing={{}: (1, {})}
  %t.1 = (s32[], f32[6,8,4]) tuple(%zero.2, %own)
  %w = (s32[], f32[6,8,4]) while(%t.1), condition=%cond, body=%body
  ROOT %r = f32[6,8,4] get-tuple-element(%w), index=1
}
"""  # noqa: E501


def test_by_hand():
    """Slices, updates in place, loops, kernels, copies into another memory, aliased results."""
    program, layer, stack = hlo.analyse(MODULE, 1), 8 * 4 * 4, 6 * 8 * 4 * 4
    compare = 3 * (4 + 4 + 1)  # the loop's condition
    loop = 3 * (layer + 9 + 2 * layer + 2 * 4)  # read, kernel, update; the index twice
    assert program.moved == compare + loop + stack + stack
    on_chip = 3 * layer / 2 + stack + stack  # bfloat16; the copy, and what reads it
    assert program.accessed == program.moved + on_chip


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def layer(x, w):
    return jnp.tanh(x @ w)


def unrolled(matrices, x):
    for w in matrices:
        x = layer(x, w)
    return x.sum()


def scanned(w, x):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0].sum()


def attention(q, k, v):
    scores = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k), -1)
    return jnp.einsum("bhts,bshk->bthk", scores, v).sum()


def written(cache, new, i):
    cache = jax.lax.dynamic_update_slice(cache, new, (i, 0))
    return cache, jax.lax.dynamic_slice(cache, (i + 1, 0), (4, 64)).sum()


def counted(function, *arrays, donate=()):
    """(our count, XLA's)."""
    compiled = jax.jit(function, donate_argnums=donate).lower(*arrays).compile()
    ours = hlo.analyse(compiled.as_text(), 1)
    assert ours.moved == ours.accessed  # one memory on a CPU
    return ours.accessed, compiled.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_to_xlas_count_without_loops(dtype):
    """To 0.2 %: products, softmax, their gradients, updates with and without a copy."""
    matrices, x = [spec(WIDTH, WIDTH, dtype=dtype)] * LAYERS, spec(ROWS, WIDTH, dtype=dtype)
    heads = (spec(2, 128, 4, 32, dtype=dtype),) * 3
    cache = spec(512, 64, dtype=dtype), spec(8, 64, dtype=dtype), spec(dtype=jnp.int32)
    programs = [
        (unrolled, matrices, x), (jax.grad(unrolled, (0, 1)), matrices, x),
        (attention, *heads), (jax.grad(attention, (0, 1, 2)), *heads), (written, *cache),
    ]  # fmt: skip
    for program in programs:
        ours, xla = counted(*program)
        assert ours == pytest.approx(xla, rel=2e-3)
    ours, xla = counted(written, *cache, donate=0)
    assert ours == pytest.approx(xla, rel=2e-3) and ours < 2 * 64 * 64 * x.dtype.itemsize


def test_gathers_count_rows():
    """Where XLA counts the table: what a step of decoding reads of its embedding."""
    table, rows = spec(4096, 64), spec(32, dtype=jnp.int32)
    ours, xla = counted(lambda t, i: t[i] * 2, table, rows)
    assert ours < 10 * 32 * 64 * 4 < 4096 * 64 * 4 < xla


def test_a_scan_counts_every_turn():
    """Linear in the layers, forward and backward; XLA counts one of them (of the gradient also
    what is outside the loop and grows with the layers)."""
    x = spec(ROWS, WIDTH)
    for function in (scanned, jax.grad(scanned, (0, 1))):
        counts = [counted(function, spec(n, WIDTH, WIDTH), x) for n in (5, 10, 15)]
        (few, xla), (more, _), (many, _) = counts
        each = (more - few) / 5
        assert each > WIDTH * WIDTH * 4 and many - more == pytest.approx(more - few, rel=1e-3)
        assert xla < few / 3
        if function is scanned:
            assert few == pytest.approx(xla + 4 * each, rel=1e-3)


@pytest.mark.aot
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the aot extra")
def test_on_a_tpu():
    """XLA's count again, which there counts the end of an asynchronous copy as another copy (of
    what is then on the chip); main memory sees every matrix once."""
    device = topology.devices(topology.parse("v5p:1x1x1"))[0]
    place = jax.sharding.SingleDeviceSharding(device)

    def array(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=place)

    inputs = [array(2048, 2048)] * LAYERS, array(256, 2048)
    compiled = jax.jit(unrolled).lower(*inputs).compile()
    text, matrices = compiled.as_text(), LAYERS * 2048 * 2048 * 2
    program = hlo.analyse(text, 1)
    ends = (x.partition(" = ")[2] for x in text.splitlines() if " copy-done(" in x)
    again = sum(2 * hlo.shape_bytes(x.partition(" ")[0]) for x in ends)
    xla = compiled.cost_analysis()["bytes accessed"]
    assert program.accessed + again == pytest.approx(xla, rel=2e-3)
    assert matrices < program.moved < 1.2 * matrices < program.accessed
