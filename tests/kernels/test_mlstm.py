"""mLSTM: golden values of the specification, chunks against the recurrence, documents, states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import static
from kernels import dispatch
from kernels.errors import NotSupported
from kernels.mlstm import State, empty_state, mlstm, mlstm_step
from tests.kernels.seven_checks import SevenChecks, abstract_on, assert_close, document_ids

# (B, H, T, K, V, chunk): one token, odd lengths, chunks that do not divide them, K = 1 and 130.
SHAPES = [
    (1, 1, 1, 4, 4, 4),
    (2, 3, 37, 8, 12, 16),
    (1, 2, 20, 1, 5, 7),
    (1, 1, 19, 130, 3, 64),
]
NAMES = ("q", "k", "v", "i", "f")
CHUNKED = ("xla", "tpu_interpret")


def fill(c, *shape):
    """sin(c + 1.3 b + 0.7 h + 0.31 t + 0.17 j), as section 2.6 of the specification."""
    steps = (1.3, 0.7, 0.31, 0.17)
    return jnp.asarray(np.sin(c + sum(s * x for s, x in zip(steps, np.indices(shape)))))


def tensors(shape, dtype=jnp.float32, seed=0):
    b, h, t, k, v, _ = shape
    keys = jax.random.split(jax.random.key(seed), 5)
    sizes = [(b, h, t, k), (b, h, t, k), (b, h, t, v), (b, h, t), (b, h, t)]
    q, key, value, i, f = (jax.random.normal(k, s) for k, s in zip(keys, sizes))
    return [x.astype(dtype) for x in (q, key, value)] + [2 * i, 3 + 2 * f]


def some_state(shape, dtype=jnp.float32, seed=7):
    b, h, _, k, v, _ = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = [(b, h, k, v), (b, h, k), (b, h)]
    return State(*(jax.random.normal(key, s).astype(dtype) for key, s in zip(keys, sizes)))


def tame(inputs, state):
    """q, k and the state of one sign: where positive and negative scores cancel in the denominator,
    h magnifies the rounding of the scores at will."""
    return [*map(jnp.abs, inputs[:2]), *inputs[2:]], State(*map(jnp.abs, state))


class TestMLSTM(SevenChecks):
    """Checks 1 to 5, and 10 of the specification."""

    SHAPES = SHAPES
    IMPLS = CHUNKED
    EXACT = dict(eps=0.0)
    GRADIENT_SHAPES = (SHAPES[1], (1, 2, 50, 96, 192, 32))  # the second: its check 5
    MESHES = (
        ("xla", dict(data=2, fsdp=1, tensor=2, seq=2)),
        ("xla", dict(data=1, fsdp=1, tensor=1, seq=8)),
        ("tpu_interpret", dict(data=1, fsdp=2, tensor=1, seq=4)),
    )
    MESH_SHAPE = (2, 2, 64, 8, 12, 16)

    inputs, state, tame = map(staticmethod, (tensors, some_state, tame))

    def run(self, inputs, state, **options):
        return mlstm(*inputs, state=state, **options)

    def step(self, inputs, state):
        return mlstm_step(*inputs, state)

    def plain(self, state):
        """C and n without their gauge."""
        scale = jnp.exp(state.m)
        return state.C * scale[..., None, None], state.n * scale[..., None]

    def trained(self, state):
        """The gauge is a constant."""
        return state[:2], lambda leaves: State(*leaves, state.m)

    def chunk(self, shape, impl):
        return shape[-1] if impl == "xla" else -(-shape[-1] // 16) * 16


CHECKS = TestMLSTM()


@pytest.mark.parametrize("options", [dict(impl="ref"), dict(chunk=3), dict(chunk=8)])
def test_golden_values(options):
    """Section 2.6: sums of outputs, states and gradients in float64."""
    with jax.enable_x64(True):
        shape = (1, 2, 8, 4, 6)
        q, k, v = (fill(c, 1, 2, 8, n) for c, n in ((0.1, 4), (0.2, 4), (0.3, 6)))
        i, f = 2 * fill(0.4, *shape[:3]), 3 + 2 * fill(0.5, *shape[:3])
        cotangent = fill(0.6, 1, 2, 8, 6)

        def loss(*inputs):
            h, last = mlstm(*inputs, **options)
            return (h * cotangent).sum(), (h, last)

        run = jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)
        (value, (h, last)), grads = run(q, k, v, i, f)
        row = [-0.96115549, -0.97242261, -0.95565434, -0.91133410, -0.84073968, -0.74590634]
        np.testing.assert_allclose(h.sum(), 69.2919970888, rtol=1e-11)
        np.testing.assert_allclose(jnp.abs(h).sum(), 80.0664222253, rtol=1e-11)
        np.testing.assert_allclose(h[0, 1, 7], row, atol=5e-9)
        np.testing.assert_allclose(last.C.sum(), 159.6330061422, rtol=1e-11)
        np.testing.assert_allclose(last.n.sum(), 33.4486304159, rtol=1e-11)
        np.testing.assert_allclose(last.m[0], [1.95484208, 1.81532348], atol=5e-9)
        np.testing.assert_allclose(value, 43.4933765504, rtol=1e-11)
        sums = dict(q=12.39448076, k=3.07188221, v=48.44529518, i=2.55940970, f=-0.05343313)
        sizes = dict(q=13.50605188, k=8.63493379, v=50.34662800, i=3.51090401, f=0.05343313)
        for name, grad in zip(NAMES, grads):
            # eps = 1e-6 is not gauge-free, and the written gradient takes the gauge as constant.
            exact = options.get("impl") == "ref" or name in "qkv"
            tolerance = 5e-9 if exact else 3e-5
            np.testing.assert_allclose(grad.sum(), sums[name], atol=tolerance)
            np.testing.assert_allclose(jnp.abs(grad).sum(), sizes[name], atol=tolerance)


def test_golden_values_of_the_official_backward():
    """The authors' kernels on the same data: a constant denominator, one sum for the gates."""
    with jax.enable_x64(True):
        q, k, v = (fill(c, 1, 2, 8, n) for c, n in ((0.1, 4), (0.2, 4), (0.3, 6)))
        i, f = 2 * fill(0.4, 1, 2, 8), 3 + 2 * fill(0.5, 1, 2, 8)

        def loss(*inputs):
            h, _ = mlstm(*inputs, chunk=3, official_backward=True)
            return (h * fill(0.6, 1, 2, 8, 6)).sum()

        grads = jax.grad(loss, argnums=(0, 1, 2, 3, 4))(q, k, v, i, f)
        for grad, want in zip(grads, (0.782999, 53.351940, 48.445295, 43.493377, 0.619928)):
            np.testing.assert_allclose(grad.sum(), want, atol=5e-7)


@pytest.mark.parametrize("official", [False, True])
def test_check_3_tpu_gradients_of_bfloat16(official):
    """The kernels' gradients beside the chunks' in bfloat16: the same roundings, two orders."""
    shape = SHAPES[1]
    inputs, state = tensors(shape, jnp.bfloat16), some_state(shape)
    inputs, state = tame(inputs, state)
    cotangent = jax.random.normal(jax.random.key(9), inputs[2].shape)

    def gradient(impl):
        def total(inputs):
            h, _ = mlstm(*inputs, state=state, chunk=16, official_backward=official, impl=impl)
            return (h.astype(jnp.float32) * cotangent).sum()

        return jax.grad(total)(inputs)

    for got, want in zip(gradient("tpu_interpret"), gradient("xla")):
        assert_close(got, want, 2e-2)


@pytest.mark.parametrize("packed", [False, True])
def test_checks_1_to_3_gpu_equals_ref(packed):
    """The two Hopper kernels in the interpreter: two chunks, padded heads, documents, both states.

    bfloat16 in, so the measure is ref on the same numbers in float32.
    """
    shape = (1, 2, 150, 96, 192, 128) if packed else (1, 1, 256, 128, 256, 128)
    inputs, state = tensors(shape, jnp.bfloat16), some_state(shape)
    inputs, state = tame(inputs, state)
    numbers = document_ids(shape) if packed else None
    cotangent = jax.random.normal(jax.random.key(9), inputs[2].shape)

    def total(inputs, C, n, impl):
        options = dict(segment_ids=numbers, impl=impl)
        return CHECKS.objective(inputs, State(C, n, state.m), cotangent, **options)

    def run(impl, inputs):
        given = (inputs, state.C, state.n)
        return jax.grad(total, argnums=(0, 1, 2))(*given, impl), mlstm(
            *inputs, state=state, segment_ids=numbers, impl=impl
        )

    grads, (h, last) = run("gpu_interpret", inputs)
    want_grads, (want, want_last) = run("ref", [x.astype(jnp.float32) for x in inputs])
    assert_close(h, want, 2e-2)
    CHECKS.assert_states_close(last, want_last, 2e-2)
    for got, right in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)):
        assert_close(got, right, 2e-2)


def test_check_4_official_gpu_gradients():
    """The authors' backward on Hopper equals that of the chunks: the same roundings, two orders."""
    shape = (1, 1, 128, 128, 128, 128)
    inputs = tensors(shape, jnp.bfloat16)
    inputs[:2] = [jnp.abs(x) for x in inputs[:2]]
    cotangent = jax.random.normal(jax.random.key(9), inputs[2].shape)

    def gradient(impl):
        def total(inputs):
            h, _ = mlstm(*inputs, chunk=128, official_backward=True, impl=impl)
            return (h.astype(jnp.float32) * cotangent).sum()

        return jax.grad(total)(inputs)

    for got, want in zip(gradient("gpu_interpret"), gradient("xla")):
        assert_close(got, want, 2e-2)


def test_check_4_a_tpu_step_is_the_definition():
    shape = (2, 3, 1, 128, 256, 1)
    inputs, state = [x[:, :, 0] for x in tensors(shape)], some_state(shape)
    h, last = mlstm_step(*inputs, state, impl="tpu_interpret")
    want, want_last = mlstm_step(*inputs, state, impl="ref")
    assert_close(h, want, 1e-5)
    for got, right in zip(last, want_last):
        assert_close(got, right, 1e-6)
    with pytest.raises(ValueError, match="multiples of 128"):
        mlstm_step(*inputs[:2], inputs[2][..., :12], *inputs[3:], state, impl="tpu_interpret")


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-8)])
def test_check_4_a_gpu_step_is_the_definition(dtype, tolerance):
    """In the interpreter; h is rounded to the type of v, the states are float32 either way."""
    shape = (2, 3, 1, 48, 96, 1)
    inputs, state = [x[:, :, 0] for x in tensors(shape, dtype)], some_state(shape)
    h, last = mlstm_step(*inputs, state, impl="gpu_interpret")
    want, want_last = mlstm_step(*inputs, state, impl="ref")
    assert h.dtype == dtype
    assert_close(h, want, tolerance)
    for got, right in zip(last, want_last):
        assert_close(got, right, 1e-6)
    closed, opened = jnp.full_like(inputs[3], -1e30), jnp.full_like(inputs[4], 1e30)
    _, same = mlstm_step(*inputs[:3], closed, opened, state, impl="gpu_interpret")
    for got, right in zip(same, state):
        np.testing.assert_array_equal(got, right)


@pytest.mark.parametrize(
    "input_gate, forget_gate, length",
    [(15.0, -15.0, 4096), (-15.0, -15.0, 4096), (0.0, 15.0, 65_536)],
)
def test_check_9_gates_at_their_caps(input_gate, forget_gate, length):
    """Finite values and gradients in bfloat16; h within bfloat16's reach of float64."""
    shape = (1, 1, length, 8, 8, 64)
    inputs = tensors(shape)
    inputs[3], inputs[4] = (jnp.full((1, 1, length), x) for x in (input_gate, forget_gate))
    inputs[:2] = [jnp.abs(x) for x in inputs[:2]]
    narrow = [x.astype(jnp.bfloat16) for x in inputs[:3]] + inputs[3:]

    def total(*inputs):
        return mlstm(*inputs, chunk=64, impl="xla")[0].astype(jnp.float32).sum()

    grads = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3, 4)))(*narrow)
    assert all(bool(jnp.isfinite(g.astype(jnp.float32)).all()) for g in grads)
    h, last = jax.jit(functools.partial(mlstm, chunk=64, impl="xla"))(*narrow)
    assert all(bool(jnp.isfinite(x).all()) for x in last)
    with jax.enable_x64():
        exact = [jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64) for x in narrow]
        want, _ = jax.jit(functools.partial(mlstm, chunk=64, impl="xla"))(*exact)
        want = np.asarray(want)
    assert_close(h.astype(jnp.float32), want, 2e-2)


def test_packed_documents_equal_separate_ones():
    """Values and gradients at eps = 0, boundaries inside chunks, an open input gate before one."""
    with jax.enable_x64(True):
        shape = (1, 2, 37, 8, 12, 16)
        inputs = [x.astype(jnp.float64) for x in tensors(shape)]
        inputs[3] = inputs[3].at[:, :, 12].set(15.0)
        ends, options = (0, 13, 14, 30, 37), dict(chunk=16, eps=0.0)
        numbers = jnp.asarray(np.repeat(np.arange(4), np.diff(ends)))[None]
        cotangent = jax.random.normal(jax.random.key(9), inputs[2].shape, jnp.float64)

        def packed(inputs):
            h, _ = mlstm(*inputs, segment_ids=numbers, **options)
            return (h * cotangent).sum(), h

        def separate(inputs):
            parts = [
                mlstm(*(x[:, :, a:b] for x in inputs), **options)[0] for a, b in zip(ends, ends[1:])
            ]
            h = jnp.concatenate(parts, 2)
            return (h * cotangent).sum(), h

        graded = (jax.jit(jax.grad(f, has_aux=True)) for f in (packed, separate))
        (got, h), (want, each) = (f(inputs) for f in graded)
        assert_close(h, each, 1e-13)
        assert np.abs(mlstm(*inputs, **options)[0] - each).max() > 1e-2  # the resets matter
        for a, b in zip(got, want):
            assert_close(a, b, 1e-12)


@pytest.mark.parametrize("impl", ["ref", *CHUNKED])
def test_masked_tokens_leave_the_state_alone(impl):
    """Ragged rows: right padding with closed gates gives the short row's state, exactly."""
    shape = SHAPES[1]
    inputs, state = tensors(shape), some_state(shape)
    i, f = inputs[3].at[:, :, 20:].set(-1e30), inputs[4].at[:, :, 20:].set(1e30)
    _, got = mlstm(*inputs[:3], i, f, state=state, impl=impl, chunk=16)
    _, want = mlstm(*(x[:, :, :20] for x in inputs), state=state, impl=impl, chunk=16)
    CHECKS.assert_states_close(got, want, 1e-6)
    _, written = mlstm(*inputs, state=state, impl=impl, chunk=16)
    assert np.abs(written.n - want.n).max() > 1e-2


def test_the_states_document():
    """A state of another document is not read; by default it is the first token's."""
    shape = SHAPES[1]
    inputs, state, numbers = tensors(shape), some_state(shape), jnp.full((2, 37), 5)
    options = dict(segment_ids=numbers, chunk=16)
    fresh, _ = mlstm(*inputs, state=state, state_segment=jnp.array([5, 4]), **options)
    goes_on, _ = mlstm(*inputs, state=state, **options)
    empty, _ = mlstm(*inputs, state=empty_state(2, 3, 8, 12), chunk=16)
    assert_close(fresh[0], goes_on[0], 1e-6)
    assert_close(fresh[1], empty[1], 1e-3)  # up to the gauge inside eps
    assert np.abs(goes_on[1] - empty[1]).max() > 1e-2


def abstract_7b(topology, length=2048):
    """(array, (q, k, v, i, f), documents): abstract, on a device of the topology; its context."""
    device, mesh = abstract_on(topology)
    array, inputs = static.mlstm_7b(device, length)
    return array, inputs, array(1, length, dtype=jnp.int32), mesh


def packed_loss(inputs, numbers, impl="auto"):
    return mlstm(*inputs, segment_ids=numbers, impl=impl)[0].astype(jnp.float32).sum()


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_check_6_tpu_compiles_at_the_7b_shape(topology):
    """Forward and backward, with documents: one Mosaic kernel forward, two more backward, and no
    array of states of every token or of scores in the device's memory. impl="auto" chooses."""
    pytest.importorskip("libtpu", reason="needs the aot extra")
    array, inputs, numbers, mesh = abstract_7b(topology)
    _, h, t, k = inputs[0].shape
    v = inputs[2].shape[3]
    with mesh:
        compiled = jax.jit(jax.grad(packed_loss)).lower(inputs, numbers).compile()
    text = compiled.as_text()
    kernels = [f"mlstm_{name}" for name in ("forward", "states", "backward")]
    calls = [x for x in text.splitlines() if 'custom_call_target="tpu_custom_call"' in x]
    assert [sum(name in x for x in calls) for name in kernels] == [1, 1, 1]
    states, tokens = h * t // 256 * k * v * 2, h * t * v * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * states + 8 * tokens
    assert compiled.cost_analysis()["flops"] > 2 * h * t * (4 * k * v)
    wide = functools.partial(array, dtype=jnp.float32)
    one = (array(1, h, k), array(1, h, k), array(1, h, v), wide(1, h), wide(1, h))
    state = State(wide(1, h, k, v), wide(1, h, k), wide(1, h))
    with mesh:
        compiled = jax.jit(mlstm_step, donate_argnums=5).lower(*one, state).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * h * k * v  # no second copy of the memory
    assert memory.alias_size_in_bytes >= 4 * h * k * v


@pytest.mark.aot
def test_check_6_hopper_compiles_at_the_7b_shape():
    """Forward and backward, with documents: two kernels forward, five backward."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the aot extra")
    from training import topology

    _, inputs, numbers, mesh = abstract_7b("h100:1")
    with mesh:
        graded = jax.jit(jax.grad(functools.partial(packed_loss, impl="gpu")))
        lowered = graded.trace(inputs, numbers).lower(lowering_platforms=("cuda",))
        compiled = lowered.compile(topology.compiler_options(topology.parse("h100:1")))
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 2 + 5
    _, h, t, k = inputs[0].shape
    v = inputs[2].shape[3]
    states, tokens = h * t // 128 * k * v * 2, h * t * v * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * states + 8 * tokens


@pytest.mark.aot
def test_check_6_hopper_compiles_a_step_at_the_7b_shape(monkeypatch):
    """One kernel, which in a scan over layers takes its states from the stack and puts them into
    another, without copies; "auto", where a measurement chose it, leaves other heads to XLA."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the aot extra")
    from training import topology

    array, inputs, _, mesh = abstract_7b("h100:1", length=1)
    with mesh:
        measured = {"mlstm_step": {dispatch.device_kind(): "a file"}}
    monkeypatch.setattr(dispatch, "MEASURED", measured)
    wide, layers, heads, (k, v) = functools.partial(array, dtype=jnp.float32), 4, 8, (256, 512)

    def lowered(k, v):
        token = [array(1, heads, *x.shape[3:], dtype=x.dtype) for x in inputs]
        token[:3] = (array(1, heads, n) for n in (k, k, v))
        lead = (layers, 1, heads)
        states = State(wide(*lead, k, v), wide(*lead, k), wide(*lead))

        def run(q, k, v, i, f, states):
            return jax.lax.scan(lambda v, state: mlstm_step(q, k, v, i, f, state), v, states)

        with mesh:
            return jax.jit(run).trace(*token, states).lower(lowering_platforms=("cuda",))

    options = topology.compiler_options(topology.parse("h100:1"))
    compiled = lowered(k, v).compile(options)
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * heads * k * v
    assert "mosaic_gpu" not in lowered(k + 8, v).as_text()


def test_memory_of_the_gradient_is_flat_in_scores():
    """Four times the tokens: at most about four times the temporaries, no T x T array."""

    def temporaries(length):
        x = [jax.ShapeDtypeStruct((1, 2, length, n), jnp.float32) for n in (16, 16, 16)]
        gates = [jax.ShapeDtypeStruct((1, 2, length), jnp.float32)] * 2
        grad = jax.grad(lambda *a: mlstm(*a, chunk=64)[0].sum(), argnums=(0, 1, 2, 3, 4))
        return jax.jit(grad).lower(*x, *gates).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(4096)
    assert long < 5 * short and long < 2 * 4096 * 4096


def test_mistakes_are_named():
    inputs = tensors(SHAPES[1])
    with pytest.raises(ValueError, match="impl='cuda', allowed: auto, ref, xla, tpu"):
        mlstm(*inputs, impl="cuda")
    with pytest.raises(ValueError, match=r"mlstm takes q, k \[B,H,T,K\]"):
        mlstm(*inputs[:4], inputs[4][:, :, :-1])
    with pytest.raises(ValueError, match="no official_backward"):
        mlstm(*inputs, impl="ref", official_backward=True)
    with pytest.raises(NotSupported, match="mlstm on GPU takes bfloat16, not float32"):
        mlstm(*inputs, impl="gpu")
    narrow = [x.astype(jnp.bfloat16) for x in inputs[:3]]
    with pytest.raises(NotSupported, match="takes Hopper"):
        mlstm(*narrow, *inputs[3:], impl="gpu")
    with pytest.raises(NotSupported, match="chunks of 128, not 64"):
        mlstm(*narrow, *inputs[3:], impl="gpu_interpret", chunk=64)
    one, state = [x[:, :, 0] for x in inputs], empty_state(2, 3, 8, 12)
    with pytest.raises(NotSupported, match="multiple of 16 up to 512 numbers.*not 8 and 12"):
        mlstm_step(*one, state, impl="gpu")
    with pytest.raises(NotSupported, match="float32 or bfloat16 q, k, v, not float32 and float16"):
        mlstm_step(*(x.astype(jnp.float16) for x in one), state, impl="gpu")
    one, state = [x[:, :, 0] for x in tensors((1, 1, 1, 16, 32, 1))], empty_state(1, 1, 16, 32)
    with pytest.raises(NotSupported, match="takes Hopper"):
        mlstm_step(*one, state, impl="gpu")
    with pytest.raises(ValueError, match="at least one token"):
        mlstm(*(x[:, :, :0] for x in inputs))
