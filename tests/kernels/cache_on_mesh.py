"""Run by test_cache_write.py in a process of its own: write_slots on 8 devices as on one.

Prints one JSON line per mesh and shape: whether the bits are equal, whether it went through
shard_map, and whether anything was gathered.
"""

import json
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402

from kernels import shard  # noqa: E402
from kernels.attention import write_slots  # noqa: E402
from training import sharding  # noqa: E402

ROWS, OWN = 8, (None, "batch", "act_kv_heads", None, None)
SIZES = ("data", "fsdp", "tensor", "seq")


def main() -> None:
    for sizes, heads in (((2, 2, 2, 1), 2), ((2, 1, 2, 2), 3)):  # 3 heads stay whole
        mesh = sharding.make_mesh(dict(zip(SIZES, sizes)))
        cache, new = (
            jax.random.normal(jax.random.key(n), shape)
            for n, shape in enumerate([(2, ROWS, heads, 128, 16), (ROWS, 1, heads, 16)])
        )
        slots = jnp.arange(ROWS, dtype=jnp.int32)[:, None] * 20 - 3  # the first and last: dropped
        run = jax.jit(lambda *x: write_slots(x[0], 1, *x[1:], impl="tpu_interpret"))
        alone = run(cache, new, slots)
        with sharding.scope(mesh):
            cache = jax.device_put(cache, NamedSharding(mesh, shard.spec(OWN, cache.shape)))
            lowered = run.lower(cache, new, slots)
            compiled = lowered.compile()
            shared = compiled(cache, new, slots)
        found = dict(
            equal=bool((np.asarray(alone) == np.asarray(shared)).all()),
            shard_map="manual" in lowered.as_text(),
            kept=shared.sharding.is_equivalent_to(cache.sharding, cache.ndim),
            gathered="all-gather" in compiled.as_text(),
        )
        print(json.dumps(dict(zip(SIZES, sizes)) | found), flush=True)


if __name__ == "__main__":
    main()
