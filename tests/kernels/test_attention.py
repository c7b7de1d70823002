"""Attention: xla against the reference, masks against the rule spelled out, memory, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from eval.flops import count_flops
from kernels.attention import MaskSpec, api, attention, ref, xla
from kernels.errors import NotSupported

# (B, T, S, H, G, K, V): one query, odd lengths, D = 1 and 130, multi-query, V unlike K.
SHAPES = [
    (1, 1, 9, 4, 2, 8, 8),
    (2, 37, 37, 4, 1, 16, 16),
    (1, 20, 33, 6, 3, 1, 5),
    (3, 19, 19, 2, 2, 130, 7),
]

HYMBA = ((25, 64), (5, 64), (5, 128))  # heads and widths of the 1.5B model's q, k, v


def tensors(shape, dtype=jnp.float32, seed=0):
    b, t, s, h, g, k, v = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = [(b, t, h, k), (b, s, g, k), (b, s, g, v)]
    return [jax.random.normal(key, size).astype(dtype) for key, size in zip(keys, sizes)]


def rich_mask(shape):
    """Prefix, window, always-visible keys, segments and invalid keys at once."""
    b, t, s = shape[:3]
    rng = np.random.default_rng(1)
    return MaskSpec(
        prefix_length=jnp.asarray(rng.integers(0, s, b), jnp.int32),
        q_segment_ids=jnp.asarray(np.sort(rng.integers(0, 2, (b, t)), 1), jnp.int32),
        kv_segment_ids=jnp.asarray(np.sort(rng.integers(0, 2, (b, s)), 1), jnp.int32),
        q_positions=jnp.broadcast_to(jnp.arange(s - t, s, dtype=jnp.int32), (b, t)),
        kv_valid=jnp.asarray(rng.random((b, s)) < 0.8),
        window=7,
        always_visible=2,
    )


def packed_mask(shape):
    """What every block can be told from: a window, always visible keys, shared and not."""
    b, t, s = shape[:3]
    rng = np.random.default_rng(2)
    ids = np.sort(rng.integers(0, 3, (b, max(t, s))), 1)
    ids[:, :3] = -1
    ids = jnp.asarray(ids, jnp.int32)
    return MaskSpec(
        q_segment_ids=ids[:, s - t : s], kv_segment_ids=ids[:, :s],
        window=6, always_visible=3, query_offset=s - t,
    )  # fmt: skip


def close(got, want, tolerance):
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 1e-6))


def variants(shape):
    """Mask, cap and chunk, each value at least once with each of the others' extremes."""
    yield None, None, None
    yield None, None, 8
    yield MaskSpec(window=5), 5.0, 8
    yield rich_mask(shape), 5.0, None
    yield rich_mask(shape), None, 8
    yield packed_mask(shape), None, 4
    yield MaskSpec(window=4, always_visible=2), 5.0, 3
    yield MaskSpec(query_offset=shape[2] - shape[1]), None, 5
    yield MaskSpec(causal=False, window=5), None, 8


@pytest.mark.parametrize("shape", SHAPES)
def test_check_1_xla_equals_ref(shape):
    @jax.jit
    def both(q, k, v):
        pairs = []
        for mask, softcap, chunk in variants(shape):
            options = dict(scale=0.3, softcap=softcap)
            got = xla.attention(q, k, v, mask, **options, chunk=chunk)
            pairs.append((got, ref.attention(q, k, v, mask, **options)))
        return pairs

    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)):
        for got, want in both(*tensors(shape, dtype)):
            assert got.dtype == dtype and got.shape == want.shape
            close(got, want, tolerance)


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("make", [rich_mask, packed_mask])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_check_3_gradients_equal_ref(shape, make, chunk):
    mask = dataclasses.replace(make(shape), kv_valid=None)

    @jax.jit
    def both(q, k, v, cotangent):
        options = dict(scale=0.3, softcap=4.0)
        _, want = jax.vjp(lambda *x: ref.attention(*x, mask, **options), q, k, v)
        _, got = jax.vjp(lambda *x: xla.attention(*x, mask, **options, chunk=chunk), q, k, v)
        return got(cotangent), want(cotangent)

    b, t, _, h, _, _, v = shape
    cotangent = jax.random.normal(jax.random.key(9), (b, t, h, v))
    for got, want in zip(*both(*tensors(shape), cotangent)):
        close(got, want, 1e-5)


@pytest.mark.parametrize("mask", [MaskSpec(), MaskSpec(window=6, always_visible=2)])
def test_check_5_vmap_equals_a_loop(mask):
    shape, options = SHAPES[1], dict(scale=1.0, softcap=None)
    q, k, v = (jnp.stack([a, b]) for a, b in zip(tensors(shape), tensors(shape, seed=5)))

    def graded(q, k, v):
        run = lambda *x: jnp.sum(xla.attention(*x, mask, **options, chunk=8) ** 2)  # noqa: E731
        return jax.grad(run, (0, 1, 2))(q, k, v)

    got = jax.jit(jax.vmap(graded))(q, k, v)
    for i in range(2):
        wanted = graded(q[i], k[i], v[i])
        for a, b in zip(got, wanted):
            close(a[i], b, 1e-5)


@pytest.mark.parametrize("window, pinned", [(None, 0), (7, 0), (7, 3), (1, 5), (40, 9)])
@pytest.mark.parametrize("queries, keys, offset", [(37, 37, 0), (20, 33, 13), (33, 20, 0)])
def test_blocks_are_those_with_a_visible_key(window, pinned, queries, keys, offset):
    mask = MaskSpec(window=window, always_visible=pinned, query_offset=offset)
    dense = np.asarray(mask.dense(queries, keys))[0]
    for rows, columns in ((8, 8), (5, 16), (64, 4)):
        found = {tuple(x) for x in mask.blocks(queries, keys, rows, columns).tolist()}
        seen = {
            (i // rows, j // columns)
            for i in range(0, queries, rows)
            for j in range(0, keys, columns)
            if dense[i : i + rows, j : j + columns].any()
            or (j == 0 and not dense[i : i + rows].any())
        }
        assert found == seen


def test_check_7_work_of_a_window_is_linear_in_the_row():
    """Matrix products at Hymba 1.5B's heads: equal steps in T cost equal steps, and at 8,192 tokens
    behind 128 always visible ones less than two thirds more than what is visible needs; a causal
    row costs little more than half of all pairs."""

    def flops(tokens, mask):
        q, k, v = (jax.ShapeDtypeStruct((1, tokens, *x), jnp.bfloat16) for x in HYMBA)
        run = functools.partial(attention, mask=mask, impl="xla")
        return count_flops(jax.grad(lambda *x: run(*x).sum(), (0, 1, 2)), q, k, v)

    local = MaskSpec(window=1025, always_visible=128)
    a, b, c = (flops(n, local) for n in (4352, 8448, 12544))
    assert c - b == b - a
    tokens = 8192 + 128
    each = 2 * 25 * (64 + 128) + 2 * 25 * (3 * 64 + 2 * 128)  # per visible pair; scores twice
    visible = int(np.asarray(local.dense(tokens, tokens)).sum())
    assert each * visible < flops(tokens, local) < 5 / 3 * each * visible
    assert flops(tokens, MaskSpec()) < 1.2 * each * tokens * (tokens + 1) // 2


@pytest.mark.parametrize(
    "mask", [MaskSpec(), MaskSpec(window=300), MaskSpec(causal=False, scales=(1, 99, 400, 700))],
    ids=["causal", "window", "scales"],
)  # fmt: skip
def test_blocks_of_accelerators_equal_ref_too(mask, monkeypatch):
    """Where this runs XLA cuts for a CPU's cache; GPUs and TPUs get larger blocks."""
    q, k, v = tensors((1, 1200, 1200, 2, 1, 8, 8))
    monkeypatch.setattr(xla, "PLAIN_LIMIT", 0)
    on_cpu = xla._sizes(q, mask)
    monkeypatch.setattr(xla.dispatch, "platform", lambda: "gpu")
    assert xla._sizes(q, mask)[0] > on_cpu[0]

    def both(run):
        out, back = jax.vjp(lambda *x: run(*x, mask, scale=0.3, softcap=None), q, k, v)
        return out, *back(out)

    for got, want in zip(both(xla.attention), both(ref.attention), strict=True):
        close(got, want, 2e-5)


def test_check_7_memory_grows_with_the_row_not_its_square():
    """Temporaries of the gradient at Hymba 1.5B's heads; one block of scores is 26 MB."""

    def temporaries(tokens, mask):
        q, k, v = (jax.ShapeDtypeStruct((1, tokens, *x), jnp.bfloat16) for x in HYMBA)

        def total(*x):
            return attention(*x, mask, impl="xla").astype(jnp.float32).sum()

        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for mask in (MaskSpec(window=1025, always_visible=128), MaskSpec()):
        short, long = temporaries(4096, mask), temporaries(8192, mask)
        assert long < 2.1 * short
        assert long < 25 * 8192 * 8192 * 4 / 20  # one array of scores


def test_masks_equal_the_rule_spelled_out():
    shape = (3, 11, 14, 2, 1, 4, 4)
    mask = rich_mask(shape)
    got = np.asarray(mask.dense(11, 14))
    field = {f.name: getattr(mask, f.name) for f in dataclasses.fields(mask)}
    m = {name: np.asarray(x) for name, x in field.items() if x is not None}
    for b in range(3):
        for t in range(11):
            for s in range(14):
                q = m["q_positions"][b, t]
                visible = (
                    (s <= q or s < m["prefix_length"][b])
                    and (q - s < 7 or s < 2)
                    and m["q_segment_ids"][b, t] == m["kv_segment_ids"][b, s]
                    and m["kv_valid"][b, s]
                )
                assert got[b, t, s] == visible


def test_masks_1_3_mask_ar_by_scale_ids_and_prefix_lm():
    """big_vision's make_attn_mask: key j is visible to i iff cumsum(ar)_j <= cumsum(ar)_i."""
    rng = np.random.default_rng(3)
    ar = rng.integers(0, 2, (4, 12))
    valid = np.arange(12) < rng.integers(6, 13, (4, 1))
    count = np.cumsum(ar, axis=1)
    rule = (count[:, None, :] <= count[:, :, None]) & valid[:, None, :]
    ids = jnp.asarray(count, jnp.int32)
    spec = MaskSpec(q_scale_ids=ids, kv_valid=jnp.asarray(valid), causal=False)
    np.testing.assert_array_equal(np.asarray(spec.dense(12, 12)), rule)

    prefix = np.array([0, 3, 12, 1])
    ar = (np.arange(12) >= prefix[:, None]).astype(int)
    count = np.cumsum(ar, axis=1)
    rule = count[:, None, :] <= count[:, :, None]
    spec = MaskSpec(prefix_length=jnp.asarray(prefix, jnp.int32))
    np.testing.assert_array_equal(np.asarray(spec.dense(12, 12)), rule)


def test_window_counts_the_query_itself():
    visible = np.asarray(MaskSpec(window=3).dense(6, 6))[0]
    assert [int(row.sum()) for row in visible] == [1, 2, 3, 3, 3, 3]


def test_prefix_per_query_and_row_slices():
    """A packed row's segments have prefixes of their own; block() cuts any mask."""
    segments = jnp.array([[0, 0, 0, 1, 1, 1, 1]])
    prefix = jnp.array([[2, 2, 2, 6, 6, 6, 6]])
    spec = MaskSpec(prefix_length=prefix, q_segment_ids=segments)
    whole = np.asarray(spec.dense(7, 7))[0]
    assert whole[0, 1] and not whole[0, 2] and whole[3, 5] and not whole[3, 6]
    assert not whole[3:, :3].any()
    part = np.asarray(spec.padded(8, 9).block((2, 4), (1, 5)).dense(4, 5))[0]
    np.testing.assert_array_equal(part, whole[2:6, 1:6])


def test_keys_of_a_negative_segment_are_shared():
    """A picture (id -1) that every packed question sees, and that sees no question."""
    segments = jnp.array([[-1, -1, 1, 1, 2, 2]])
    positions = jnp.array([[0, 1, 2, 3, 2, 3]])
    prefix = jnp.array([[2, 2, 3, 3, 4, 4]])
    spec = MaskSpec(prefix, segments, None, positions, positions)
    visible = np.asarray(spec.dense(6, 6))[0].astype(int)
    assert visible.tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 1],
        [1, 1, 0, 0, 1, 1],
    ]


def test_rows_without_a_visible_key_stay_finite():
    q, k, v = tensors(SHAPES[1])
    mask = MaskSpec(kv_valid=jnp.zeros((2, 37), bool))
    for impl in ("ref", "xla"):
        out, grads = jax.value_and_grad(
            lambda q, impl=impl: jnp.sum(attention(q, k, v, mask, impl=impl) ** 2)
        )(q)
        assert np.isfinite(out) and np.isfinite(grads).all()


def test_long_queries_never_hold_all_scores():
    """Forward and backward temporaries stay below a third of one [B, H, T, S] buffer."""
    b, t, h = 1, 4096, 2
    x = jax.ShapeDtypeStruct((b, t, h, 8), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, MaskSpec(), softcap=5.0))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < b * h * t * t * 4 / 3


def test_dispatch(monkeypatch):
    q, k, v = tensors(SHAPES[1])

    def refuses(*args, **kwargs):
        raise NotSupported("needs an accelerator")

    monkeypatch.setitem(api.IMPLEMENTATIONS, "picky", refuses)
    monkeypatch.setattr(api, "AUTO", {"cpu": ("picky", "xla"), "tpu": ("picky",)})
    close(attention(q, k, v, None), attention(q, k, v, None, impl="xla"), 1e-7)
    with pytest.raises(NotSupported, match="accelerator"):
        attention(q, k, v, None, impl="picky")
    with pytest.raises(ValueError, match="impl='cuda', allowed: auto, ref, xla"):
        attention(q, k, v, None, impl="cuda")
    with pytest.raises(ValueError, match="4 query heads"):
        attention(q, *(jnp.repeat(x, 3, axis=2) for x in (k, v)), None)
    # "auto" looks at what is compiled for, not at what is attached.
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=tpu)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(NotSupported, match="picky: needs an accelerator"),
    ):
        jax.eval_shape(lambda q, k, v: attention(q, k, v, None), q, k, v)


@pytest.mark.aot
def test_check_6_tpu_keeps_scores_on_chip_for_long_rows():
    """Compiled for a v5e: forward and backward leave no score matrix in the device's memory."""
    pytest.importorskip("libtpu", reason="needs the aot extra")
    topology = topologies.get_topology_desc("v5e:2x2", "tpu")
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    t, h, g = 4096, 8, 4
    q = jax.ShapeDtypeStruct((1, t, h, 128), jnp.bfloat16, sharding=place)
    kv = jax.ShapeDtypeStruct((1, t, g, 128), jnp.bfloat16, sharding=place)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, MaskSpec(), softcap=50.0, impl="xla"))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, kv, kv).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < h * t * t * 4 / 50
