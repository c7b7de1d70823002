"""write_slots: one token per row into a stacked cache, in the interpreter and ahead of time."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import tpu_cache, write_slots
from kernels.errors import NotSupported
from tests.kernels.seven_checks import abstract_on, in_a_process
from training import sharding

# (layers, rows, heads, slots, K): several tiles, the other layout, more rows than lanes, one row.
SHAPES = [(3, 5, 2, 256, 64), (2, 3, 3, 48, 128), (2, 130, 1, 128, 16), (2, 1, 2, 16, 256)]
TYPES = (jnp.float32, jnp.bfloat16)


def given(shape, dtype, seed=0):
    """(cache, tokens); the bits are random, so that numbers of all kinds are among them."""
    n, b, g, s, k = shape
    width = jnp.dtype(dtype).itemsize
    draw = np.random.default_rng(seed).integers
    words = (draw(0, 1 << 8 * width, x, f"uint{8 * width}") for x in (shape, (b, 1, g, k)))
    return [jax.lax.bitcast_convert_type(jnp.asarray(x), dtype) for x in words]


def bits(x):
    """What is stored."""
    return np.asarray(jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}"))


def written(stored, layer, new, slots):
    """The definition."""
    stored = stored.copy()
    for row, slot in enumerate(np.asarray(slots)[:, 0]):
        if 0 <= slot < stored.shape[3]:
            stored[layer, row, :, slot] = new[row, 0]
    return stored


run = jax.jit(write_slots, static_argnames="impl")


@pytest.mark.parametrize("dtype", TYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", ["xla", "tpu_interpret"])
def test_check_1_every_row_at_its_own_slot(impl, shape, dtype, monkeypatch):
    """Bit by bit, slots at both ends of tiles and outside the cache, blocks that rows do not
    fill."""
    monkeypatch.setattr(tpu_cache, "BYTES", 1 << 17)
    cache, new = given(shape, dtype)
    ends = [0, 15, 16, 127, shape[3] - 1, shape[3], -1, shape[3] + 200]
    drawn = np.random.default_rng(1).integers(0, shape[3], shape[1])
    for turn in range(0, len(ends), min(len(ends), shape[1])):
        slots = np.concatenate([ends[turn:], drawn])[: shape[1], None].astype(np.int32)
        got = run(cache, turn % shape[0], new, jnp.asarray(slots), impl=impl)
        want = written(bits(cache), turn % shape[0], bits(new), slots)
        np.testing.assert_array_equal(bits(got), want)


@pytest.mark.parametrize("shape", [(3, 5, 2, 128, 16), (3, 5, 2, 32, 128)])
def test_check_4_a_ring_in_a_scan_over_layers(shape):
    """Two turns and more of a ring behind pinned slots, token after token, each layer its own
    tokens; layer numbers are traced."""
    n, b, g, s, k = shape
    pinned, steps = 7, 2 * s + 5
    first = np.asarray([7, 9, 40, 20, 7])
    tokens = jax.random.normal(jax.random.key(1), (steps, n, b, 1, g, k))
    positions = first + np.arange(steps)[:, None]
    slots = jnp.asarray(pinned + (positions - pinned) % (s - pinned), jnp.int32)[..., None]

    def step(cache, given):
        tokens, slots = given

        def layer(cache, given):
            return write_slots(cache, given[0], given[1], slots, impl="tpu_interpret"), None

        return jax.lax.scan(layer, cache, (jnp.arange(n), tokens))[0], None

    cache = jnp.zeros(shape)
    got = bits(jax.jit(lambda *x: jax.lax.scan(step, *x)[0])(cache, (tokens, slots)))
    want = bits(cache)
    for token, at in zip(bits(tokens), np.asarray(slots)):
        for layer in range(n):
            want = written(want, layer, token[layer], at)
    np.testing.assert_array_equal(got, want)
    assert not got[:, :, :, :pinned].any() and got[:, :, :, pinned:].any(-1).all()


@pytest.mark.parametrize("shape", [(2, 3, 2, 256, 64), (2, 3, 2, 32, 128)])
def test_check_1_copies_wait_for_each_other(shape):
    """In the interpreter that keeps a TPU's memories apart and copies late."""
    cache, new = given(shape, jnp.float32)
    slots = jnp.asarray([[0], [31], [17]], jnp.int32)
    late = pltpu.InterpretParams(dma_execution_mode="on_wait")
    write = functools.partial(tpu_cache.write_slots, interpret=late)
    got = jax.jit(write)(cache, jnp.int32(1), new, slots)
    np.testing.assert_array_equal(bits(got), written(bits(cache), 1, bits(new), slots))


def test_check_5_eight_devices_equal_one():
    """Rows and heads stay where they are; nothing is gathered."""
    rows = in_a_process("-m", "tests.kernels.cache_on_mesh")
    assert len(rows) == 2
    for row in rows:
        assert row["equal"] and row["shard_map"] and row["kept"] and not row["gathered"], row


def test_what_the_kernel_does_not_take():
    """Each reason; impl="auto" on a TPU goes on to XLA."""

    def refuses(match, shape, dtype=jnp.bfloat16, tokens=1):
        n, b, g, s, k = shape
        arrays = [jax.ShapeDtypeStruct(x, dtype) for x in (shape, (b, tokens, g, k))]
        slots = jax.ShapeDtypeStruct((b, tokens), jnp.int32)
        asked = lambda *x: write_slots(x[0], 1, *x[1:], impl="tpu")  # noqa: E731
        with pytest.raises(NotSupported, match=match):
            jax.eval_shape(asked, *arrays, slots)

    refuses("one token per row, not 2", SHAPES[0], tokens=2)
    refuses("float32 or bfloat16, not float16", SHAPES[0], jnp.float16)
    refuses("a width of 130 is not whole tiles", (2, 1, 1, 128, 130))
    refuses("a width of 72 is not whole tiles", (2, 1, 1, 128, 72))
    refuses("200 slots of width 64 are not whole tiles", (2, 1, 1, 200, 64))
    refuses("200 slots of width 128 are not whole tiles", (2, 1, 1, 200, 128))
    with pytest.raises(ValueError, match="allowed: auto, xla, tpu"):
        write_slots(*given(SHAPES[3], jnp.float32)[:1], 0, None, None, impl="gpu")


def decoding(place, shape, dtype):
    """(a step's writes into all layers, its arguments), the cache donated."""
    n, b, g, s, k = shape

    def step(cache, tokens, slots):
        def layer(cache, given):
            return write_slots(cache, *given, slots), None

        return jax.lax.scan(layer, cache, (jnp.arange(n), tokens))[0]

    sizes = (shape, dtype), ((n, b, 1, g, k), dtype), ((b, 1), jnp.int32)
    arrays = [jax.ShapeDtypeStruct(*x, sharding=place(x[0])) for x in sizes]
    return jax.jit(step, donate_argnums=0), arrays


def assert_in_place(compiled, calls, loops, size):
    """So many kernels and loops, and nothing as large as a layer of the cache beside the cache."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text.count('custom_call_target="tpu_custom_call"') == calls
    assert len(re.findall(r" while\(", text)) == loops
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 50


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_check_6_tpu_writes_in_place(topology):
    """Hymba 1.5B's and Llama 3.2 3B's heads, both types: one kernel in the loop over layers, no
    loop over rows, no copy of the cache; impl="auto" chooses, and leaves an odd size to XLA."""
    pytest.importorskip("libtpu", reason="needs the aot extra")
    device, mesh = abstract_on(topology)
    one = jax.sharding.SingleDeviceSharding(device)
    kinds = (((4, 128, 5, 1280, 64), jnp.bfloat16), ((4, 128, 8, 1024, 128), jnp.bfloat16))
    kinds += (((4, 8, 5, 1280, 64), jnp.float32), ((4, 8, 8, 1024, 128), jnp.float32))
    kinds += (((4, 128, 5, 1281, 64), jnp.bfloat16),)
    programs = []
    with mesh:
        for shape, dtype in kinds:
            step, arrays = decoding(lambda _: one, shape, dtype)
            programs.append(step.lower(*arrays).compile())
    for compiled, (shape, dtype) in zip(programs, kinds):
        odd = shape[3] == 1281
        size = np.prod(shape) * jnp.dtype(dtype).itemsize
        assert_in_place(compiled, 0 if odd else 1, 2 if odd else 1, size)
        assert ("cost_estimate" in compiled.as_text()) != odd


@pytest.mark.aot
def test_check_6_tpu_writes_in_place_on_a_mesh():
    """Rows on two devices and heads on two: each writes its own part, nothing is exchanged."""
    pytest.importorskip("libtpu", reason="needs the aot extra")
    from kernels import shard
    from training import topology

    devices = topology.devices(topology.parse("v5e:2x2"))
    mesh = sharding.make_mesh(dict(data=2, fsdp=1, tensor=2, seq=1), devices)
    shape = (4, 128, 8, 1024, 128)
    own = {5: (None, "batch", "act_kv_heads", None, None), 2: ("batch", None)}

    def place(sizes):
        names = own.get(len(sizes)) if sizes in (shape, (128, 1)) else (None,) * len(sizes)
        return jax.sharding.NamedSharding(mesh, shard.spec(names, sizes))

    with sharding.scope(mesh):
        step, arrays = decoding(place, shape, jnp.bfloat16)
        compiled = step.lower(*arrays).compile()
    text = compiled.as_text()
    assert not re.search(r"all-(gather|to-all|reduce)|collective-permute", text)
    assert "bf16[4,64,4,1024,128]" in text
    assert_in_place(compiled, 1, 1, np.prod(shape) * 2 // 4)
