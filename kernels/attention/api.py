"""attention(): one call, several implementations, chosen by platform and shape."""

import dataclasses
import functools

import jax
from jaxtyping import Array, Float

from kernels import dispatch, shard
from kernels.attention import context, gpu, ref, tpu, xla
from kernels.attention.mask import MaskSpec

IMPLEMENTATIONS = {
    "ref": ref.attention,
    "xla": xla.attention,
    "tpu": tpu.attention,
    "tpu_interpret": functools.partial(tpu.attention, interpret=True),  # on the CPU, for tests
    "gpu": gpu.attention,
}
# Tried in this order by impl="auto"; the last one takes everything. On GPUs a library's, cuDNN.
AUTO = {"tpu": ("tpu", "xla"), "gpu": ("gpu", "xla"), "cpu": ("xla",)}
# Their compilers see one device. The others are cut by XLA, except along the row.
ONE_DEVICE = ("tpu", "tpu_interpret", "gpu")


def attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    mask: MaskSpec | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> Float[Array, "b t h v"]:
    """Grouped-query attention, softmax(mask(softcap(q kᵀ scale))) v; scale defaults to K^-1/2.

    impl="auto" falls through implementations that raise NotSupported; a named one never does.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads do not divide into {k.shape[2]}")
    options = dict(scale=q.shape[-1] ** -0.5 if scale is None else scale, softcap=softcap)
    cut = {name: functools.partial(_on_mesh, name) for name in IMPLEMENTATIONS}
    run, _ = dispatch.choose("attention", impl, cut, AUTO)
    return run(q, k, v, mask, **options)


def shares_rows(queries: int, keys: int) -> bool:
    """Whether several devices share a row: each then has its part of the queries and the keys."""
    return queries == keys and bool(shard.mesh_axes("length", queries))


def _on_mesh(name, q, k, v, mask, **options):
    """Rows, heads and tokens cut as the mesh says; one device's part each."""
    run = IMPLEMENTATIONS[name]
    shared = name != "ref" and shares_rows(q.shape[1], k.shape[1])
    if not shared and name not in ONE_DEVICE:
        return run(q, k, v, mask, **options)
    behind = not shared and context.is_behind(mask, k.shape[1] - q.shape[1])
    seq = shard.mesh_axes("length", q.shape[1]) if shared or behind else ()
    heads, kv_heads, pick = _heads(q.shape[2], k.shape[2])
    tokens, keys = ("batch", "length" if seq else None), ("batch", "length" if shared else None)
    along = context.behind if behind else context.along

    def part(q, k, v, mask):
        k, v = pick(k), pick(v)
        if seq:
            return along(seq, run, q, k, v, mask, **options)
        return run(q, k, v, mask, **options)

    own = (*tokens, heads, None)
    names = (own, *((*keys, kv_heads, None),) * 2, _names(mask, tokens, keys))
    like = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), v.dtype)
    return shard.call(part, (q, k, v, mask), names, like, own)


def _heads(heads, kv_heads):
    """(name of the heads' axis, of the key heads', function from a device's key heads to those its
    heads read)."""
    axes = shard.mesh_axes("act_heads", heads)
    if not axes or shard.mesh_axes("act_heads", kv_heads) == axes:
        return "act_heads", "act_heads", lambda x: x
    each, group = heads // shard.size(axes), heads // kv_heads
    if group % each:  # a device's heads would read parts of several groups
        return None, None, lambda x: x

    def pick(x):
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * each // group, 1, axis=2)

    return "act_heads", None, pick


def _names(mask, tokens, keys):
    """Logical axis names of a mask's arrays."""
    if mask is None:
        return None
    arrays = {f.name: getattr(mask, f.name) for f in dataclasses.fields(mask)}
    names = {
        n: (keys if n in context.OF_KEYS else tokens)[: x.ndim]
        for n, x in arrays.items()
        if hasattr(x, "ndim")
    }
    return dataclasses.replace(mask, **names)
