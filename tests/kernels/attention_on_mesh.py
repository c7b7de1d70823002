"""Run by test_attention_backends.py in a process of its own: attention on 8 devices as on one.

Prints one JSON line per implementation, mesh and mask: whether it went through shard_map, whether
any device got all keys, and the largest difference of result and gradients, relative to the
largest number of each.
"""

import json
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from kernels.attention import MaskSpec, attention, tpu, xla  # noqa: E402
from training import sharding  # noqa: E402

ROWS, TOKENS = 2, 64
SHAPES = {"heads": (4, 2), "groups": (8, 2), "one": (4, 1), "odd": (5, 5)}


def masks():
    """Every way in which keys travel between devices."""
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 4, (ROWS, TOKENS)), 1)
    ids[:, :3] = -1
    ids = jnp.asarray(ids, jnp.int32)
    shuffled = jnp.asarray(np.argsort(rng.random((ROWS, TOKENS)), 1), jnp.int32)
    scales = jnp.asarray(np.sort(rng.integers(0, 5, (ROWS, TOKENS)), 1), jnp.int32)
    valid = jnp.asarray(rng.random((ROWS, TOKENS)) < 0.8).at[:, 0].set(True)
    return dict(
        none=None,
        causal=MaskSpec(),
        prefix=MaskSpec(prefix_length=jnp.asarray([5, 30])),
        window=MaskSpec(window=6),
        wide=MaskSpec(window=40, always_visible=3),
        pinned=MaskSpec(window=7, always_visible=3),
        packed=MaskSpec(q_segment_ids=ids, window=6, always_visible=3),
        contiguous=MaskSpec(q_segment_ids=ids, contiguous=True, always_visible=3),
        shuffled=MaskSpec(q_positions=shuffled, kv_positions=shuffled, window=20),
        scales=MaskSpec(q_scale_ids=scales, causal=False),
        valid=MaskSpec(window=5, always_visible=2, kv_valid=valid),
    )


def cases():
    """(implementation, mesh, shape, masks)."""
    everything = tuple(masks())
    sizes = lambda *n: dict(zip(("data", "fsdp", "tensor", "seq"), n))  # noqa: E731
    yield "xla", sizes(2, 1, 2, 2), "heads", everything
    yield "xla", sizes(1, 1, 1, 8), "heads", ("causal", "pinned", "packed", "valid")
    yield "xla", sizes(1, 1, 4, 2), "groups", ("pinned",)
    yield "xla", sizes(2, 1, 4, 1), "groups", ("pinned", "causal")
    yield "tpu_interpret", sizes(1, 2, 1, 4), "heads", ("causal", "prefix", "window", "pinned")
    yield "tpu_interpret", sizes(2, 1, 4, 1), "groups", ("contiguous", "pinned")
    yield "tpu_interpret", sizes(2, 1, 4, 1), "one", ("none",)
    yield "tpu_interpret", sizes(2, 1, 4, 1), "odd", ("window",)


def tensors(heads, kv_heads):
    """q, k, v with values wider than keys."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((heads, 8), (kv_heads, 8), (kv_heads, 12))
    return [jax.random.normal(x, (ROWS, TOKENS, *size)) for x, size in zip(keys, sizes)]


def main() -> None:
    xla.PLAIN_LIMIT, xla.ROWS, xla.COLUMNS, xla.COLUMNS_IN_WINDOW = 256, 8, 16, 8
    tpu.BLOCK = tpu.BLOCK_IN_WINDOW = 128
    for impl, sizes, shape, names in cases():
        for name in names:
            print(json.dumps(one(impl, sizes, shape, name)), flush=True)


def one(impl, sizes, shape, name):
    """One line."""
    inputs, mask = tensors(*SHAPES[shape]), masks()[name]

    def total(inputs, mask):
        out = attention(*inputs, mask, softcap=5.0, impl=impl)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    graded = jax.value_and_grad(total, has_aux=True)
    alone = jax.jit(graded)(inputs, mask)
    with sharding.scope(sharding.make_mesh(sizes)):
        lowered = jax.jit(graded).lower(inputs, mask)
        shared = lowered.compile()(inputs, mask)
    text = lowered.as_text()
    pairs = zip(*(map(np.asarray, jax.tree.leaves(x)) for x in (shared, alone)), strict=True)
    worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
    found = dict(shard_map="manual" in text, gathered="all_gather" in text, difference=worst)
    return dict(impl=impl, **sizes, shape=shape, mask=name) | found


if __name__ == "__main__":
    main()
