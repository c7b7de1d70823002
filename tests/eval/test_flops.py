"""FLOP counts against closed forms, and against XLA's own count where nothing is in a loop."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from eval.flops import count_flops, mfu

BATCH, WIDTH, LAYERS = 4, 8, 5
MATMUL = 2 * BATCH * WIDTH * WIDTH


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


X, W = spec(BATCH, WIDTH), spec(LAYERS, WIDTH, WIDTH)


def layer(x, w):
    return jnp.tanh(x @ w)


def scanned(w, x, wrap=lambda f: f):
    return jax.lax.scan(lambda x, w: (wrap(layer)(x, w), None), x, w)[0].sum()


def unrolled(w, x):
    for matrix in w:
        x = layer(x, matrix)
    return x.sum()


def test_scanned_mlp_forward_and_backward():
    assert count_flops(scanned, W, X) == LAYERS * MATMUL
    assert count_flops(jax.jit(scanned), W, X) == LAYERS * MATMUL
    # backward: one product for the weights and one for the input, in every layer
    assert count_flops(jax.value_and_grad(scanned, (0, 1)), W, X) == 3 * LAYERS * MATMUL


def test_remat_recomputes_the_forward_pass():
    remat = functools.partial(scanned, wrap=jax.checkpoint)
    assert count_flops(remat, W, X) == LAYERS * MATMUL
    assert count_flops(jax.grad(remat, (0, 1)), W, X) == 4 * LAYERS * MATMUL
    policy = jax.checkpoint_policies.dots_saveable
    saved = functools.partial(scanned, wrap=functools.partial(jax.checkpoint, policy=policy))
    assert count_flops(jax.grad(saved, (0, 1)), W, X) == 3 * LAYERS * MATMUL


def test_unrolled_mlp_equals_xla():
    matrices = [spec(WIDTH, WIDTH)] * LAYERS
    for fn in (unrolled, jax.grad(unrolled, (0, 1))):
        xla = jax.jit(fn).lower(matrices, X).compile().cost_analysis()["flops"]
        elementwise = 8 * LAYERS * BATCH * WIDTH  # tanh and its derivative, the final sum
        assert 0 <= xla - count_flops(fn, matrices, X) <= elementwise


@pytest.mark.parametrize("groups, stride", [(1, 1), (2, 1), (1, 2), (4, 1)])
def test_convolution_and_its_gradients_equal_xla(groups, stride):
    x, k = spec(2, 9, 9, 4), spec(3, 3, 4 // groups, 8)

    def conv(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (stride, stride), "VALID", feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    side = (9 - 3) // stride + 1
    flops = 2 * 2 * side * side * 8 * 9 * (4 // groups)
    assert count_flops(conv, x, k) == flops
    assert jax.jit(conv).lower(x, k).compile().cost_analysis()["flops"] == flops
    # Each of both gradients costs a forward pass, up to the padding of the transposed convolution.
    both = count_flops(jax.grad(lambda x, k: conv(x, k).sum(), (0, 1)), x, k)
    assert 2 * flops <= both <= 3 * flops + flops


def test_batched_einsum():
    f = functools.partial(jnp.einsum, "bthk,bshk->bhts")
    assert count_flops(f, spec(2, 3, 4, 5), spec(2, 7, 4, 5)) == 2 * 2 * 4 * 3 * 7 * 5


def test_custom_vjp_counts_its_own_backward():
    @jax.custom_vjp
    def f(x, w):
        return x @ w

    f.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, jnp.zeros_like(r[1])))
    w = spec(WIDTH, WIDTH)
    assert count_flops(f, X, w) == MATMUL
    assert count_flops(jax.grad(lambda x, w: f(x, w).sum(), (0, 1)), X, w) == 2 * MATMUL


def test_loops_and_branches():
    w = spec(WIDTH, WIDTH)
    fixed = lambda x, w: jax.lax.fori_loop(0, 7, lambda i, x: layer(x, w), x)  # noqa: E731
    assert count_flops(fixed, X, w) == 7 * MATMUL

    def until(x, w):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: layer(x, w), x)

    assert count_flops(until, X, w) == MATMUL  # one trip: the count is not in the program

    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: layer(x, w), lambda: layer(layer(x, w), w))

    assert count_flops(branch, X, w) == 2 * MATMUL


def test_shard_map_counts_all_shards_once():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "idle"), axis_types=(AxisType.Auto,) * 2)
    P = PartitionSpec
    f = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(P("data", None), P()), out_specs=P("data", None),
        check_vma=False,
    )  # fmt: skip
    # Replicated over "idle": the same product four times is one product of the model.
    assert count_flops(f, X, spec(WIDTH, WIDTH)) == MATMUL


def kernel(x, w, o):
    o[...] = jnp.dot(x[...], w[...])


@pytest.mark.parametrize("estimate", [None, 12345])
def test_pallas_uses_the_estimate_or_body_times_grid(estimate):
    cost = estimate and pl.CostEstimate(flops=estimate, bytes_accessed=1, transcendentals=0)
    f = pl.pallas_call(
        kernel, out_shape=spec(BATCH, WIDTH), grid=(3,), cost_estimate=cost, interpret=True
    )
    assert count_flops(f, X, spec(WIDTH, WIDTH)) == (estimate or 3 * MATMUL)


def test_grouped_product():
    f = lambda x, w, n: jax.lax.ragged_dot(x, w, n)  # noqa: E731
    sizes = jax.ShapeDtypeStruct((LAYERS,), jnp.int32)
    assert count_flops(f, X, W, sizes) == MATMUL  # each row meets one group's matrix


def test_utilisation():
    assert mfu(2e15, 2.0, 4, 1e15) == 0.25
