"""write_slots(): one token per row into a stacked key or value cache, several implementations."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import dispatch, shard
from kernels.attention import tpu_cache


def _scatter(cache, layer, new, slots):
    where = jnp.stack([jnp.full_like(slots, layer), slots], axis=-1)
    # The row axis is declared a batch axis: sharded rows stay apart, nothing is transposed.
    return jax.lax.scatter(
        cache,
        where,
        new,
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=(2, 3),
            inserted_window_dims=(0, 3),
            scatter_dims_to_operand_dims=(0, 3),
            operand_batching_dims=(1,),
            scatter_indices_batching_dims=(0,),
        ),
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )


IMPLEMENTATIONS = {
    "xla": _scatter,
    "tpu": tpu_cache.write_slots,
    "tpu_interpret": functools.partial(tpu_cache.write_slots, interpret=True),  # on CPUs, for tests
}
# Tried in this order by impl="auto"; the last one takes everything.
AUTO = {"tpu": ("tpu", "xla"), "cpu": ("xla",)}


def write_slots(
    cache: Float[Array, "n b g s k"],
    layer: int | Int[Array, ""],
    new: Float[Array, "b t g k"],
    slots: Int[Array, "b t"],
    *,
    impl: str = "auto",
) -> Float[Array, "n b g s k"]:
    """The cache of n layers with `new` in the slots of one of them, each row at its own.

    In place where the cache is donated or a loop's carry. A slot outside 0..S-1 drops its token; a
    row's slots differ. For decoding: the kernel has no gradient.
    """
    cut = {name: functools.partial(_on_mesh, name) for name in IMPLEMENTATIONS}
    run, _ = dispatch.choose("write_slots", impl, cut, AUTO)
    return run(cache, jnp.asarray(layer, jnp.int32), new.astype(cache.dtype), slots)


def _on_mesh(name, cache, layer, new, slots):
    """Rows and heads cut as the mesh says; XLA cuts its own form."""
    run = IMPLEMENTATIONS[name]
    if name == "xla":
        return run(cache, layer, new, slots)
    own, tokens = (None, "batch", "act_kv_heads", None, None), ("batch", None)
    names = (own, (), (*tokens, "act_kv_heads", None), tokens)
    return shard.call(run, (cache, layer, new, slots), names, cache, own)
