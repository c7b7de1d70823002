"""Run by seven_checks.py in a process of its own: an op on 8 devices as on one.

    python -m tests.kernels.on_mesh tests.kernels.test_mlstm:TestMLSTM

Prints one JSON line per mesh and documents: the largest difference of every output and gradient,
relative to the largest number of its kind.
"""

import importlib
import itertools
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import numpy as np  # noqa: E402

from training import sharding  # noqa: E402


def differences(checks, impl, sizes, documents) -> list[float]:
    """Output, last state, and gradients to every input and to the first state."""
    shape = checks.MESH_SHAPE
    inputs, state = checks.inputs(shape), checks.state(shape)
    numbers = checks.documents(shape) if documents else None
    options = dict(segment_ids=numbers, chunk=shape[-1], impl=impl, **checks.EXACT)
    out = jax.eval_shape(lambda: checks.run(inputs, state, **options)[0])
    cotangent = jax.random.normal(jax.random.key(9), out.shape)
    leaves, join = checks.trained(state)

    def run(inputs, leaves):
        first = join(leaves)
        h, last = checks.run(inputs, first, **options)
        return checks.objective(inputs, first, cotangent, **options), (h, *checks.plain(last))

    graded = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    alone = jax.jit(graded)(inputs, leaves)
    with sharding.scope(sharding.make_mesh(sizes)):
        lowered = jax.jit(graded).lower(inputs, leaves)
        assert "manual" in lowered.as_text()  # it does go through shard_map
        shared = lowered.compile()(inputs, leaves)
    pairs = zip(*(map(np.asarray, jax.tree.leaves(x)) for x in (shared, alone)))
    return [float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)) for a, b in pairs]


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    checks = getattr(importlib.import_module(module), name)()
    for (impl, sizes), documents in itertools.product(checks.MESHES, (False, True)):
        found = differences(checks, impl, sizes, documents)
        print(json.dumps(dict(impl=impl, **sizes, documents=documents, differences=found)))
