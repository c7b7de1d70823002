"""Selective scan: golden values of the specification, every implementation against the recurrence,
transformers' functions, documents that start from a state, masked tokens."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.selective_scan import selective_scan, selective_scan_step, xla
from kernels.selective_scan.ref import Inputs
from tests.kernels.seven_checks import SevenChecks

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "scan.npz"
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
    )
    MESH_SHAPE = (2, 64, 8, 16, 16)

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
            np.testing.assert_allclose(out[0, 4], row, rtol=0, atol=6e-11 if wide else 1e-6)
            last = [0.53277966, 0.15361985, 0.52097455, 0.17181931, 0.44831198, 0.16681370]
            np.testing.assert_allclose(h.ravel(), last, rtol=0, atol=6e-9 if wide else 1e-6)
            sums = (10.84229605, 2.93952270, 12.64238602, 5.56973106, 5.64648902, 0.47547232)
            sums += (3.61218233, 2.93952270)
            for name, grad, want in zip(NAMES, grads, sums):
                np.testing.assert_allclose(
                    grad.sum(), want, rtol=0 if wide else 1e-6, atol=6e-9 if wide else 1e-6,
                    err_msg=name,
                )  # fmt: skip


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
