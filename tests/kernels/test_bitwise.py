"""The bitwise head: the definition, chunks and kernels against it, draws, the compilers.

Check numbers 1 to 7 of `TestBitwise` are the kernels' own; test_check_N after it are section 9's of
the specification of the bitwise generator.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.bitwise import bits as packing
from kernels.bitwise import bitwise_cross_entropy, sample_bits
from kernels.errors import NotSupported
from tests.kernels.seven_checks import Checks, abstract_on, assert_close, in_a_process

# (B, T, C, d, chunk): one token, odd lengths, one row, widths that are not whole lanes.
SHAPES = [(1, 1, 3, 8, 1), (2, 37, 24, 16, 16), (1, 20, 130, 56, 7)]
NAMES = ("x", "w", "b", "weights", "scale", "shift")
IMPLS = ("xla", "tpu_interpret")


def tensors(shape, dtype=jnp.float32, seed=0):
    """Inputs in the order of NAMES."""
    b, t, c, d, _ = shape
    keys = jax.random.split(jax.random.key(seed), 6)
    sizes = [(b, t, c), (c, d), (d,), (b, t), (b, c), (b, c)]
    x, w, bias, weights, scale, shift = (
        jax.random.normal(key, size) for key, size in zip(keys, sizes)
    )
    # A mean that the normalisation has to take away.
    x = (x + 0.5).astype(dtype)
    return [x, w * c**-0.5, bias, jnp.exp(weights), 0.3 * scale, 0.3 * shift]


@functools.cache
def some_bits(*shape):
    """Random ones [*lead, d], as numpy."""
    return np.random.default_rng(shape).integers(0, 2, shape)


@functools.partial(jax.jit, static_argnames=("impl", "chunk"))
def jitted(inputs, words, *, impl, chunk):
    x, w, b, *rest = inputs
    given = dict(zip(NAMES[3:], rest))
    return bitwise_cross_entropy(x, w, b, words, **given, impl=impl, chunk=chunk)


def call(inputs, bits=None, *, impl, chunk=None):
    """bitwise_cross_entropy of `tensors`."""
    x, w = inputs[:2]
    bits = some_bits(*x.shape[:-1], w.shape[1]) if bits is None else bits
    return jitted(inputs, packed(bits), impl=impl, chunk=None if impl == "ref" else chunk)


def packed(bits):
    """pack, without JAX."""
    d = bits.shape[-1]
    bits = np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, -d % 32)]).astype(bool)
    return np.packbits(bits, axis=-1, bitorder="little").view("<u4")


class TestBitwise(Checks):
    """Checks 1, 2, 3 and 5; tokens have no state between them."""

    AXIS = 1
    SHAPES = SHAPES
    IMPLS = IMPLS
    GRADIENT_SHAPES = (SHAPES[1], (2, 50, 130, 8, 16), (1, 150, 128, 64, 64))
    MESHES = (
        ("xla", dict(data=2, fsdp=1, tensor=2, seq=2)),
        ("tpu_interpret", dict(data=1, fsdp=4, tensor=1, seq=2)),
    )
    MESH_SHAPE = (4, 16, 24, 16, 128)

    inputs = staticmethod(tensors)

    def run(self, inputs, state, *, segment_ids=None, **options):
        return call(inputs, **options), ()

    def chunk(self, shape, impl):
        return 128 if impl == "tpu_interpret" else shape[-1]

    def test_checks_1_and_2_equal_ref(self, impl, shape):
        """float32 to 1e-5; bfloat16 too: x is exact in it, and nothing else is rounded to it."""
        for dtype in (jnp.float32, jnp.bfloat16):
            inputs = tensors(shape, dtype)
            loss = call(inputs, impl=impl, chunk=self.chunk(shape, impl))
            assert loss.dtype == jnp.float32 and loss.shape == shape[:2]
            wide = [a.astype(jnp.float32) for a in inputs]
            assert_close(loss, call(wide, impl="ref"), 1e-5)

    def test_check_3_gradients_equal_autodiff_of_ref(self, shape):
        super().test_check_3_gradients_equal_autodiff_of_ref(shape, False)

    def test_check_3_float32_gradients(self, impl, gradient_shape):
        super().test_check_3_float32_gradients(impl, gradient_shape, False)

    def test_check_4_tokens_are_independent(self, impl):
        """A call on all tokens is calls on some of them; [N, C] is one row of it."""
        shape = SHAPES[1]
        inputs, bits = tensors(shape), some_bits(2, 37, 16)
        options = dict(impl=impl, chunk=self.chunk(shape, impl))
        whole = call(inputs, **options)
        x, w, b, weights, scale, shift = inputs
        for cut in (slice(0, 17), slice(20, 37)):
            part = [x[:, cut], w, b, weights[:, cut], scale, shift]
            assert_close(call(part, bits[:, cut], **options), whole[:, cut], 1e-6)
        row = [x[1], w, b, weights[1], scale[1:], shift[1:]]
        assert_close(call(row, bits[1], **options), whole[1], 1e-6)


CHECKS = TestBitwise()


def two_columns(x, W, B, bits):
    """The published head: 2 d logits, log-softmax over each bit's two, in float64 numpy."""
    logits = (x @ W + B).reshape(*x.shape[:-1], -1, 2)
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logits, bits[..., None], -1)[..., 0].mean(-1)


def scale_weights(sides):
    """Of every token of a row of scales h x w: proportional to one over sqrt(h w), sum 1."""
    weights = np.concatenate([np.full(s * s, 1.0 / s) for s in sides])
    return weights / weights.sum()


@pytest.mark.parametrize("impl", ["ref", *IMPLS])
def test_check_7_two_columns_equal_one(impl):
    """Cross-entropy over a bit's two logits is BCE to 1e-6; weights that a row's scales share out
    sum to 1, so that equal logits give ln 2."""
    rng = np.random.default_rng(0)
    weights = scale_weights((1, 2, 4, 6, 8))
    tokens, channels, d = len(weights), 24, 16
    x, W, B = (rng.standard_normal(s) for s in ((1, tokens, channels), (channels, 2 * d), 2 * d))
    x, W = x.astype(np.float32), W / channels**0.5
    bits = rng.integers(0, 2, (1, tokens, d))
    w, b = W[:, 1::2] - W[:, ::2], B[1::2] - B[::2]
    given = [jnp.asarray(a, jnp.float32) for a in (x, w, b, weights[None])]
    got = call(given, bits, impl=impl)
    want = two_columns(x.astype(np.float64), W, B, bits) * weights
    assert_close(got, want, 1e-6)
    given[1], given[2] = jnp.zeros_like(given[1]), jnp.zeros_like(given[2])
    assert call(given, bits, impl=impl).sum() == pytest.approx(np.log(2.0), abs=1e-6)


def plain(x, w, b, weights, scale, shift, bits):
    """The unfused head as one writes it, for autodiff."""
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    n = (x - mean) / jnp.sqrt(variance + 1e-6) * (1 + scale[:, None]) + shift[:, None]
    z = jnp.einsum("btc,cd->btd", n, w, precision="highest") + b
    return weights * (jnp.logaddexp(0.0, z) - bits * z).mean(-1)


@pytest.mark.parametrize("d", [8, 16, 32, 56, 64])
@pytest.mark.parametrize("impl", IMPLS)
def test_check_9_fused_equals_plain(impl, d):
    """Loss and all six gradients, float32 to 1e-5 of plain jnp; rows of 150 and 97 tokens (the
    other's last 53 have weight 0 and what must not matter in them), blocks that do not divide."""
    shape = (2, 150, 130, d, 64)
    inputs, bits = tensors(shape), some_bits(2, 150, d)
    used = jnp.arange(150) < jnp.array([[150], [97]])
    inputs[0] = jnp.where(used[..., None], inputs[0], 1e4)
    inputs[3] = jnp.where(used, inputs[3], 0.0)

    def total(inputs, run):
        loss = run(inputs)
        return (loss * jnp.cos(jnp.arange(150.0))).sum(), loss

    def graded(run):
        (_, loss), grads = jax.jit(jax.value_and_grad(lambda a: total(a, run), has_aux=True))(
            inputs
        )
        return loss, *grads

    got = graded(lambda a: call(a, bits, impl=impl, chunk=CHECKS.chunk(shape, impl)))
    want = graded(lambda a: plain(*a, bits))
    for name, a, right in zip(("loss", *NAMES), got, want):
        if name == "weights":
            a, right = jnp.where(used, a, 0.0), jnp.where(used, right, 0.0)
        assert_close(a, right, 1e-5)
    assert not np.asarray(got[1])[1, 97:].any()


def arrays_of(jaxpr):
    """Shapes and types of everything that a program computes, inner programs included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars if hasattr(v.aval, "shape"))
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from arrays_of(inner)


def test_check_9_memory():
    """Temporaries of loss and gradients take less than half of the plain head's, and no array has a
    bit axis of all tokens, let alone 2^d entries for each."""
    shape = (1, 8192, 256, 16, 0)
    inputs = jax.eval_shape(lambda: tensors(shape, jnp.bfloat16))
    bits = jax.ShapeDtypeStruct((1, 8192, 1), jnp.uint32)

    def fused(*inputs):
        x, w, b, weights, scale, shift, bits = inputs
        options = dict(weights=weights, scale=scale, shift=shift, impl="xla")
        return bitwise_cross_entropy(x, w, b, bits, **options).sum()

    def unfused(*inputs):
        return plain(*inputs[:-1], packing.unpack(inputs[-1], 16)).sum()

    graded = [jax.value_and_grad(f, range(6)) for f in (fused, unfused)]
    size, other = (
        jax.jit(f).lower(*inputs, bits).compile().memory_analysis().temp_size_in_bytes
        for f in graded
    )
    assert size < other / 2, (size, other)
    made = [list(arrays_of(jax.make_jaxpr(f)(*inputs, bits).jaxpr)) for f in graded]
    logits = [[a for a in each if a.size >= 8192 * 16 and a.shape[-1] != 256] for each in made]
    assert not logits[0] and logits[1]
    assert max(a.size for a in made[0]) == 8192 * 256  # dx


@functools.partial(jax.jit, static_argnames="impl")
def sampled(x, w, b, uniforms, numbers, arrays, *, impl):
    """sample_bits; guidance, temperature and top-p are traced."""
    return sample_bits(x, w, b, uniforms, impl=impl, **numbers, **arrays)


def draw(z, uniforms, uncond=None, *, impl, **numbers):
    """Drawn bits of tokens [N, d] whose log odds are z: an identity for a head."""
    numbers = dict(guidance=1.0, temperature=1.0, top_p=1.0) | numbers
    d, arrays = z.shape[-1], dict(x_uncond=z if uncond is None else uncond)
    head = jnp.eye(d, dtype=jnp.float32), jnp.zeros(d)
    words, codes = sampled(z, *head, uniforms, numbers, arrays, impl=impl)
    bits = packing.unpack(words, d)
    np.testing.assert_array_equal(codes, packing.codes(bits))
    assert codes.dtype == jnp.float32
    return np.asarray(bits)


@pytest.mark.parametrize("impl", ["ref", *IMPLS])
def test_check_10_draws(impl):
    """z = 1 is drawn as 1 with probability sigmoid(1), to 3 standard errors; top-p 0.97 lets 3.47
    flip and 3.48 not; guidance and temperature act on log odds; all three are traced."""
    d, tokens = 16, 1000
    uniforms = jax.random.uniform(jax.random.key(0), (tokens, d))
    z = jnp.ones((tokens, d))
    one = lambda z: 1 / (1 + np.exp(-np.float32(z)))  # noqa: E731
    p, count = one(1.0), tokens * d
    assert abs(draw(z, uniforms, impl=impl).mean() - p) < 3 * (p * (1 - p) / count) ** 0.5
    for sign in (1, -1):
        may = draw(sign * 3.47 * z, uniforms, top_p=0.97, impl=impl)
        never = draw(sign * 3.48 * z, uniforms, top_p=0.97, impl=impl)
        assert 0 < (may != (sign > 0)).mean() < 0.06 and (never == (sign > 0)).all()
    # sigmoid(3.48) without top-p, of which the uniforms decide.
    np.testing.assert_array_equal(draw(3.48 * z, uniforms, impl=impl), uniforms < one(3.48))
    # z = (4 x 0.5 - 3 x 0.2) / 0.7 = 2.
    got = draw(0.5 * z, uniforms, 0.2 * z, guidance=4.0, temperature=0.7, impl=impl)
    np.testing.assert_array_equal(got, uniforms < one(2.0))
    # Temperature 0 is the likelier value; 0 itself is bit 0, as in the tokenizer.
    some = jnp.asarray(np.linspace(-1, 1, tokens * d).reshape(tokens, d), jnp.float32)
    np.testing.assert_array_equal(draw(some, uniforms, temperature=0.0, impl=impl), some > 0)
    assert not draw(0 * z, 0.5 * z, impl=impl).any()


@pytest.mark.parametrize("impl", ["ref", *IMPLS])
def test_check_10_guidance_of_one_is_none(impl):
    """Bits of guidance 1 are those without unconditional tokens; a modulation of their own is used
    for these; bits and codes equal the reference's."""
    x, w, b, _, scale, shift = tensors((2, 37, 24, 16, 16))
    other, modulation = tensors((2, 37, 24, 16, 16), seed=3), dict(scale=scale, shift=shift)
    uniforms = jax.random.uniform(jax.random.key(1), (2, 37, 16))

    def run(impl, numbers, **arrays):
        numbers = dict(guidance=3.0, temperature=0.5, top_p=0.97) | numbers
        return sampled(x, w, b, uniforms, numbers, modulation | arrays, impl=impl)

    uncond = dict(x_uncond=other[0])
    alone, _ = run(impl, dict(guidance=1.0))
    np.testing.assert_array_equal(run(impl, dict(guidance=1.0), **uncond)[0], alone)
    own = uncond | dict(scale_uncond=other[4], shift_uncond=other[5])
    found = [run(impl, {}, **arrays) for arrays in (uncond, own)]
    for (bits, codes), arrays in zip(found, (uncond, own)):
        want, right = run("ref", {}, **arrays)
        np.testing.assert_array_equal(bits, want)
        np.testing.assert_array_equal(codes, right)
    assert (found[0][0] != found[1][0]).any() and (found[0][0] != alone).any()


EIGHT = """
import os
os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
import jax, json, numpy as np
from tests.kernels import test_bitwise as t
from training import sharding
from kernels.bitwise import sample_bits
x, w, b, weights, scale, shift = t.tensors((4, 16, 24, 64, 8))
uniforms = jax.random.uniform(jax.random.key(1), (4, 16, 64))
def run(x, u):
    options = dict(x_uncond=2 * x, guidance=3.0, top_p=0.97, scale=scale, shift=shift)
    return sample_bits(x, w, b, u, **options)
def flat(x, u):
    return sample_bits(x.reshape(64, 24), w, b, u.reshape(64, 64))
alone = [np.asarray(jax.jit(f)(x, uniforms)[0]) for f in (run, flat)]
with sharding.scope(sharding.make_mesh(dict(data=2, fsdp=2, tensor=1, seq=2))):
    for f, want in zip((run, flat), alone):
        lowered = jax.jit(f).lower(x, uniforms)
        assert "manual" in lowered.as_text()
        bits, codes = lowered.compile()(x, uniforms)
        print(json.dumps([jax.device_count(), bool((np.asarray(bits) == want).all())]))
"""


def test_check_10_same_bits_on_eight_devices():
    """Rows, tokens and tokens without rows cut over 8 devices draw what one device draws."""
    assert in_a_process("-c", EIGHT) == [[8, True], [8, True]]


@pytest.mark.parametrize("dtype, near, far", [("bfloat16", 5e-6, 1e-4), ("float32", 1e-6, 2e-5)])
def test_a_large_common_part_costs_digits(dtype, near, far):
    """What docs/kernels.md says of w's gradient: a kernel that multiplies x as it is loses digits
    where a row's mean is 30 standard deviations; xla, which normalises first, keeps them."""

    def gradient(inputs, impl):
        total = lambda w: call([inputs[0], w, *inputs[2:]], impl=impl, chunk=128).sum()  # noqa: E731
        return jax.grad(total)(inputs[1])

    x, *rest = tensors((1, 150, 128, 32, 128))
    for mean, tolerance in ((0.0, near), (30.0, far)):
        shown = (x + mean).astype(dtype)
        want = gradient([shown.astype(jnp.float32), *rest], "ref")
        assert_close(gradient([shown, *rest], "tpu_interpret"), want, tolerance)
        assert_close(gradient([shown, *rest], "xla"), want, 1e-6)


@pytest.mark.parametrize("d", [8, 33, 64])
def test_check_12_words(d):
    """Packed words are Python's integers, bit i worth 2^i; no type of 64 bits appears."""
    bits = some_bits(3, 5, d)
    words = packing.pack(jnp.asarray(bits))
    assert words.dtype == jnp.uint32 and words.shape == (3, 5, -(-d // 32))
    exact = [sum(int(bit) << i for i, bit in enumerate(row)) for row in bits.reshape(-1, d)]
    got = [sum(int(x) << 32 * i for i, x in enumerate(row)) for row in words.reshape(15, -1)]
    assert got == exact
    unpacked = packing.unpack(words, d)
    assert unpacked.dtype == jnp.int32
    np.testing.assert_array_equal(unpacked, bits)
    np.testing.assert_array_equal(packing.pack(jnp.asarray(bits) > 0), words)
    np.testing.assert_allclose(packing.codes(unpacked), (2 * bits - 1) / d**0.5, rtol=1e-6)
    with pytest.raises(ValueError, match=f"{d} bits take {words.shape[-1]} words"):
        packing.unpack(jnp.concatenate([words, words], -1), d)


@pytest.mark.parametrize("impl", ["ref", *IMPLS, "gpu_interpret"])
def test_check_12_no_numbers_of_64_bits(impl):
    """d = 64 where JAX has them (jax_enable_x64): no number of a token or a bit takes 64 bits, in
    the loss with its gradients and in a draw; only counters and places of blocks may."""
    x, *rest = tensors((1, 5, 24, 64, 4))
    inputs = [x.astype(jnp.bfloat16) if impl == "gpu_interpret" else x, *rest]
    bits, uniforms = some_bits(1, 5, 64), jnp.full((1, 5, 64), 0.5, jnp.float32)

    def loss(inputs):
        return call(inputs, bits, impl=impl).sum()

    def drawn(inputs):
        return sample_bits(*inputs[:3], uniforms, x_uncond=inputs[0], guidance=3.0, impl=impl)

    with jax.enable_x64(True):
        for f in (jax.grad(loss), drawn):
            wide = [a for a in arrays_of(jax.make_jaxpr(f)(inputs).jaxpr) if a.dtype.itemsize > 4]
            assert all(a.shape == () for a in wide), wide
        words, codes = jax.eval_shape(drawn, inputs)
    assert (words.shape, words.dtype) == ((1, 5, 2), jnp.uint32)
    assert (codes.shape, codes.dtype) == ((1, 5, 64), jnp.float32)


@pytest.mark.parametrize("impl", ["ref", *IMPLS])
def test_extreme_log_odds(impl):
    """Log odds of ±1e4, bfloat16: finite loss and gradients; the wrong bit costs |z|, the right one
    nothing."""
    x = jnp.full((1, 4, 16), 100.0, jnp.bfloat16)
    w = jnp.where(jnp.arange(16) < 8, 6.25, -6.25) * jnp.ones((16, 1))
    given, right = [x, w, jnp.zeros(16), jnp.ones((1, 4))], np.arange(16) < 8
    total = jax.jit(
        jax.value_and_grad(lambda g, words: jitted(g, words, impl=impl, chunk=None).sum())
    )
    for bits, want in ((right, 0.0), (~right, 1e4)):
        loss, grads = total(given, packed(np.broadcast_to(bits, (1, 4, 16))))
        assert loss == pytest.approx(4 * want)
        assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in grads)


@pytest.mark.parametrize("d, modulation", [(8, True), (56, True), (56, False)])
def test_checks_1_to_3_gpu_equals_ref(d, modulation):
    """The three Hopper kernels in the interpreter: two overlapping blocks, channels that are not
    whole pieces, bits that stand twice and that do not. Of bfloat16 only dx is rounded to it."""
    inputs, bits = tensors((1, 72, 72, d, 0), jnp.bfloat16), some_bits(1, 72, d)
    inputs = inputs if modulation else inputs[:4]
    uniforms = jax.random.uniform(jax.random.key(1), (1, 72, d))
    cotangent = jnp.cos(jnp.arange(72.0))

    def run(impl, inputs):
        def total(inputs):
            loss = call(inputs, bits, impl=impl)
            return (loss * cotangent).sum(), loss

        x, w, b, _, *rest = inputs
        numbers = dict(guidance=3.0, top_p=0.97)
        arrays = dict(zip(NAMES[4:], rest), x_uncond=0.5 * x)
        drawn = sampled(x, w, b, uniforms, numbers, arrays, impl=impl)
        return jax.jit(jax.grad(total, has_aux=True))(inputs), drawn

    (grads, loss), drawn = run("gpu_interpret", inputs)
    (want_grads, want), right = run("ref", [a.astype(jnp.float32) for a in inputs])
    assert_close(loss, want, 1e-5)
    for name, a, b in zip(NAMES, grads, want_grads):
        assert_close(a, b, 1e-2 if name == "x" else 1e-5)
    for a, b in zip(drawn, right):
        np.testing.assert_array_equal(a, b)


LENGTH = 10521  # tokens of a picture of a megapixel
HEADS = [(2048, 32), (2048, 8), (2048, 64), (3584, 56)]  # channels, bits: 2B's first, 8B's last


def head(topology, channels, d):
    """(inputs of a generator's head for one picture of a megapixel, words, uniforms, the context):
    abstract, on an absent device."""
    device, mesh = abstract_on(topology)
    place = jax.sharding.SingleDeviceSharding(device)

    def array(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    row = array(1, channels)
    inputs = [array(1, LENGTH, channels, dtype=jnp.bfloat16), array(channels, d), array(d)]
    inputs += [array(1, LENGTH), row, row]
    words = array(1, LENGTH, packing.words(d), dtype=jnp.uint32)
    return inputs, words, array(1, LENGTH, d), mesh


def graded(impl, inputs, words):
    """Gradients of the loss's sum to all inputs."""

    def total(inputs):
        x, w, b, *rest = inputs
        options = dict(zip(NAMES[3:], rest), impl=impl)
        return bitwise_cross_entropy(x, w, b, words, **options).sum()

    return jax.grad(total)(inputs)


def guided(impl, inputs, uniforms, numbers):
    """Draws with guidance, temperature and top-p that are arguments of the program."""
    x, w, b, _, scale, shift = inputs
    options = dict(zip(("guidance", "temperature", "top_p"), numbers), scale=scale, shift=shift)
    return sample_bits(x, w, b, uniforms, x_uncond=x, impl=impl, **options)


@pytest.mark.aot
@pytest.mark.parametrize(
    "topology, channels, d",
    [
        *(("v5e:2x2", *sizes) for sizes in HEADS),
        *((x, *HEADS[0]) for x in ("v5p:2x2x1", "v6e:2x2")),
    ],
)
def test_check_6_tpu_compiles_at_the_heads_shapes(topology, channels, d):
    """10,521 tokens, which no block divides: one kernel forward, one backward, one for draws; what
    is stored beside arguments and results is less than a twentieth of x."""
    pytest.importorskip("libtpu", reason="needs the aot extra")
    inputs, words, uniforms, mesh = head(topology, channels, d)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=uniforms.sharding)
    with mesh:
        run = jax.jit(functools.partial(graded, "auto"))
        gradient = run.lower(inputs, words).compile()
        run = jax.jit(functools.partial(guided, "auto"))
        draws = run.lower(inputs, uniforms, [number] * 3).compile()
    for compiled, names in ((gradient, ("forward", "backward")), (draws, ("sample",))):
        lines = compiled.as_text().splitlines()
        calls = [x for x in lines if 'custom_call_target="tpu_custom_call"' in x]
        assert len(calls) == len(names)
        assert all(any(f"bitwise_{name}" in x for x in calls) for name in names)
        size = compiled.memory_analysis().temp_size_in_bytes
        assert size < LENGTH * channels * 2 / 20, size


@pytest.mark.aot
@pytest.mark.parametrize("channels, d", HEADS)
def test_check_6_hopper_compiles_at_the_heads_shapes(channels, d):
    """One kernel forward, two with the gradient, one for draws; at lengths that are not a multiple
    of 8 x and dx are copied."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the aot extra")
    from training import topology

    inputs, words, uniforms, mesh = head("h100:1", channels, d)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=uniforms.sharding)
    options = topology.compiler_options(topology.parse("h100:1"))
    programs = ((2, graded, inputs, words), (1, guided, inputs, uniforms, [number] * 3))
    with mesh:
        for count, run, *arrays in programs:
            traced = jax.jit(functools.partial(run, "gpu")).trace(*arrays)
            compiled = traced.lower(lowering_platforms=("cuda",)).compile(options)
            assert compiled.as_text().count('custom_call_target="mosaic_gpu') == count


def test_mistakes_are_named():
    x, w, b, weights, scale, shift = tensors(SHAPES[1])
    bits = packing.pack(jnp.asarray(some_bits(2, 37, 16)))
    with pytest.raises(ValueError, match="impl='cuda', allowed: auto, ref, xla"):
        bitwise_cross_entropy(x, w, b, bits, impl="cuda")
    with pytest.raises(ValueError, match=r"takes x.*bits \(2, 37, 2\)"):
        bitwise_cross_entropy(x, w, b, jnp.concatenate([bits, bits], -1))
    with pytest.raises(ValueError, match="both or neither"):
        bitwise_cross_entropy(x, w, b, bits, scale=scale)
    with pytest.raises(ValueError, match="not empty"):
        bitwise_cross_entropy(x[:, :0], w, b, bits[:, :0])
    draws = functools.partial(sample_bits, x, w, b, jnp.zeros((2, 37, 16)), x_uncond=x)
    with pytest.raises(ValueError, match="both or neither"):
        draws(scale=scale, shift=shift, shift_uncond=shift)
    with pytest.raises(ValueError, match="need scale and shift"):
        draws(scale_uncond=scale, shift_uncond=shift)
    with pytest.raises(NotSupported, match="multiple of 128, not 16"):
        bitwise_cross_entropy(x, w, b, bits, chunk=16, impl="tpu_interpret")
    wide = jnp.zeros((2, 37, 3), jnp.uint32)
    with pytest.raises(NotSupported, match="up to 64 bits, not 70"):
        bitwise_cross_entropy(x, jnp.zeros((24, 70)), jnp.zeros(70), wide, impl="tpu_interpret")
    with pytest.raises(NotSupported, match="on GPU takes bfloat16, not float32"):
        bitwise_cross_entropy(x, w, b, bits, impl="gpu")
    with pytest.raises(NotSupported, match="takes Hopper"):
        bitwise_cross_entropy(x.astype(jnp.bfloat16), w, b, bits, impl="gpu")
    with pytest.raises(ValueError, match="guidance=3.0 needs x_uncond"):
        sample_bits(x, w, b, jnp.zeros((2, 37, 16)), guidance=3.0)
