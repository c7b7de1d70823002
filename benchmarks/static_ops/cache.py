"""write_slots' part of tpu_static: one token of 128 rows into one of two layers of a donated cache,
with the slots in the lanes (Hymba 1.5B's keys) and without (Llama 3.2 3B's)."""

import functools

from benchmarks import static

ROWS, LAYERS = 128, 2
HEADS = dict(hymba=(5, 64), llama=(8, 128))


def arrays(device, slots: int, heads: int, width: int):
    """(cache, token, slots) on an unattached device, bfloat16."""
    import jax
    import jax.numpy as jnp

    place = jax.sharding.SingleDeviceSharding(device)

    def array(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    token = array(ROWS, 1, heads, width)
    return array(LAYERS, ROWS, heads, slots, width), token, array(ROWS, 1, dtype=jnp.int32)


def tpu(model: str, topology, device, args) -> static.TpuOp:
    """The kernel, and XLA's scatter where it works in place. Loops of a grid step: over its rows,
    three times."""
    from kernels.attention import tpu_cache, write_slots

    inputs = arrays(device, args.tokens, *HEADS[model])
    block = tpu_cache.plan(inputs[0].shape, inputs[0].dtype).block

    def program(impl):
        def run(cache, token, slots):
            return write_slots(cache, 1, token, slots, impl=impl)

        return static.Program(run, inputs, donate=(0,))

    return static.TpuOp(
        columns=dict(block=block),
        kernels=dict(write=static.TpuKernel("write_slots", -(-ROWS // block), (block,) * 3)),
        programs=dict(write=program("tpu")),
        uses=dict(write=("write",)),
        # Alone, the scatter turns Llama's whole cache into another layout and back; in a model it
        # does not.
        xla=dict(write={0: program("xla")}) if model == "hymba" else {},
    )


TPU = {f"write_slots_{model}": functools.partial(tpu, model) for model in HEADS}
