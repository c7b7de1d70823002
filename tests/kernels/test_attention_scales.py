"""Attention of next-scale prediction: a token sees its own and earlier scales, and no block that
holds later ones alone is multiplied (specs/infinity.md, 2.6 and 2.9 c)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.flops import count_flops
from kernels.attention import MaskSpec, attention, gpu, ref, tpu, xla
from kernels.errors import NotSupported
from models.tokenizers.quantisers import schedules
from tests.kernels.seven_checks import abstract_on
from tests.kernels.test_attention import close, tensors

SCALES = (1, 4, 9, 16, 25)  # 55 tokens
# (B, T, S, H, G, K, V), scales and first query: one token, a ragged row, padding behind the last
# scale, a row that ends inside one, one scale alone, one scale against the keys so far, and
# against a cache that is longer.
CASES = [
    ((1, 1, 1, 4, 2, 8, 8), SCALES, 0),
    ((2, 55, 55, 4, 1, 16, 24), SCALES, 0),
    ((1, 64, 64, 2, 2, 130, 7), SCALES, 0),
    ((1, 40, 40, 6, 3, 1, 5), SCALES, 0),
    ((1, 19, 19, 2, 1, 8, 8), (19,), 0),
    ((2, 25, 55, 4, 2, 8, 8), SCALES, 30),
    ((2, 16, 55, 4, 2, 8, 8), SCALES, 14),
]
LONG = ((1, 300, 300, 2, 1, 16, 24), (1, 4, 16, 36, 64, 100, 79), 0)  # for kernels' blocks of 128
HEADS = (16, 128)  # of Infinity 2B


def mask_of(scales, offset=0):
    return MaskSpec(causal=False, scales=scales, query_offset=offset)


def published(ratio, budget="1M"):
    """(mask, tokens) of a published schedule."""
    sizes = tuple(h * w for h, w in schedules.infinity(ratio, budget))
    return mask_of(sizes), sum(sizes)


def graded(run, inputs, mask, **options):
    """Result and the three gradients, of a cotangent that bfloat16 holds exactly."""
    out, pull = jax.vjp(lambda *x: run(*x, mask, scale=0.3, softcap=None, **options), *inputs)
    weights = jnp.cos(jnp.arange(out.size)).astype(jnp.bfloat16)
    return out, pull(weights.astype(out.dtype).reshape(out.shape))


def test_the_rule_spelled_out():
    """Padding is seen by no query and sees every scale; positions may be arrays."""
    scale = np.repeat(np.arange(5), SCALES)
    mask, dense = mask_of(SCALES), np.asarray(mask_of(SCALES).dense(60, 60))[0]
    for q in range(60):
        for k in range(60):
            seen = k < 55 and (q >= 55 or scale[k] <= scale[q])
            assert dense[q, k] == seen, (q, k)
    ids = MaskSpec(causal=False, q_scale_ids=jnp.asarray(scale)[None])
    np.testing.assert_array_equal(ids.dense(55, 55)[0], dense[:55, :55])
    positions = np.random.default_rng(0).permutation(60)
    moved = MaskSpec(causal=False, scales=SCALES, q_positions=jnp.asarray(positions)[None])
    np.testing.assert_array_equal(moved.dense(60, 60)[0], dense[positions])
    part = mask.padded(64, 64).block((7, 20), (3, 40)).dense(20, 40)[0]
    np.testing.assert_array_equal(part, dense[7:27, 3:43])
    both = np.asarray(MaskSpec(scales=SCALES).dense(60, 60))[0]
    np.testing.assert_array_equal(both, dense & np.tri(60, dtype=bool))


@pytest.mark.parametrize("shape, scales, offset", CASES)
def test_blocks_are_those_with_a_visible_key(shape, scales, offset):
    _, queries, keys, *_ = shape
    mask = mask_of(scales, offset)
    dense = np.asarray(mask.dense(queries, keys))[0]
    for rows, columns in ((8, 8), (5, 16), (64, 4)):
        seen = {
            (i // rows, j // columns)
            for i in range(0, queries, rows)
            for j in range(0, keys, columns)
            if dense[i : i + rows, j : j + columns].any()
        }
        assert {tuple(x) for x in mask.blocks(queries, keys, rows, columns).tolist()} == seen


@pytest.mark.parametrize("shape, scales, offset", CASES)
def test_checks_1_and_3_xla_equals_ref(shape, scales, offset):
    """Values and gradients, float32 to 1e-5, in blocks of 8 and whole; bfloat16 to 1e-2."""
    mask = mask_of(scales, offset)
    inputs = tensors(shape)

    @jax.jit
    def both(inputs):
        blocks = [graded(xla.attention, inputs, mask, chunk=n) for n in (8, None)]
        narrow = [x.astype(jnp.bfloat16) for x in inputs]
        exact = [x.astype(jnp.float32) for x in narrow]
        options = dict(scale=0.3, softcap=None)
        low = xla.attention(*narrow, mask, **options, chunk=8)
        return (
            blocks,
            graded(ref.attention, inputs, mask),
            low,
            ref.attention(*exact, mask, **options),
        )

    blocks, want, low, exact = both(inputs)
    for got in blocks:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            close(a, b, 1e-5)
    assert low.dtype == jnp.bfloat16
    close(low, exact, 1e-2)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in few tokens."""
    monkeypatch.setattr(tpu, "BLOCK_IN_WINDOW", 128)
    monkeypatch.setattr(tpu, "BLOCKS_OF_SCALES", {128: 1})


def splash(*args, **options):
    return tpu.attention(*args, **options, interpret=True)


def kernel_cases():
    """Masks that splash attention takes with scales in them, ragged at the end."""
    shape, scales, _ = LONG
    b, t, s = shape[:3]
    rng = np.random.default_rng(1)
    yield shape, mask_of(scales)
    yield shape, mask_of((1, 4, 16, 36, 64, 100))  # 79 of padding
    yield (1, 100, 300, 2, 1, 16, 24), mask_of(scales, 121)  # a scale against a longer cache
    yield (1, 179, 200, 2, 1, 16, 24), mask_of(scales, 121)  # keys end before the queries' scales
    valid = jnp.asarray(rng.random((b, s)) < 0.8).at[:, 0].set(True)
    yield shape, MaskSpec(causal=False, scales=scales, kv_valid=valid)
    yield shape, MaskSpec(causal=False, scales=scales, window=150, always_visible=9)
    positions = jnp.asarray(rng.integers(0, s, (b, t)), jnp.int32)
    yield shape, MaskSpec(causal=False, scales=scales, q_positions=positions)


@pytest.mark.parametrize("shape, mask", list(kernel_cases()))
def test_checks_2_and_3_splash_equals_ref(shape, mask, small_blocks):
    inputs = tensors(shape)
    got = jax.jit(lambda x: graded(splash, x, mask))(inputs)
    want = jax.jit(lambda x: graded(ref.attention, x, mask))(inputs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(a, b, 1e-5)


def test_check_2_splash_in_bfloat16(small_blocks):
    shape, scales, _ = LONG
    inputs = tensors(shape, jnp.bfloat16)
    options = dict(scale=0.3, softcap=None)
    got = jax.jit(lambda *x: splash(*x, mask_of(scales), **options))(*inputs)
    assert got.dtype == jnp.bfloat16
    exact = [x.astype(jnp.float32) for x in inputs]
    close(got, ref.attention(*exact, mask_of(scales), **options), 1e-2)


@pytest.mark.parametrize("tokens, offset", [(300, 0), (320, 0), (120, 180), (280, 20)])
def test_checks_2_and_3_cudnn_by_scale_equals_ref(tokens, offset, monkeypatch):
    """The calls that cuDNN gets, made with XLA in its place: a row, one with padding, scales
    against the keys so far, a row that starts inside a scale."""
    monkeypatch.setattr(gpu, "FEWEST", 70)
    mask = mask_of(LONG[1], offset)
    inputs = tensors((1, tokens, 300 if offset else tokens, 4, 2, 16, 24), jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in inputs]
    got = jax.jit(lambda x: graded(gpu.attention, x, mask, library="xla"))(inputs)
    want = jax.jit(lambda x: graded(ref.attention, x, mask))(exact)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.bfloat16
        close(a, b, 1e-2)


def test_what_cudnn_does_not_take():
    x = jnp.zeros((1, 512, 2, 16), jnp.bfloat16)
    for mask, match in (
        (MaskSpec(scales=(512,)), "scales alone"),
        (MaskSpec(causal=False, window=5, scales=(512,)), "windows that are causal"),
        (mask_of((12, 500)), "512 queries or more of a scale"),
    ):
        with pytest.raises(NotSupported, match=match):
            attention(x, x, x, mask, impl="gpu")


@pytest.mark.parametrize("impl", ["xla", "tpu_interpret"])
def test_check_4_scales_one_by_one_equal_the_row(impl, small_blocks):
    """Each scale against the keys so far, and against a cache of the whole row whose later scales
    hold something else."""
    shape, scales, _ = LONG
    q, k, v = tensors(shape)
    run = jax.jit(functools.partial(attention, impl=impl), static_argnums=3)
    whole = run(q, k, v, mask_of(scales))
    for n in (0, 3, 6) if impl == "xla" else (5, 6):
        start, end = sum(scales[:n]), sum(scales[: n + 1])
        cache = [x.at[:, end:].set(1e3) for x in (k, v)]
        for keys in (cache, [x[:, :end] for x in cache]):
            close(run(q[:, start:end], *keys, mask_of(scales, start)), whole[:, start:end], 1e-5)


def test_check_5_later_scales_change_nothing():
    """Scale causality, exactly (acceptance check 5): values and gradients of earlier scales."""
    shape, scales, _ = CASES[1]
    q, k, v = tensors(shape)
    run = jax.jit(lambda *x: attention(*x, mask_of(scales), impl="xla"))
    start = sum(scales[:3])
    other = [x.at[:, start:].add(1.0) for x in (q, k, v)]
    before, after = run(q, k, v), run(*other)
    np.testing.assert_array_equal(before[:, :start], after[:, :start])
    assert (before[:, start:] != after[:, start:]).any()
    seen = jax.grad(lambda k: run(q, k, v)[:, :start].sum())(k)
    assert not seen[:, start:].any() and seen[:, :start].any()


def test_check_5_splash_under_vmap_remat_and_scan(small_blocks):
    """As a layer stack uses it: recomputed, in a loop, over two sets of inputs."""
    shape, scales, _ = LONG

    def total(impl, q, k, v):
        @jax.checkpoint
        def layer(x, _):
            return attention(q + x[..., :16], k, v, mask_of(scales), impl=impl), None

        start = jnp.zeros((*q.shape[:3], v.shape[3]))
        return (jax.lax.scan(layer, start, None, length=2)[0] ** 2).sum()

    both = [jnp.stack(x) for x in zip(tensors(shape), tensors(shape, seed=5))]
    grad = lambda impl: jax.grad(functools.partial(total, impl), (0, 1, 2))  # noqa: E731
    got = jax.jit(jax.vmap(grad("tpu_interpret")))(*both)
    want = jax.jit(jax.vmap(grad("ref")))(*both)
    for a, b in zip(got, want):
        close(a, b, 2e-5)


def test_check_7_kernels_carry_what_their_blocks_cost(small_blocks):
    """Of the blocks with a visible key: the last queries of five rows of blocks see 169, 369 and
    then all 640 keys."""
    b, t, _, h, _, k, v = shape = (2, 640, 640, 4, 2, 16, 24)
    mask = mask_of((1, 4, 64, 100, 200, 271))
    run = lambda *x: attention(*x, mask, impl="tpu_interpret")  # noqa: E731
    blocks = 2 + 3 + 5 + 5 + 5
    assert len(mask.blocks(t, t, 128, 128)) == blocks
    assert count_flops(run, *tensors(shape)) == 2 * b * h * blocks * 128 * 128 * (k + v)


@pytest.mark.parametrize("ratio", [1.0, 1.5])
@pytest.mark.parametrize("budget, most", [("0.25M", 1.35), ("1M", 1.1)])
def test_check_7_work_is_what_is_visible(ratio, budget, most):
    """FLOPs of the XLA form, forward and backward: 62 % of all pairs are visible, and blocks that
    hold the ends of scales add little to them at 1M."""
    mask, tokens = published(ratio, budget)
    x = jax.ShapeDtypeStruct((1, tokens, *HEADS), jnp.bfloat16)
    total = lambda *x: attention(*x, mask, impl="xla").sum()  # noqa: E731
    flops = count_flops(jax.grad(total, (0, 1, 2)), x, x, x)
    sizes = np.array(mask.scales)
    visible = int((sizes * np.cumsum(sizes)).sum())
    assert 0.61 < visible / tokens**2 < 0.63
    heads, width = HEADS
    each = 2 * heads * 7 * width  # per visible pair: two products forward, five backward
    assert 1 < flops / (each * visible) < most


@pytest.mark.aot
@pytest.mark.parametrize("topology, multiple", [("v5e:2x2", 1), ("v5p:2x2x1", 128)])
def test_check_6_tpu_compiles_at_one_megapixel(topology, multiple):
    """Infinity 2B's attention, forward and backward by impl="auto", plain and padded to 128: one
    kernel forward and two backward, no array of scores in the device's memory."""
    pytest.importorskip("libtpu", reason="needs the aot extra")
    device, mesh = abstract_on(topology)
    place = jax.sharding.SingleDeviceSharding(device)
    mask, tokens = published(1.0)
    length = -(-tokens // multiple) * multiple
    x = jax.ShapeDtypeStruct((1, length, *HEADS), jnp.bfloat16, sharding=place)
    total = lambda *x: attention(*x, mask).astype(jnp.float32).sum()  # noqa: E731
    with mesh:
        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(x, x, x).compile()
    calls = [x for x in compiled.as_text().splitlines() if '"tpu_custom_call"' in x]
    kinds = ("fwd", "dq", "dkv")
    assert [sum(f"splash_mha_{x}" in line for line in calls) for x in kinds] == [1, 1, 1]
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * 2 * length * 16 * 128


@pytest.mark.aot
def test_check_6_hopper_calls_cudnn_for_each_long_scale(monkeypatch):
    """Told that there is a cuDNN, impl="auto" asks it for the five scales of 1M with 512 tokens or
    more, forward and backward; XLA does the 921 tokens before them."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the aot extra")
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91400)
    device, mesh = abstract_on("h100:1")
    place = jax.sharding.SingleDeviceSharding(device)
    mask, tokens = published(1.0)
    x = jax.ShapeDtypeStruct((1, tokens, *HEADS), jnp.bfloat16, sharding=place)
    total = lambda *x: attention(*x, mask).astype(jnp.float32).sum()  # noqa: E731
    with mesh:
        traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(x, x, x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text().replace("\\22", '"')
    assert [text.count(f"@__cudnn$fmhaSoftmax{x}(") for x in ("", "Backward")] == [5, 5]
    kinds = [text.count(f'"mask_type": "{x}"') for x in ("NO_MASK", "PADDING")]
    assert kinds == [0, 10]  # an odd number of keys each time
