"""Run by test_mlstm.py in a process of its own: the mLSTM on 8 devices as on one.

Prints one JSON line per mesh and documents: the largest difference of every output and gradient,
relative to the largest number of its kind.
"""

import itertools
import json
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from kernels.mlstm import State, mlstm  # noqa: E402
from tests.kernels.test_mlstm import ids, objective, some_state, tensors  # noqa: E402
from training import sharding  # noqa: E402

MESHES = (
    ("xla", dict(data=2, fsdp=1, tensor=2, seq=2)),
    ("xla", dict(data=1, fsdp=1, tensor=1, seq=8)),
    ("tpu_interpret", dict(data=1, fsdp=2, tensor=1, seq=4)),
)


def without_gauge(last):
    scale = jnp.exp(last.m)
    return last.C * scale[..., None, None], last.n * scale[..., None]


def differences(impl, sizes, documents):
    shape = (2, 2, 64, 8, 12, 16)
    inputs, state = tensors(shape), some_state(shape)
    cotangent = jax.random.normal(jax.random.key(9), inputs[2].shape)
    options = dict(segment_ids=ids(shape) if documents else None, chunk=16, eps=0.0, impl=impl)

    def run(inputs, C, n):
        first = State(C, n, state.m)
        h, last = mlstm(*inputs, state=first, **options)
        return objective(inputs, first, cotangent, **options), (h, *without_gauge(last))

    graded = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
    alone = jax.jit(graded)(inputs, state.C, state.n)
    with sharding.scope(sharding.make_mesh(sizes)):
        lowered = jax.jit(graded).lower(inputs, state.C, state.n)
        assert "manual" in lowered.as_text()  # it does go through shard_map
        shared = lowered.compile()(inputs, state.C, state.n)
    pairs = zip(*(map(np.asarray, jax.tree.leaves(x)) for x in (shared, alone)))
    return [float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)) for a, b in pairs]


if __name__ == "__main__":
    for (impl, sizes), documents in itertools.product(MESHES, (False, True)):
        found = differences(impl, sizes, documents)
        print(json.dumps(dict(impl=impl, **sizes, documents=documents, differences=found)))
