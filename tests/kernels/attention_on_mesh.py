"""Run by test_attention_backends.py in a process of its own: attention on 8 devices as on one.

Prints one JSON line per implementation, mesh and mask: whether it went through shard_map, whether
a device had its own queries only, whether it gathered all keys, and the largest difference of
result and gradients, relative to the largest number of each.
"""

import json
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from kernels.attention import MaskSpec, attention, tpu, xla  # noqa: E402
from training import sharding  # noqa: E402

ROWS, TOKENS, AHEAD = 2, 64, 5
BEFORE = ((0, 0), (AHEAD, 0))
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
    behind, visible = dict(query_offset=AHEAD, always_visible=AHEAD), dict(constant_values=True)
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
        next_scale=MaskSpec(scales=(1, 4, 9, 16, 30), causal=False),  # four tokens of padding
        valid=MaskSpec(window=5, always_visible=2, kv_valid=valid),
        behind=MaskSpec(window=7, **behind),
        behind_valid=MaskSpec(window=30, kv_valid=jnp.pad(valid, BEFORE, **visible), **behind),
        behind_all=MaskSpec(**behind),
        behind_packed=MaskSpec(
            q_segment_ids=ids,
            kv_segment_ids=jnp.pad(ids, BEFORE, constant_values=-1),
            contiguous=True,
            window=20,
            **behind,
        ),
    )


def cases():
    """(implementation, mesh, shape, masks)."""
    everything = tuple(name for name in masks() if not name.startswith("behind"))
    behind = tuple(name for name in masks() if name.startswith("behind"))
    sizes = lambda *n: dict(zip(("data", "fsdp", "tensor", "seq"), n))  # noqa: E731
    yield "xla", sizes(2, 1, 2, 2), "heads", everything
    yield "xla", sizes(1, 1, 1, 8), "heads", ("causal", "pinned", "packed", "valid")
    yield "xla", sizes(1, 1, 4, 2), "groups", ("pinned",)
    yield "xla", sizes(2, 1, 4, 1), "groups", ("pinned", "causal")
    kinds = ("causal", "prefix", "window", "pinned", "next_scale")
    yield "tpu_interpret", sizes(1, 2, 1, 4), "heads", kinds
    yield "tpu_interpret", sizes(1, 1, 2, 4), "heads", behind
    yield "tpu_interpret", sizes(2, 1, 4, 1), "groups", ("contiguous", "pinned", "next_scale")
    yield "tpu_interpret", sizes(2, 1, 4, 1), "one", ("none",)
    yield "tpu_interpret", sizes(2, 1, 4, 1), "odd", ("window",)


def tensors(heads, kv_heads, ahead=0):
    """q, k, v with values wider than keys; `ahead` more keys than queries."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((0, heads, 8), (ahead, kv_heads, 8), (ahead, kv_heads, 12))
    return [
        jax.random.normal(x, (ROWS, TOKENS + more, *size)) for x, (more, *size) in zip(keys, sizes)
    ]


def main() -> None:
    xla.PLAIN_LIMIT, xla.ROWS, xla.COLUMNS, xla.COLUMNS_IN_WINDOW = 256, 8, 16, 8
    xla.COLUMNS_OF_SCALES = 8
    tpu.BLOCK, tpu.BLOCK_IN_WINDOW, tpu.BLOCKS_OF_SCALES = 128, 128, {128: 1}
    for impl, sizes, shape, names in cases():
        for name in names:
            print(json.dumps(one(impl, sizes, shape, name)), flush=True)


def one(impl, sizes, shape, name):
    """One line."""
    mask = masks()[name]
    inputs = tensors(*SHAPES[shape], AHEAD if name.startswith("behind") else 0)

    def total(inputs, mask):
        out = attention(*inputs, mask, softcap=5.0, impl=impl)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    graded = jax.value_and_grad(total, has_aux=True)
    alone = jax.jit(graded)(inputs, mask)
    with sharding.scope(sharding.make_mesh(sizes)):
        traced = jax.jit(graded).trace(inputs, mask)
        lowered = traced.lower()
        shared = lowered.compile()(inputs, mask)
    specs = re.search(r"\bin_specs=.*", str(traced.jaxpr))
    cut = bool(specs and re.search(r"P\([^()]*'seq', [^()]*, None\)", specs[0]))  # of [B, T, H, K]
    text = lowered.as_text()
    pairs = zip(*(map(np.asarray, jax.tree.leaves(x)) for x in (shared, alone)), strict=True)
    worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
    found = dict(shard_map="manual" in text, gathered="all_gather" in text, difference=worst)
    found["queries_cut"] = cut
    return dict(impl=impl, **sizes, shape=shape, mask=name) | found


if __name__ == "__main__":
    main()
