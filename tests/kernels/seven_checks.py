"""The checks that every op passes, written once (codebase style, section 10).

A test file subclasses `SevenChecks`, or `Checks` if no state goes from token to token, and says how
its op is called; tests/kernels/conftest.py runs every check for each of its implementations and
shapes. Checks 6 and 7, what compilers make of the op at a published size, differ too much between
ops: `abstract_on` helps with them.
"""

import abc
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WIDE = jnp.float64


def assert_close(got, want, tolerance):
    """Finite, and as near as `tolerance` times the largest entry."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 1e-6))


class Described:
    """The context of programs for one absent device, as often as it is entered."""

    def __init__(self, device):
        self.mesh = jax.sharding.Mesh(np.array([device]), ("data",))

    def __enter__(self):
        self.inside = jax.set_mesh(self.mesh)  # sets it here and now, and only once

    def __exit__(self, *error):
        return self.inside.__exit__(*error)


def abstract_on(topology: str):
    """(a device of an absent topology, the context to compile for it in)."""
    from training import topology as topologies

    device = topologies.devices(topologies.parse(topology))[0]
    return device, Described(device)


def document_ids(shape, seed=3, axis=2):
    """Documents [B, T] of random lengths; ids come back, which does not join them."""
    b, t = shape[0], shape[axis]
    changes = np.random.default_rng(seed).random((b, t)) < 0.15
    return jnp.asarray(np.cumsum(changes, 1) % 2, jnp.int32)


def in_a_process(*command) -> list:
    """What `python COMMAND` prints, a JSON value a line: 8 devices need a process of their own."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": str(root)}, cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


class Checks(abc.ABC):
    """Subclass it as TestX. Shapes are (B, H, T, ..., chunk); tokens lie on axis 2 of every input,
    or on AXIS of shapes and outputs and where `cut` says.

    Tolerances are relative to the largest entry.
    """

    AXIS = 2  # of the tokens
    SHAPES: tuple = ()  # awkward ones: one token, odd lengths, sizes 1 and 130
    IMPLS: tuple = ()  # held against "ref"
    EXACT: dict = {}  # options under which the written gradient has no approximation
    GRADIENT_SHAPES: tuple = ()  # float32 gradients; one with sizes that are not whole lanes
    MESHES: tuple = ()  # (impl, {axis: size}) with 8 devices
    MESH_SHAPE: tuple = ()

    # ------------------------------------------------ what a subclass says

    @abc.abstractmethod
    def inputs(self, shape, dtype=jnp.float32, seed=0) -> list:
        """Inputs of the op, those with a type of their own in float32."""

    def state(self, shape, dtype=jnp.float32) -> Any:
        """A state that is not empty, where the op has one."""
        return ()

    @abc.abstractmethod
    def run(self, inputs, state, **options) -> tuple:
        """(output, last state); options: impl, chunk, segment_ids and the op's own."""

    def plain(self, state) -> tuple:
        """The state as arrays that do not depend on how it is represented."""
        return tuple(state)

    def trained(self, state) -> tuple[Any, Any]:
        """(what a gradient flows to, function that makes the state of it)."""
        return state, lambda x: x

    def tame(self, inputs, state) -> tuple:
        """Inputs for narrow types: no cancellation that would magnify their rounding at will."""
        return inputs, state

    def chunk(self, shape, impl) -> int:
        """The shape's chunk, or the next one that an implementation takes."""
        return shape[-1]

    # ------------------------------------------------ helpers

    def documents(self, shape):
        """Documents packed in the rows of a shape."""
        return document_ids(shape, axis=self.AXIS)

    def objective(self, inputs, state, cotangent, **options):
        """A number that every output takes part in."""
        out, last = self.run(inputs, state, **options)
        last = self.plain(last)
        weights = [jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in last]
        return (out * cotangent).sum() + 0.01 * sum((w * x).sum() for w, x in zip(weights, last))

    def gradient(self, inputs, state, **options):
        """Gradients to the inputs and to the first state, in float32 or better."""
        out = jax.eval_shape(lambda: self.run(inputs, state, **options)[0])
        cotangent = jax.random.normal(jax.random.key(9), out.shape, inputs[-1].dtype)
        leaves, join = self.trained(state)

        def total(inputs, leaves):
            return self.objective(inputs, join(leaves), cotangent, **options)

        return jax.jit(jax.grad(total, argnums=(0, 1)))(inputs, leaves)

    def assert_states_close(self, got, want, tolerance):
        """Equal, however they are represented."""
        for a, b in zip(self.plain(got), self.plain(want), strict=True):
            assert_close(a, b, tolerance)

    def assert_trees_close(self, got, want, tolerance):
        """Leaf by leaf."""
        for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            assert_close(a, b, tolerance)

    # ------------------------------------------------ the checks

    def test_checks_1_and_2_equal_ref(self, impl, shape, documents):
        """float32 to 1e-5, bfloat16 to 1e-2 of the recurrence on the same numbers in float32."""
        options = dict(segment_ids=self.documents(shape) if documents else None)
        run = jax.jit(
            lambda inputs, state, impl: self.run(
                inputs, state, impl=impl, chunk=self.chunk(shape, impl), **options
            ),
            static_argnums=2,
        )
        for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)):
            inputs, state = self.inputs(shape, dtype), self.state(shape)
            if dtype == jnp.bfloat16:
                inputs, state = self.tame(inputs, state)
            out, last = run(inputs, state, impl)
            want, want_last = run([x.astype(jnp.float32) for x in inputs], state, "ref")
            assert out.dtype == dtype and {x.dtype for x in self.plain(last)} == {jnp.float32.dtype}
            assert_close(out, want, tolerance)
            self.assert_states_close(last, want_last, tolerance)

    def test_check_3_gradients_equal_autodiff_of_ref(self, shape, documents):
        """float64: through inputs, the first and the last state, to 1e-11."""
        with jax.enable_x64(True):
            wide = lambda tree: jax.tree.map(lambda x: x.astype(WIDE), tree)  # noqa: E731
            given = wide((self.inputs(shape), self.state(shape)))
            options = dict(
                segment_ids=self.documents(shape) if documents else None, chunk=shape[-1]
            )
            grads = (self.gradient(*given, impl=x, **self.EXACT, **options) for x in ("xla", "ref"))
            self.assert_trees_close(*grads, 1e-11)

    def test_check_3_float32_gradients(self, impl, gradient_shape, documents):
        """2e-4, through inputs and states, also with sizes that are not whole lanes."""
        shape = gradient_shape
        given = self.inputs(shape), self.state(shape)
        options = dict(
            segment_ids=self.documents(shape) if documents else None, chunk=self.chunk(shape, impl)
        )
        grads = (self.gradient(*given, impl=x, **options) for x in (impl, "ref"))
        self.assert_trees_close(*grads, 2e-4)

    def test_check_5_vmap_equals_a_loop(self, impl):
        """Over two sets of inputs."""
        shape = self.SHAPES[1]
        options = dict(chunk=self.chunk(shape, impl), impl=impl)
        state = self.state(shape)
        pairs = [jnp.stack(x) for x in zip(self.inputs(shape), self.inputs(shape, seed=5))]
        run = lambda *inputs: self.run(inputs, state, **options)[0]  # noqa: E731
        got, alone = jax.jit(jax.vmap(run))(*pairs), jax.jit(run)
        for n in range(2):
            assert_close(got[n], alone(*(x[n] for x in pairs)), 1e-5)

    def test_check_5_eight_devices_equal_one(self):
        """Values and every gradient over the subclass's meshes, in a process with 8 devices."""
        where = f"{type(self).__module__}:{type(self).__qualname__}"
        rows = in_a_process("-m", "tests.kernels.on_mesh", where)
        assert len(rows) == 2 * len(self.MESHES)
        for row in rows:
            assert max(row["differences"]) < 2e-5, row


class SevenChecks(Checks):
    """With a state that goes from token to token, and from call to call."""

    @abc.abstractmethod
    def state(self, shape, dtype=jnp.float32) -> Any:
        """A state that is not empty."""

    @abc.abstractmethod
    def step(self, inputs, state) -> tuple:
        """(output of one token, state)."""

    def cut(self, inputs, start, stop) -> list:
        """Inputs of some of the tokens."""
        return [jax.lax.slice_in_dim(x, start, stop, axis=self.AXIS) for x in inputs]

    def token(self, inputs, t) -> list:
        """Inputs of one token, without its axis."""
        return [x.take(t, axis=self.AXIS) for x in inputs]

    def test_check_4_calls_follow_each_other(self, impl, cut):
        """Two calls with the state between them are one, in float32."""
        shape = self.SHAPES[1]
        inputs, state = self.inputs(shape), self.state(shape)
        run = jax.jit(functools.partial(self.run, chunk=self.chunk(shape, impl), impl=impl))
        whole, last = run(inputs, state)
        first, between = run(self.cut(inputs, 0, cut), state)
        second, end = run(self.cut(inputs, cut, shape[self.AXIS]), between)
        assert_close(jnp.concatenate([first, second], self.AXIS), whole, 1e-5)
        self.assert_states_close(end, last, 1e-5)

    def test_check_4_calls_equal_steps(self, cut):
        """float64, 1e-12: a call, and single tokens behind it, are one call."""
        with jax.enable_x64(True):
            shape = self.SHAPES[1]
            wide = lambda tree: jax.tree.map(lambda x: x.astype(WIDE), tree)  # noqa: E731
            inputs, state = wide((self.inputs(shape), self.state(shape)))
            run = jax.jit(functools.partial(self.run, chunk=shape[-1], impl="xla"))
            step = jax.jit(self.step)
            whole, last = run(inputs, state)
            _, state = run(self.cut(inputs, 0, cut), state)
            for t in range(cut, shape[self.AXIS]):
                out, state = step(self.token(inputs, t), state)
                assert_close(out, whole.take(t, axis=self.AXIS), 1e-12)
            self.assert_states_close(state, last, 1e-12)
