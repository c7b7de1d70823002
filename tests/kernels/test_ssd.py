"""SSD: transformers' Mamba-2 functions, chunks against the recurrence, strong decays, documents,
masked tokens, the accelerators' compilers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.errors import NotSupported
from kernels.ssd import ssd, ssd_step
from tests.golden import recipes
from tests.kernels.seven_checks import SevenChecks, abstract_on, assert_close

# (B, T, H, P, G, N, chunk): one token, odd lengths, chunks that do not divide them, P = 1, N = 130.
SHAPES = [
    (1, 1, 2, 4, 1, 4, 4),
    (2, 37, 16, 12, 2, 8, 16),  # eight heads of a group side by side in the lanes of a TPU
    (1, 20, 2, 1, 2, 5, 7),
    (1, 19, 3, 3, 1, 130, 64),
]
NAMES = ("x", "delta", "z", "B", "C", "A", "D", "delta_bias")
PER_TOKEN = 5  # of these; the rest are weights
CHUNKED = ("xla", "tpu_interpret")


def tensors(shape, dtype=jnp.float32, seed=0):
    """Inputs in the order of NAMES."""
    b, t, h, p, g, n, _ = shape
    keys = jax.random.split(jax.random.key(seed), 8)
    sizes = [(b, t, h, p), (b, t, h), (b, t, h, p), (b, t, g, n), (b, t, g, n), (h,), (h,), (h,)]
    made = [jax.random.normal(key, size) for key, size in zip(keys, sizes)]
    made[5] = -jnp.exp(made[5])
    return [a.astype(dtype) for a in made[:PER_TOKEN]] + made[PER_TOKEN:]


def some_state(shape, dtype=jnp.float32, seed=7):
    b, _, h, p, _, n, _ = shape
    return jax.random.normal(jax.random.key(seed), (b, h, p, n)).astype(dtype)


def call(inputs, h0=None, **options):
    """ssd of `tensors`."""
    named = dict(zip(NAMES, inputs))
    given = [named.pop(name) for name in ("x", "delta", "A", "B", "C", "D")]
    if options.get("impl") == "ref":
        options.pop("chunk", None)
    return ssd(*given, h0=h0, **(named | options))


@pytest.mark.parametrize("impl", ["xla", "tpu_interpret", "gpu_interpret"])
def test_gradient_of_A_does_not_cancel_in_bfloat16(impl):
    """Sums over a whole row whose roundings differ once left 3 % of it to chance."""
    shape = (1, 400, 8, 64, 1, 64, None)
    x, delta, _, B, C, *_ = (a.astype(jnp.bfloat16) for a in tensors(shape))
    delta, A = delta.astype(jnp.float32), -jnp.linspace(1.0, 16.0, 8)
    weight = jax.random.normal(jax.random.key(8), x.shape)

    def gradient(impl, *inputs):
        def total(A):
            y, _ = ssd(inputs[0], delta, A, *inputs[1:], jnp.zeros(8), impl=impl)
            return (y.astype(jnp.float32) * weight).sum()

        return jax.jit(jax.grad(total))(A)

    want = gradient("ref", *(a.astype(jnp.float32) for a in (x, B, C)))
    off = jnp.linalg.norm(gradient(impl, x, B, C) - want) / jnp.linalg.norm(want)
    assert off < 0.01


class TestSSD(SevenChecks):
    """Checks 1 to 5; of the specification 3, and 9's sequence-parallel scan."""

    AXIS = 1
    SHAPES = SHAPES
    IMPLS = CHUNKED
    # The second: two heads side by side; the third: one at a time.
    GRADIENT_SHAPES = (SHAPES[1], (1, 50, 4, 96, 2, 192, 32), (1, 50, 3, 96, 1, 192, 32))
    MESHES = (
        ("xla", dict(data=2, fsdp=1, tensor=2, seq=2)),
        ("xla", dict(data=1, fsdp=1, tensor=1, seq=8)),
        ("xla", dict(data=1, fsdp=1, tensor=8, seq=1)),  # more devices than groups: each its own
        ("tpu_interpret", dict(data=1, fsdp=2, tensor=1, seq=4)),
    )
    MESH_SHAPE = (2, 64, 8, 12, 2, 8, 16)

    inputs = staticmethod(tensors)

    def state(self, shape, dtype=jnp.float32):
        return (some_state(shape, dtype),)

    def run(self, inputs, state, **options):
        y, h = call(inputs, *state, **options)
        return y, (h,)

    def step(self, inputs, state):
        x, delta, z, B, C, A, D, bias = inputs
        y, h = ssd_step(x, delta, A, B, C, D, *state, z=z, delta_bias=bias)
        return y, (h,)

    def cut(self, inputs, start, stop):
        tokens, weights = inputs[:PER_TOKEN], inputs[PER_TOKEN:]
        return super().cut(tokens, start, stop) + weights

    def token(self, inputs, t):
        return super().token(inputs[:PER_TOKEN], t) + inputs[PER_TOKEN:]

    def chunk(self, shape, impl):
        return shape[-1] if impl == "xla" else -(-shape[-1] // 16) * 16


CHECKS = TestSSD()


@pytest.mark.parametrize("impl", ["ref", *CHUNKED])
def test_check_3_equals_transformers(impl):
    """Scan, step, last state and every gradient of the package, float32 (tests/golden)."""
    golden = recipes.load("ssd")
    sizes = dict(x=(2, 23, 4, 6), delta=(2, 23, 4), A=(4,), B=(2, 23, 2, 5), C=(2, 23, 2, 5))
    sizes |= dict(D=(4,), delta_bias=(4,), h0=(2, 4, 6, 5))
    given = {k: jnp.asarray(recipes.normal(n, *s)) for n, (k, s) in enumerate(sizes.items(), 1)}
    given["A"] = -jnp.exp(given["A"])
    options = {} if impl == "ref" else dict(chunk=16)
    cotangents = recipes.normal(10, 2, 23, 4, 6), recipes.normal(11, 2, 4, 6, 5)

    def loss(given):
        y, h = ssd(**given, impl=impl, **options)
        return sum((a * b).sum() for a, b in zip((y, h), cotangents)), (y, h)

    grads, (y, h) = jax.grad(loss, has_aux=True)(given)
    assert_close(y, golden["y"], 1e-6)
    assert_close(h, golden["h"], 1e-6)
    for name, grad in grads.items():
        assert_close(grad, golden[f"d{name}"], 1e-5)
    one = {k: a[:, 0] if k in ("x", "delta", "B", "C") else a for k, a in given.items()}
    del one["h0"]
    y, h = ssd_step(**one, h=h, z=jnp.asarray(recipes.normal(9, 2, 4, 6)))
    assert_close(y, golden["step_y"], 1e-6)
    assert_close(h, golden["step_h"], 1e-6)


DECAYS = {
    "ordinary": lambda rng, size: rng.standard_normal(size),
    "half of the tokens forget all": lambda rng, size: np.where(rng.random(size) < 0.5, 8.0, -7.0),
    # Sums of a chunk reach -51,000 before tokens that hardly decay.
    "long forgetting before": lambda rng, size: np.broadcast_to(
        np.where(np.arange(size[1])[:, None] % 128 < 64, 50.0, -9.0), size
    ),
}


@pytest.mark.parametrize("impl", CHUNKED)
@pytest.mark.parametrize("draw", DECAYS.values(), ids=DECAYS)
def test_check_1_strong_decays(impl, draw):
    """A = -16 (Mamba-2's largest at the start): float32 within 1e-6 of the recurrence in float64,
    and the gradients within 1e-5; those of A and the bias, which add up what is left of differences
    of sums over all tokens, within 5e-4 and 5e-5."""
    rng, shape = np.random.default_rng(0), (1, 256, 4, 32, 1, 16)
    b, t, h, p, g, n = shape
    sizes = [(b, t, h, p), (b, t, h, p), (b, t, g, n), (b, t, g, n)]
    x, z, B, C = (rng.standard_normal(size).astype(np.float32) for size in sizes)
    delta = draw(rng, (b, t, h)).astype(np.float32)
    inputs = [x, delta, z, B, C, np.full(h, -16.0, np.float32), np.ones(h, np.float32)]
    inputs = [*inputs, np.zeros(h, np.float32)]

    def run(inputs, impl):
        def loss(inputs):
            y, h = call(inputs, chunk=128, impl=impl)
            return (y * x[..., ::-1]).sum() + h.sum(), (y, h)

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
        return out, grads

    got, grads = run([jnp.asarray(a) for a in inputs], impl)
    with jax.enable_x64(True):
        want, want_grads = run([jnp.asarray(a, jnp.float64) for a in inputs], "ref")
        want, want_grads = jax.tree.map(np.asarray, (want, want_grads))
    for a, right in zip(got, want):
        assert_close(a, right, 1e-6)
    tolerances = dict(A=5e-4, delta_bias=5e-5)
    for name, a, right in zip(NAMES, grads, want_grads):
        assert_close(a, right, tolerances.get(name, 1e-5))


@pytest.mark.parametrize("impl", ["ref", *CHUNKED])
@pytest.mark.parametrize("raw, length", [(50.0, 300), (-1e4, 300), (50.0, 1), (0.0, 300)])
def test_check_12_nothing_overflows(impl, raw, length):
    """Δ = 50, Δ = 0 exactly, one token, bfloat16, A = -16: finite values and gradients."""
    shape = (1, length, 2, 8, 1, 16, 128)
    inputs = tensors(shape, jnp.bfloat16)
    inputs[1] = jnp.full((1, length, 2), raw, jnp.bfloat16)
    inputs[5], inputs[7] = jnp.full(2, -16.0), jnp.zeros(2)

    def total(inputs, h0):
        y, h = call(inputs, h0, chunk=128, impl=impl)
        return y.astype(jnp.float32).sum() + h.sum(), (y, h)

    grad = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    found = grad(inputs, some_state(shape))
    for a in jax.tree.leaves(found):
        assert np.isfinite(np.asarray(a, np.float32)).all()
    if raw == -1e4:  # nothing is forgotten and nothing written
        np.testing.assert_array_equal(found[1][1], some_state(shape))


def test_packed_documents_equal_separate_ones():
    """Values and gradients in float64, boundaries inside chunks."""
    with jax.enable_x64(True):
        shape = (1, 37, 4, 12, 2, 8, 16)
        inputs = [a.astype(jnp.float64) for a in tensors(shape)]
        ends, options = (0, 13, 14, 30, 37), dict(chunk=16, impl="xla")
        numbers = jnp.asarray(np.repeat(np.arange(4), np.diff(ends)))[None]
        cotangent = jax.random.normal(jax.random.key(9), inputs[0].shape, jnp.float64)

        def packed(inputs):
            y, _ = call(inputs, segment_ids=numbers, **options)
            return (y * cotangent).sum(), y

        def separate(inputs):
            parts = [call(CHECKS.cut(inputs, a, b), **options)[0] for a, b in zip(ends, ends[1:])]
            y = jnp.concatenate(parts, 1)
            return (y * cotangent).sum(), y

        graded = (jax.jit(jax.grad(f, has_aux=True)) for f in (packed, separate))
        (got, y), (want, each) = (f(inputs) for f in graded)
        assert_close(y, each, 1e-13)
        assert np.abs(call(inputs, **options)[0] - each).max() > 1e-2  # the resets matter
        for a, b in zip(got, want):
            assert_close(a, b, 1e-12)


@pytest.mark.parametrize("impl", ["ref", *CHUNKED])
def test_masked_tokens_leave_the_state_alone(impl):
    """Right padding: what is masked changes no bit of the state, which is the short row's, and no
    gradient flows into it. (Programs of 20 and of 37 tokens may round differently.)"""
    shape = SHAPES[1]
    inputs, state = tensors(shape), some_state(shape)
    mask = jnp.arange(37)[None] < jnp.array([[37], [20]])
    options = dict(impl=impl, chunk=16)
    y, got = call(inputs, state, mask=mask, **options)
    others = [x.at[1, 20:].multiply(-3.0) for x in inputs[:PER_TOKEN]] + list(inputs[PER_TOKEN:])
    np.testing.assert_array_equal(got, call(others, state, mask=mask, **options)[1])
    want_y, want = call(CHECKS.cut(inputs, 0, 20), state, **options)
    assert_close(got[1], want[1], 1e-6)
    assert_close(y[1, :20], want_y[1], 1e-6)
    _, other = call(inputs, state, **options)
    np.testing.assert_array_equal(got[0], other[0])
    assert np.abs(other[1] - want[1]).max() > 1e-2
    _, same = call(inputs, state, mask=jnp.zeros_like(mask), **options)
    np.testing.assert_array_equal(same, state)
    grads = jax.grad(lambda inputs: call(inputs, state, mask=mask, **options)[1].sum())(inputs)
    for grad in grads[:PER_TOKEN]:
        assert not np.asarray(grad)[1, 20:].any()


def test_the_states_document():
    """A state of another document is not read; by default it is the first token's."""
    shape = SHAPES[1]
    inputs, state, numbers = tensors(shape), some_state(shape), jnp.full((2, 37), 5)
    options = dict(segment_ids=numbers, chunk=16, impl="xla")
    fresh, _ = call(inputs, state, state_segment=jnp.array([5, 4]), **options)
    goes_on, _ = call(inputs, state, **options)
    empty, _ = call(inputs, chunk=16, impl="xla")
    assert_close(fresh[0], goes_on[0], 1e-6)
    assert_close(fresh[1], empty[1], 1e-6)
    assert np.abs(goes_on[1] - empty[1]).max() > 1e-2


@pytest.mark.parametrize("packed", [False, True])
def test_checks_1_to_3_gpu_equals_ref(packed):
    """The two Hopper kernels in the interpreter: two chunks, padded heads, groups, documents, both
    states. bfloat16 in, so the measure is ref on the same numbers in float32."""
    shape = (1, 150, 4, 64, 2, 96, 128) if packed else (1, 256, 2, 64, 1, 128, 128)
    inputs, state = tensors(shape, jnp.bfloat16), some_state(shape)
    options = dict(segment_ids=CHECKS.documents(shape) if packed else None)
    cotangent = jax.random.normal(jax.random.key(9), inputs[0].shape)

    def run(impl, inputs):
        def total(inputs, state):
            return CHECKS.objective(inputs, (state,), cotangent, impl=impl, **options)

        return jax.jit(jax.grad(total, argnums=(0, 1)))(inputs, state), call(
            inputs, state, impl=impl, **options
        )

    grads, out = run("gpu_interpret", inputs)
    want_grads, want = run("ref", [a.astype(jnp.float32) for a in inputs])
    for got, right in zip(jax.tree.leaves((out, grads)), jax.tree.leaves((want, want_grads))):
        assert_close(got, right, 2e-2)


def test_check_3_tpu_gradients_of_bfloat16():
    """The kernels' gradients beside the recurrence's of the same numbers in float32."""
    shape = SHAPES[1]
    inputs, state = tensors(shape, jnp.bfloat16), CHECKS.state(shape)
    options = dict(chunk=16)
    got = CHECKS.gradient(inputs, state, impl="tpu_interpret", **options)
    wide = [a.astype(jnp.float32) for a in inputs]
    want = CHECKS.gradient(wide, state, impl="ref", **options)
    CHECKS.assert_trees_close(got, want, 2e-2)


def mamba_1_3b(topology, length=8192):
    """(array, inputs of one row of Mamba-2 1.3B, the context): abstract, on an absent device."""
    device, mesh = abstract_on(topology)
    place = jax.sharding.SingleDeviceSharding(device)

    def array(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    wide, shared = array(1, length, 64 * 64), array(1, length, 1, 128)
    weights = [array(64, dtype=jnp.float32)] * 3
    return array, [wide, array(1, length, 64), wide, shared, shared, *weights], mesh


def by_heads(inputs):
    """x and z as projections give them, with heads of 64."""
    return [a.reshape(*a.shape[:-1], 64, 64) if a.shape[-1] == 4096 else a for a in inputs]


def gradient(inputs, numbers, state, impl="auto"):
    """Of outputs and state to all."""

    def total(inputs, state):
        y, h = call(by_heads(inputs), state, segment_ids=numbers, impl=impl)
        return (y.astype(jnp.float32) ** 2).sum() + h.sum()

    return jax.grad(total, argnums=(0, 1))(inputs, state)


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_check_6_tpu_compiles_at_the_1_3b_shape(topology):
    """Forward and backward, with documents: three kernels; nothing is repeated for heads.
    impl="auto" chooses."""
    pytest.importorskip("libtpu", reason="needs the aot extra")
    array, inputs, mesh = mamba_1_3b(topology)
    numbers, state = array(1, 8192, dtype=jnp.int32), array(1, 64, 64, 128, dtype=jnp.float32)
    with mesh:
        compiled = jax.jit(gradient).lower(inputs, numbers, state).compile()
        run = jax.jit(lambda a: call(by_heads(a), impl="tpu")[0].reshape(a[0].shape))
        forward = run.lower(inputs).compile()
        step = [array(1, *a.shape[2:]) for a in inputs[:PER_TOKEN]] + inputs[PER_TOKEN:]
        run = jax.jit(lambda a, h: CHECKS.step(by_heads(a), h), donate_argnums=1)
        one = run.lower(step, (state,)).compile()
    calls = [
        x for x in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in x
    ]
    kernels = [f"ssd_{name}" for name in ("forward", "states", "backward")]
    assert [sum(name in x for x in calls) for name in kernels] == [1, 1, 1]
    tokens = 8192 * 64 * 64 * 2  # bytes of x; heads are neither transposed nor padded
    assert forward.memory_analysis().temp_size_in_bytes < 2 * tokens
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * tokens
    assert one.memory_analysis().alias_size_in_bytes >= 4 * 64 * 64 * 128


@pytest.mark.aot
def test_check_6_hopper_compiles_at_the_1_3b_shape():
    """Forward and backward, with documents: two kernels forward, five backward."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the aot extra")
    from training import topology

    array, inputs, mesh = mamba_1_3b("h100:1")
    numbers, state = array(1, 8192, dtype=jnp.int32), array(1, 64, 64, 128, dtype=jnp.float32)
    with mesh:
        graded = jax.jit(functools.partial(gradient, impl="gpu"))
        lowered = graded.trace(inputs, numbers, state).lower(lowering_platforms=("cuda",))
        compiled = lowered.compile(topology.compiler_options(topology.parse("h100:1")))
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 2 + 5


def test_memory_of_the_gradient_is_flat_in_scores():
    """Four times the tokens: at most about four times the temporaries, no T x T array."""

    def temporaries(length):
        shape = (1, length, 4, 16, 1, 16, 64)
        inputs = jax.eval_shape(lambda: tensors(shape))
        grad = jax.grad(lambda *a: call(a, chunk=64, impl="xla")[0].sum(), argnums=range(8))
        return jax.jit(grad).lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(4096)
    assert long < 5 * short and long < 2 * 4096 * 4096


def test_mistakes_are_named():
    inputs = tensors(SHAPES[1])
    with pytest.raises(ValueError, match="impl='cuda', allowed: auto, ref, xla, tpu"):
        call(inputs, impl="cuda")
    with pytest.raises(ValueError, match=r"ssd takes x, z \[B,T,H,P\]"):
        call([*inputs[:5], inputs[5][:-1], *inputs[6:]])
    with pytest.raises(ValueError, match="G dividing H"):
        call([*inputs[:3], *(jnp.repeat(a, 3, axis=2) for a in inputs[3:5]), *inputs[5:]])
    with pytest.raises(ValueError, match="T > 0"):
        call(CHECKS.cut(inputs, 0, 0))
    with pytest.raises(NotSupported, match="ssd on GPU takes bfloat16, not float32"):
        call(inputs, impl="gpu")
    narrow = [a.astype(jnp.bfloat16) for a in inputs[:PER_TOKEN]] + inputs[PER_TOKEN:]
    with pytest.raises(NotSupported, match="takes Hopper"):
        call(narrow, impl="gpu")
    with pytest.raises(NotSupported, match="chunks of 128, not 64"):
        call(narrow, impl="gpu_interpret", chunk=64)
    with pytest.raises(NotSupported, match="multiple of 16, not 7"):
        call(inputs, impl="tpu_interpret", chunk=7)
