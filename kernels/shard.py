"""Kernels on a mesh: the same call, inside shard_map, by the logical names of its axes.

A kernel's compiler sees one device; what is cut how comes from the mesh and the flax axis rules
that training sets (`training/sharding.py:scope`). Without a mesh, or where it cuts none of the
named axes, the function is called as it is.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

Names = tuple[str | None, ...]


def mesh_axes(name: str | None, size: int) -> tuple[str, ...]:
    """Mesh axes of more than one device that cut an axis of this logical name and size.

    A size that they do not divide stays whole, as in training/sharding.py.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if name is None or mesh.empty:
        return ()
    axes = dict(nn.get_logical_axis_rules()).get(name) or ()
    axes = (axes,) if isinstance(axes, str) else axes
    axes = tuple(a for a in axes if mesh.shape[a] > 1 and a not in mesh.manual_axes)
    return axes if size % math.prod(mesh.shape[a] for a in axes) == 0 else ()


def spec(names: Names, shape: Sequence[int]) -> PartitionSpec:
    """PartitionSpec of an array by the logical names of its axes."""
    return PartitionSpec(*(mesh_axes(n, s) or None for n, s in zip(names, shape, strict=True)))


def call(function: Callable, inputs: Any, names: Any, outputs: Any) -> Any:
    """function(*inputs) on each device's part.

    names: logical names of every array in `inputs`, as a tree of tuples; outputs: PartitionSpecs
    of the result. Arrays that no mesh axis cuts are whole on every device.
    """
    specs = jax.tree.map(
        lambda x, axes: spec(axes, x.shape), inputs, names, is_leaf=lambda x: x is None
    )
    cut = [s for s in jax.tree.leaves(specs, is_leaf=_is_spec) if any(s)]
    if not cut:
        return function(*inputs)
    return jax.shard_map(
        function, in_specs=tuple(specs), out_specs=outputs, check_vma=False
    )(*inputs)  # fmt: skip


def _is_spec(x) -> bool:
    return isinstance(x, PartitionSpec)
