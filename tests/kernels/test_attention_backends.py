"""Attention's libraries: splash attention in the interpreter and ahead of time, cuDNN as far as a
machine without it can tell, devices that share a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.flops import count_flops
from kernels.attention import MaskSpec, attention, gpu, ref, tpu
from kernels.errors import NotSupported
from tests.kernels.seven_checks import abstract_on, in_a_process
from tests.kernels.test_attention import HYMBA, close, tensors

# (B, T, S, H, G, K, V): one query, odd lengths, widths 1 and 130, multi-query, V unlike K.
SHAPES = [
    (1, 1, 9, 4, 2, 8, 8),
    (2, 150, 150, 4, 1, 16, 24),
    (1, 130, 300, 6, 3, 1, 5),
    (1, 139, 139, 2, 2, 130, 7),
]
LOCAL = MaskSpec(window=1025, always_visible=128)


def ids(shape, shared=0):
    """Segments side by side; the first tokens' are negative."""
    b, t, s = shape[:3]
    made = np.sort(np.random.default_rng(4).integers(0, 4, (b, s)), 1)
    made[:, :shared] = -1
    return jnp.asarray(made, jnp.int32)


def expressible(shape):
    """Masks that splash attention takes, each with every query seeing a key."""
    b, t, s = shape[:3]
    rng = np.random.default_rng(1)
    valid = jnp.asarray(rng.random((b, s)) < 0.8).at[:, 0].set(True)
    prefix = jnp.asarray(rng.integers(1, s, b), jnp.int32)
    offset = dict(query_offset=s - t)
    yield None
    yield MaskSpec(**offset)
    yield MaskSpec(window=60, always_visible=3, **offset)
    yield MaskSpec(window=2, **offset)
    yield MaskSpec(prefix_length=prefix, window=50, always_visible=9, **offset)
    yield MaskSpec(kv_valid=valid, **offset)
    yield MaskSpec(causal=False, kv_valid=valid)
    yield MaskSpec(q_positions=jnp.asarray(rng.integers(1, s, (b, t)), jnp.int32))
    if t < s:  # documents behind keys that all of them see
        own = ids(shape)[:, :t]
        keys = jnp.pad(own, ((0, 0), (s - t, 0)), constant_values=-1)
        ahead = dict(query_offset=s - t, always_visible=s - t, contiguous=True)
        yield MaskSpec(q_segment_ids=own, kv_segment_ids=keys, window=20, **ahead)
        yield MaskSpec(q_segment_ids=own, kv_segment_ids=keys, **ahead)
    if t == s:
        yield MaskSpec(q_segment_ids=ids(shape), contiguous=True, window=20)
        yield MaskSpec(q_segment_ids=ids(shape, 9), contiguous=True, window=20, always_visible=9)
        yield MaskSpec(prefix_length=jnp.broadcast_to(prefix[:, None], (b, t)))


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in few tokens."""
    monkeypatch.setattr(tpu, "BLOCK", 128)
    monkeypatch.setattr(tpu, "BLOCK_IN_WINDOW", 128)


@pytest.mark.parametrize("shape", SHAPES)
def test_checks_2_and_3_splash_equals_ref(shape, small_blocks):
    """Values and gradients, float32 to 1e-5; with a soft-cap every second time. Every mask on one
    shape, every third and those with segments of the keys' own on the others."""
    for n, mask in enumerate(expressible(shape)):
        apart = mask is not None and mask.kv_segment_ids is not None
        if shape != SHAPES[1] and n % 3 and not apart:
            continue
        options = dict(scale=0.3, softcap=5.0 if n % 2 else None)

        def graded(run, inputs, mask=mask, options=options):
            out, pull = jax.vjp(lambda *x: run(*x, mask, **options), *inputs)
            return out, pull(jnp.cos(jnp.arange(out.size)).reshape(out.shape))

        inputs = tensors(shape)
        run = lambda *x, **y: tpu.attention(*x, **y, interpret=True)  # noqa: E731
        got = jax.jit(lambda x: graded(run, x))(inputs)  # noqa: B023
        want = jax.jit(lambda x: graded(ref.attention, x))(inputs)  # noqa: B023
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            close(a, b, 1e-5)


def test_check_2_splash_in_bfloat16(small_blocks):
    """1e-2 of ref on the same numbers in float32."""
    shape, options = SHAPES[1], dict(scale=0.25, softcap=None)
    inputs = tensors(shape, jnp.bfloat16)
    for mask in (MaskSpec(), MaskSpec(window=60, always_visible=3)):
        got = jax.jit(lambda *x: tpu.attention(*x, mask, **options, interpret=True))(*inputs)  # noqa: B023
        assert got.dtype == jnp.bfloat16
        close(got, ref.attention(*(x.astype(jnp.float32) for x in inputs), mask, **options), 1e-2)


def test_check_5_splash_under_vmap_remat_and_scan(small_blocks):
    """As a layer stack uses it: recomputed, in a loop, over two sets of inputs."""
    shape = SHAPES[1]
    mask = MaskSpec(q_segment_ids=ids(shape, 9), contiguous=True, window=20, always_visible=9)

    def graded(q, k, v, impl):
        def total(q, k, v):
            @jax.checkpoint
            def layer(x, _):
                return attention(q + x[..., :16], k, v, mask, impl=impl), None

            start = jnp.zeros((*q.shape[:3], v.shape[3]))
            return (jax.lax.scan(layer, start, None, length=2)[0] ** 2).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    q, k, v = (jnp.stack([a, b]) for a, b in zip(tensors(shape), tensors(shape, seed=5)))
    got = jax.jit(jax.vmap(lambda *x: graded(*x, "tpu_interpret")))(q, k, v)
    for i in range(2):
        for a, b in zip(got, graded(q[i], k[i], v[i], "ref")):
            close(a[i], b, 2e-5)


def test_check_5_eight_devices_equal_one():
    """Values and gradients over meshes with shared rows, heads and groups of heads; a window sends
    a few keys to the neighbour, other masks gather all, rows behind other keys none."""
    rows = in_a_process("-m", "tests.kernels.attention_on_mesh")
    assert len(rows) == 33
    for row in rows:
        assert row["difference"] < 2e-5, row
        assert row["shard_map"] == (row["seq"] > 1 or row["impl"] != "xla"), row
        near = row["mask"] in ("window", "pinned", "packed", "valid")
        near |= row["mask"].startswith("behind")
        assert row["queries_cut"] == (row["seq"] > 1), row
        assert row["gathered"] == (row["seq"] > 1 and not near), row


def test_check_7_kernels_carry_what_their_blocks_cost(small_blocks):
    """Products of the blocks that the mask reaches, forward and backward, from the estimates that
    the library's kernels are given."""
    b, t, _, h, _, k, v = shape = (2, 640, 640, 4, 2, 16, 24)
    mask = MaskSpec(window=140, always_visible=9)
    inputs = tensors(shape)
    run = lambda *x: attention(*x, mask, impl="tpu_interpret")  # noqa: E731
    pairs = b * h * len(mask.blocks(t, t, 128, 128)) * 128 * 128
    assert count_flops(run, *inputs) == 2 * pairs * (k + v)
    graded = jax.grad(lambda *x: run(*x).sum(), (0, 1, 2))
    # di = <out, d out> is an einsum, counted as well.
    work = 2 * pairs * (3 * k + 2 * v + 2 * (k + v) + k - k)
    assert 0 <= count_flops(graded, *inputs) - 2 * pairs * (5 * k + 4 * v) <= 4 * b * h * t * v, (
        work
    )


def test_what_the_libraries_do_not_take(monkeypatch):
    """Each reason, and that impl="auto" goes on."""
    inputs = tensors(SHAPES[1])
    segments = jnp.zeros((2, 150), jnp.int32)

    def refuses(match, mask, inputs=inputs, run="tpu_interpret", **options):
        with pytest.raises(NotSupported, match=match):
            attention(*inputs, mask, impl=run, **options)

    refuses("512 queries or more, not 150", None, run="tpu")
    refuses("contiguous mask only", MaskSpec(q_segment_ids=segments))
    refuses("no scale ids", MaskSpec(q_scale_ids=segments))
    refuses("order of their positions", MaskSpec(kv_positions=segments))
    refuses("all float32 or bfloat16", None, [x.astype(jnp.float16) for x in inputs])
    refuses("a visible key for every query", MaskSpec(window=3, query_offset=500))
    apart = MaskSpec(q_segment_ids=segments, kv_segment_ids=segments, contiguous=True)
    refuses("queries that are the last keys", apart)
    fewer = [inputs[0][:, :100], *inputs[1:]]
    own = MaskSpec(q_segment_ids=segments[:, :100], contiguous=True, query_offset=50)
    refuses("segment ids of all keys", own, fewer)
    long = [jax.ShapeDtypeStruct((1, 40_000, *x), jnp.bfloat16) for x in HYMBA]
    prefix = MaskSpec(prefix_length=jnp.zeros(1, jnp.int32))
    with pytest.raises(NotSupported, match="more than 32768 keys"):
        jax.eval_shape(lambda *x: attention(*x, prefix, impl="tpu"), *long)

    narrow = tensors((1, 512, 512, 4, 2, 16, 24), jnp.bfloat16)
    refuses("all bfloat16 or float16, not float32", None, run="gpu")
    refuses("512 queries or more", None, [x.astype(jnp.bfloat16) for x in inputs], "gpu")
    refuses("no soft-cap", None, narrow, "gpu", softcap=5.0)
    refuses("without always visible keys", LOCAL, narrow, "gpu")
    refuses("takes no prefix, positions", prefix, narrow, "gpu")
    refuses("as many queries as keys", MaskSpec(query_offset=3), narrow, "gpu")
    refuses("multiple of 8", None, tensors((1, 512, 512, 4, 2, 16, 23), jnp.bfloat16), "gpu")


def test_check_2_cudnn_is_asked_for_the_same_function():
    """The same call of jax.nn with XLA in cuDNN's place, against ref: masks, padding, heads; a row
    of odd length gets one more token."""
    options = dict(scale=0.25, softcap=None)
    for mask, tokens in ((None, 512), (MaskSpec(), 513), (MaskSpec(window=70), 512)):
        inputs = tensors((2, tokens, tokens, 4, 2, 16, 24), jnp.bfloat16)
        got = jax.jit(lambda *x: gpu.attention(*x, mask, **options, library="xla"))(*inputs)  # noqa: B023
        exact = [x.astype(jnp.float32) for x in inputs]
        close(got, ref.attention(*exact, mask, **options), 1e-2)


def abstract_hymba(device):
    """q, k, v of Hymba 1.5B on an absent device, 8,192 tokens behind 128."""
    place = jax.sharding.SingleDeviceSharding(device)
    return [jax.ShapeDtypeStruct((1, 8192 + 128, *x), jnp.bfloat16, sharding=place) for x in HYMBA]


def total(inputs, mask):
    return attention(*inputs, mask).astype(jnp.float32).sum()


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_check_6_tpu_compiles_at_the_hymba_shape(topology):
    """Forward and backward by impl="auto", local and global layers, plain and packed: one kernel
    forward and two backward, no array of scores in the device's memory."""
    pytest.importorskip("libtpu", reason="needs the aot extra")
    device, mesh = abstract_on(topology)
    inputs = abstract_hymba(device)
    segments = jax.ShapeDtypeStruct((1, 8320), jnp.int32, sharding=inputs[0].sharding)
    packed = MaskSpec(q_segment_ids=segments, contiguous=True, window=1025, always_visible=128)
    with mesh:
        programs = [
            jax.jit(jax.grad(total)).lower(inputs, mask).compile()
            for mask in (LOCAL, MaskSpec(), packed)
        ]
    for compiled in programs:
        text = compiled.as_text()
        calls = [x for x in text.splitlines() if 'custom_call_target="tpu_custom_call"' in x]
        kinds = ("fwd", "dq", "dkv")
        assert [sum(f"splash_mha_{x}" in line for line in calls) for x in kinds] == [1, 1, 1]
        assert text.count("cost_estimate") >= 3
        tokens = 8320 * 25 * 128
        assert compiled.memory_analysis().temp_size_in_bytes < 10 * 2 * tokens


@pytest.mark.aot
def test_check_6_hopper_compiles_at_the_hymba_shape(monkeypatch):
    """impl="auto" without cuDNN is XLA, whose temporaries hold one block of scores; where jax is
    told that there is a cuDNN, plain and windowed rows become its calls, forward and backward."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the aot extra")
    from training import topology

    where = topology.parse("h100:1")

    def lowered(mask):
        device, mesh = abstract_on("h100:1")
        inputs = abstract_hymba(device)
        run = jax.jit(jax.grad(lambda x: total(x, mask)))
        with mesh:
            return run.trace(inputs).lower(lowering_platforms=("cuda",))

    compiled = lowered(LOCAL).compile(topology.compiler_options(where))
    assert compiled.memory_analysis().temp_size_in_bytes < 25 * 8320 * 8320 * 4 / 20
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91400)
    for mask, length in ((MaskSpec(), 0), (MaskSpec(window=1025), 1025)):
        program = lowered(mask)
        text = program.as_text().replace("\\22", '"')
        assert [text.count(f"@__cudnn$fmhaSoftmax{x}(") for x in ("", "Backward")] == [1, 1]
        assert text.count('"mask_type": "CAUSAL"') == 2
        assert text.count(f'"sliding_window_length": {length},') == 2
        compiled = program.compile(topology.compiler_options(where))
        assert compiled.as_text().count('custom_call_target="__cudnn$fmha') == 2
    assert "__cudnn" not in lowered(LOCAL).as_text()
