"""pallas_call for TPU kernels that take their many blocks by name."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def named_call(
    kernel: Callable[[Mapping[str, Any]], None],
    name: str,
    grid: tuple[int, int, int],
    inputs: Mapping[str, tuple[jax.Array, pl.BlockSpec]],
    outputs: Mapping[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: Mapping[str, Any],
    *,
    flops: int,
    exponentials: int,
    vmem: int,
    interpret: bool,
) -> dict[str, jax.Array]:
    """The outputs by name of kernel({name of an input, output or scratch: its block}).

    grid: (rows, parts of a row, steps of a part), the steps in order. vmem: bytes it may take.
    """
    names = (*inputs, *outputs, *scratch)
    arrays, shapes = ([x for x, _ in each.values()] for each in (inputs, outputs))
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *shapes))

    def body(*refs):
        kernel(dict(zip(names, refs, strict=True)))

    found = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=shapes,
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=exponentials, bytes_accessed=moved
        ),
        interpret=interpret,
        name=name,
    )(*arrays)
    return dict(zip(outputs, found, strict=True))
