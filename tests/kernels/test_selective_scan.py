"""Selective scan: golden values of the specification, every implementation against the recurrence,
transformers' functions, documents that start from a state, masked tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.static_ops import selective_scan as static_ops
from kernels.errors import NotSupported
from kernels.selective_scan import selective_scan, selective_scan_step, xla
from kernels.selective_scan.ref import Inputs
from tests.golden import make_scan, recipes
from tests.kernels.seven_checks import SevenChecks, abstract_on, assert_close

# (B, T, E, N, chunk): one token, odd lengths, chunks that do not divide them, E = 1 and 130.
SHAPES = [
    (1, 1, 4, 4, 4),
    (2, 37, 8, 16, 16),
    (1, 20, 1, 5, 7),
    (1, 19, 130, 16, 64),
]
PER_TOKEN = 5  # of the inputs below; the rest are weights
NAMES = ("u", "delta", "z", "B", "C", "A", "D", "delta_bias", "reset_to")
IMPLS = ("xla", "tpu_interpret")


def tensors(shape, dtype=jnp.float32, seed=0):
    """u, delta, z, B, C, A, D, bias, reset state."""
    b, t, e, n, _ = shape
    keys = jax.random.split(jax.random.key(seed), 9)
    sizes = [(b, t, e)] * 3 + [(b, t, n)] * 2 + [(e, n), (e,), (e,), (b, e, n)]
    made = [jax.random.normal(key, size) for key, size in zip(keys, sizes)]
    made[5] = -jnp.exp(made[5])
    return [x.astype(dtype) for x in made[:PER_TOKEN]] + made[PER_TOKEN:]


def scan(inputs, h0=None, **options):
    """selective_scan of `tensors`."""
    u, delta, z, B, C, A, D, bias, reset = inputs
    given = dict(z=z, delta_bias=bias, h0=h0, reset_to=reset)
    return selective_scan(u, delta, A, B, C, D, **(given | options))


class TestSelectiveScan(SevenChecks):
    """Checks 1 to 5, and 3 and 9 of the specification."""

    AXIS = 1
    SHAPES = SHAPES
    IMPLS = IMPLS
    GRADIENT_SHAPES = (SHAPES[1], SHAPES[3])
    MESHES = (
        ("xla", dict(data=2, fsdp=1, tensor=2, seq=2)),
        ("xla", dict(data=1, fsdp=1, tensor=1, seq=8)),
        ("tpu_interpret", dict(data=1, fsdp=2, tensor=2, seq=2)),
    )
    MESH_SHAPE = (2, 64, 8, 16, 32)

    inputs = staticmethod(tensors)

    def state(self, shape, dtype=jnp.float32):
        b, _, e, n, _ = shape
        return (jax.random.normal(jax.random.key(7), (b, e, n)).astype(dtype),)

    def run(self, inputs, state, **options):
        if options.get("impl") == "ref":
            options.pop("chunk", None)
        y, h = scan(inputs, *state, **options)
        return y, (h,)

    def step(self, inputs, state):
        u, delta, z, B, C, A, D, bias, _ = inputs
        y, h = selective_scan_step(u, delta, A, B, C, D, *state, z=z, delta_bias=bias)
        return y, (h,)

    def chunk(self, shape, impl):
        return shape[-1] if impl == "xla" else 32

    def cut(self, inputs, start, stop):
        tokens, weights = inputs[:PER_TOKEN], inputs[PER_TOKEN:]
        return super().cut(tokens, start, stop) + weights

    def token(self, inputs, t):
        return super().token(inputs[:PER_TOKEN], t) + inputs[PER_TOKEN:]


CHECKS = TestSelectiveScan()


def fill(c, *shape):
    """sin(c + 1.3 i + 0.7 j + 0.31 k), as section 2.11 of the specification."""
    return jnp.asarray(np.sin(c + sum(s * x for s, x in zip((1.3, 0.7, 0.31), np.indices(shape)))))


@pytest.mark.parametrize("options", [dict(impl="ref"), dict(chunk=2), dict(chunk=8)])
def test_check_1_golden_values(options):
    """Section 2.11: output, last state, loss and sums of gradients; float32 to 1e-6, float64 to
    the digits given."""
    for wide in (False, True):
        with jax.enable_x64(wide):
            dtype = jnp.float64 if wide else jnp.float32
            u, delta, z = (fill(c, 1, 5, 3).astype(dtype) for c in (0.1, 0.2, 0.3))
            B, C = (fill(c, 1, 5, 2).astype(dtype) for c in (0.4, 0.5))
            c = jnp.arange(3, dtype=dtype)
            A = -(jnp.arange(2, dtype=dtype) + 1) * (1 + 0.1 * c[:, None])
            D, bias, cotangent = 1 + 0.1 * c, -1 + 0.2 * c, fill(0.6, 1, 5, 3).astype(dtype)

            def loss(cotangent, u, delta, z, B, C, A, D, bias):
                out, h = selective_scan(u, delta, A, B, C, D, z=z, delta_bias=bias, **options)
                return (out * cotangent).sum(), (out, h)

            run = jax.value_and_grad(loss, argnums=tuple(range(1, 9)), has_aux=True)
            (value, (out, h)), grads = run(cotangent, u, delta, z, B, C, A, D, bias)
            exact = dict(rtol=0, atol=6e-11 if wide else 2e-6)
            np.testing.assert_allclose(out.sum(), 11.1952908167, **exact)
            np.testing.assert_allclose(value, 8.8272474003, **exact)
            row = [0.0018219847, 0.0270460232, 0.1181280035]
            # The last digit given of the third number is not the recurrence's: 0.1181280036.
            np.testing.assert_allclose(out[0, 4], row, rtol=0, atol=2e-10 if wide else 1e-6)
            last = [0.53277966, 0.15361985, 0.52097455, 0.17181931, 0.44831198, 0.16681370]
            np.testing.assert_allclose(h.ravel(), last, rtol=0, atol=6e-9 if wide else 1e-6)
            sums = (10.84229605, 2.93952270, 12.64238602, 5.56973106, 5.64648902, 0.47547232)
            sums += (3.61218233, 2.93952270)
            for name, grad, want in zip(NAMES, grads, sums):
                np.testing.assert_allclose(
                    grad.sum(), want, rtol=0 if wide else 1e-6, atol=6e-9 if wide else 1e-6,
                    err_msg=name,
                )  # fmt: skip


@pytest.mark.parametrize("length", make_scan.LENGTHS)
@pytest.mark.parametrize("state", [False, True])
def test_check_3_equals_transformers(length, state):
    """Its scan, from 0, and its single step, from a state; float32, 1e-5."""
    golden, x = recipes.load("scan"), given(length)
    h0, mark = (x.pop("h0"), "0") if state else (None, "")
    x.pop("h0", None)
    y, h = selective_scan(**x, h0=h0)
    assert_close(y, golden[f"y{mark}_{length}"], 1e-5)
    assert_close(h, golden[f"h{mark}_{length}"], 1e-5)
    if state and length < 64:
        for t in range(length):
            one = {k: v[:, t] if v.ndim == 3 else v for k, v in x.items()}
            out, h0 = selective_scan_step(**one, h=h0)
            assert_close(out, golden[f"y0_{length}"][:, t], 1e-5)
        assert_close(h0, golden[f"h0_{length}"], 1e-5)


@pytest.mark.parametrize("length", make_scan.GRADIENTS)
def test_check_3_gradients_equal_torch(length):
    """All of them, in float32 to 1e-6 of the largest entry of float64's."""
    golden, x = recipes.load("scan"), given(length)
    cotangent = jnp.asarray(make_scan.inputs(length)["cotangent"])

    def total(x):
        y, h = selective_scan(**x)
        return (y * cotangent).sum() + h.sum()

    grads = jax.grad(total)(x)
    grads["bias"] = grads.pop("delta_bias")
    assert grads.keys() == set(make_scan.NAMES)
    for name, grad in grads.items():
        assert_close(grad, golden[f"d_{name}_{length}"], 1e-6)


def given(length):
    """Arguments of selective_scan that tests/golden/make_scan.py used."""
    x = {k: jnp.asarray(v) for k, v in make_scan.inputs(length).items() if k != "cotangent"}
    x["delta_bias"] = x.pop("bias")
    return x


def test_check_3_associative_scan_inside_chunks():
    """What accelerators without a kernel of their own run, in float64: values and gradients."""
    with jax.enable_x64(True):
        inputs = [x.astype(jnp.float64) for x in tensors(SHAPES[1])]
        u, delta, z, B, C, A, D, bias, reset = inputs
        h0, fresh = CHECKS.state(SHAPES[1], jnp.float64)[0], CHECKS.documents(SHAPES[1]) == 1
        given = Inputs(u, delta, B, C, z, None, A, D, bias, h0, reset)

        def total(given, in_turn):
            given = given._replace(fresh=fresh)
            y, h = xla.selective_scan(given, chunk=16, in_turn=in_turn)
            return jnp.sin(y).sum() + (h * h).sum()

        got, want = (jax.value_and_grad(total)(given, x) for x in (False, True))
        CHECKS.assert_trees_close(got, want, 1e-12)


GPU_SHAPES = [(1, 100, 40, 16, 64), (2, 70, 32, 8, 64)]


@pytest.mark.parametrize("shape, packed", list(zip(GPU_SHAPES, (False, True))))
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_checks_1_to_3_gpu_equals_ref(shape, packed, dtype, tolerance):
    """The Hopper kernels in the interpreter, two tiles, padded channels and states: values and
    gradients of ref on the same numbers in float32."""
    inputs, state = tensors(shape, dtype), CHECKS.state(shape)
    options = dict(segment_ids=CHECKS.documents(shape) if packed else None)
    wide = [x.astype(jnp.float32) for x in inputs]
    y, last = CHECKS.run(inputs, state, impl="gpu_interpret", **options)
    want, want_last = CHECKS.run(wide, state, impl="ref", **options)
    assert y.dtype == dtype
    assert_close(y, want, tolerance)
    CHECKS.assert_states_close(last, want_last, 1e-5)
    got = CHECKS.gradient(inputs, state, impl="gpu_interpret", **options)
    want = CHECKS.gradient(wide, state, impl="ref", **options)
    CHECKS.assert_trees_close(got, want, tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-8)])
@pytest.mark.parametrize("gated", [True, False])
def test_check_4_a_gpu_step_is_the_definition(dtype, tolerance, gated):
    """In the interpreter; y is rounded to the type of u, the states are float32 either way."""
    shape = (3, 1, 64, 16, 1)
    u, delta, z, B, C, A, D, bias, _ = CHECKS.token(tensors(shape, dtype), 0)
    options = dict(z=z if gated else None, delta_bias=bias)
    one = (u, delta, A, B, C, D, *CHECKS.state(shape))
    y, h = selective_scan_step(*one, **options, impl="gpu_interpret")
    want, want_h = selective_scan_step(*one, **options, impl="ref")
    assert y.dtype == dtype
    assert_close(y, want, tolerance)
    assert_close(h, want_h, 1e-6)
    with pytest.raises(NotSupported, match="takes 16 states and a multiple of 32 channels"):
        selective_scan_step(u[:, :8], delta[:, :8], A[:8], B, C, D[:8], one[-1][:, :8], impl="gpu")
    with pytest.raises(NotSupported, match="takes Hopper"):
        selective_scan_step(*one, **options, impl="gpu")


def test_packed_documents_equal_separate_rows():
    """float64: values and gradients, every document from the reset state, boundaries inside
    chunks; what comes before a boundary does not matter, also where the state would overflow."""
    with jax.enable_x64(True):
        shape, ends = (1, 37, 5, 4, 16), (0, 13, 14, 30, 37)
        inputs = [x.astype(jnp.float64) for x in tensors(shape)]
        inputs[0] = inputs[0].at[:, 12].set(1e30)
        numbers = jnp.asarray(np.repeat(np.arange(4), np.diff(ends)))[None]
        cotangent = jax.random.normal(jax.random.key(9), inputs[0].shape, jnp.float64)
        cotangent = cotangent.at[:, 12].set(0.0)

        def packed(inputs):
            y, last = scan(inputs, inputs[-1], segment_ids=numbers, chunk=16)
            return (y * cotangent).sum() + last.sum(), (y.at[:, 12].set(0.0), last)

        def separate(inputs):
            parts = []
            for begin, end in zip(ends, ends[1:]):
                y, last = scan(CHECKS.cut(inputs, begin, end), inputs[-1], chunk=16)
                parts.append(y)
            y = jnp.concatenate(parts, 1)
            return (y * cotangent).sum() + last.sum(), (y.at[:, 12].set(0.0), last)

        (got, out), (want, each) = (jax.grad(f, has_aux=True)(inputs) for f in (packed, separate))
        CHECKS.assert_trees_close(out, each, 1e-13)
        assert np.abs(scan(inputs, chunk=16)[0][:, 13:] - each[0][:, 13:]).max() > 1e-2
        for a, b in zip(got, want):
            assert_close(a, b, 1e-12)


@pytest.mark.parametrize("impl", ["ref", *IMPLS, "gpu_interpret"])
def test_masked_tokens_leave_the_state_alone(impl):
    """Ragged rows: right padding gives the short row's state, exactly, and its gradients."""
    shape, lengths = SHAPES[1], (20, 37)
    inputs, (h0,) = tensors(shape), CHECKS.state(shape)
    inputs[1] = inputs[1].at[0, 20:].set(50.0)
    mask = jnp.arange(37) < jnp.asarray(lengths)[:, None]

    def last(inputs, **options):
        return scan(inputs, h0, impl=impl, **options)

    y, got = last(inputs, mask=mask)
    _, short = last(CHECKS.cut(inputs, 0, 20))
    _, long = last(inputs)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(got[0], short[0])
    np.testing.assert_array_equal(got[1], long[1])
    assert np.abs(long[0] - short[0]).max() > 1e-2
    if impl == "xla":
        grads = jax.grad(lambda x: last(x, mask=mask)[1].sum())(inputs)
        for grad in grads[:PER_TOKEN]:
            np.testing.assert_array_equal(grad[0, 20:], 0.0)


def test_the_states_document():
    """A state of another document is not read; by default it is the first token's."""
    shape = SHAPES[1]
    inputs, (h0,), numbers = tensors(shape), CHECKS.state(shape), jnp.full((2, 37), 5)
    options = dict(segment_ids=numbers, chunk=16)
    fresh, _ = scan(inputs, h0, state_segment=jnp.array([5, 4]), **options)
    goes_on, _ = scan(inputs, h0, **options)
    started, _ = scan(inputs, inputs[-1], chunk=16)
    assert_close(fresh[0], goes_on[0], 1e-6)
    assert_close(fresh[1], started[1], 1e-6)
    assert np.abs(goes_on[1] - started[1]).max() > 1e-2


@pytest.mark.parametrize(
    "raw, rate, length", [(50.0, 1.0, 64), (-1e30, 1.0, 64), (0.0, 16.0, 4096), (50.0, 16.0, 1)]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_check_12_nothing_overflows(raw, rate, length, dtype):
    """Large and vanishing steps, fast decays over many tokens: finite values and gradients."""
    inputs = tensors((1, length, 4, 16, 64), dtype)
    inputs[1] = jnp.full_like(inputs[1], raw)
    inputs[5] = jnp.full_like(inputs[5], -rate)

    def total(inputs):
        y, h = scan(inputs, jnp.ones((1, 4, 16)))
        return y.astype(jnp.float32).sum() + h.sum(), (y, h)

    grads, (y, h) = jax.jit(jax.grad(total, has_aux=True))(inputs)
    for x in (y, h, *grads):
        assert np.isfinite(np.asarray(x, np.float32)).all()
    if raw == -1e30:
        np.testing.assert_array_equal(h, 1.0)


def hymba(topology, length):
    """(inputs of a call with documents and a reset state, Hymba 1.5B's sizes, its context)."""
    device, mesh = abstract_on(topology)
    u, delta, A, B, C, D, z, bias = static_ops.arrays(device, length)
    place = u.sharding
    numbers = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=place)
    state = jax.ShapeDtypeStruct((1, *A.shape), jnp.float32, sharding=place)
    return [u, delta, z, B, C, A, D, bias, state], numbers, state, mesh


def packed_loss(inputs, numbers, h0, impl="auto"):
    y, h = scan(inputs, h0, segment_ids=numbers, impl=impl)
    return y.astype(jnp.float32).sum() + h.sum()


def memory_is_flat(compiled, length):
    """Far less than the states of all tokens, forward and backward."""
    states = 4 * length * static_ops.CHANNELS * static_ops.STATES
    return compiled.memory_analysis().temp_size_in_bytes < states / 4


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_checks_6_and_8_tpu_compiles_at_hymbas_shape(topology):
    """Forward and backward with documents: one kernel each; impl="auto" chooses."""
    pytest.importorskip("libtpu", reason="needs the aot extra")
    inputs, numbers, h0, mesh = hymba(topology, 8192)
    with mesh:
        gradient = jax.jit(jax.grad(packed_loss, argnums=(0, 2)))
        compiled = gradient.lower(inputs, numbers, h0).compile()
    text = compiled.as_text()
    calls = [x for x in text.splitlines() if 'custom_call_target="tpu_custom_call"' in x]
    names = [f"selective_scan_{name}" for name in ("forward", "backward")]
    assert [sum(name in x for x in calls) for name in names] == [1, 1]
    assert memory_is_flat(compiled, 8192)
    assert compiled.cost_analysis()["flops"] > 30 * 8192 * 3200 * 16


@pytest.mark.aot
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_check_6_hopper_compiles_at_hymbas_shape(dtype):
    """One kernel each; in float32 too, whose tiles fill the shared memory."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the aot extra")
    from training import topology

    where = topology.parse("h100:1")
    inputs, numbers, h0, mesh = hymba(where.name, 8192)
    given = [x.update(dtype=dtype) for x in inputs[:PER_TOKEN]] + inputs[PER_TOKEN:]
    with mesh:
        graded = jax.jit(jax.grad(functools.partial(packed_loss, impl="gpu"), argnums=(0, 2)))
        traced = graded.trace(given, numbers, h0)
        lowered = traced.lower(lowering_platforms=("cuda",))
        compiled = lowered.compile(topology.compiler_options(where))
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 2
    assert memory_is_flat(compiled, 8192)


def test_memory_of_the_gradient_is_flat():
    """On the CPU: far less than the states of all tokens, and linear in their number."""

    def temporaries(length):
        shape = (1, length, 128, 16, 16)
        grad = jax.jit(jax.grad(lambda *x: scan(x)[0].sum(), argnums=tuple(range(9))))
        compiled = grad.lower(*jax.eval_shape(lambda: tensors(shape))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(4096)
    assert long < 4.5 * short and long < 4 * 4096 * 128 * 16 / 2


def test_mistakes_are_named():
    inputs = tensors(SHAPES[1])
    u, delta, z, B, C, A, D, *_ = inputs
    with pytest.raises(ValueError, match="impl='cuda', allowed: auto, ref, xla, tpu"):
        scan(inputs, impl="cuda")
    with pytest.raises(ValueError, match=r"takes u, delta, z \[B,T,E\], A \[E,N\]"):
        selective_scan(u, delta, A.T, B, C, D)
    with pytest.raises(ValueError, match="T > 0"):
        scan(CHECKS.cut(inputs, 0, 0))
    with pytest.raises(NotSupported, match="chunk of 32, 64, 96 or a multiple of 128, not 40"):
        scan(inputs, impl="tpu_interpret", chunk=40)
    with pytest.raises(NotSupported, match="float32 or bfloat16, not"):
        scan([x.astype(jnp.float16) for x in inputs[:5]] + inputs[5:], impl="tpu_interpret")
    with pytest.raises(NotSupported, match="takes Hopper"):
        scan(inputs, impl="gpu")
    with pytest.raises(NotSupported, match="chunks of 64, not 32"):
        scan(inputs, impl="gpu_interpret", chunk=32)
    with pytest.raises(NotSupported, match="up to 16 states, not 20"):
        scan(tensors((1, 4, 4, 20, 4)), impl="gpu_interpret")
