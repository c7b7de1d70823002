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


def mesh_axes(name: str | None, size: int = 0) -> tuple[str, ...]:
    """Mesh axes of more than one device that cut an axis of this logical name and size.

    A size that they do not divide stays whole, as in training/sharding.py; 0 asks for any size.
    """
    rules, mesh = dict(nn.get_logical_axis_rules()), jax.sharding.get_abstract_mesh()
    if name is None or not rules or mesh.empty:
        return ()
    if name not in rules:
        raise ValueError(f"unknown logical axis name {name!r}; known: {', '.join(rules)}")
    axes = rules[name] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    axes = tuple(a for a in axes if mesh.shape[a] > 1 and a not in mesh.manual_axes)
    return axes if size % math.prod(mesh.shape[a] for a in axes) == 0 else ()


def size(axes: Sequence[str]) -> int:
    """Devices along these mesh axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[a] for a in axes)


def spec(names: Names, shape: Sequence[int]) -> PartitionSpec:
    """PartitionSpec of an array by the logical names of its axes."""
    return PartitionSpec(*(mesh_axes(n, s) or None for n, s in zip(names, shape, strict=True)))


def call(function: Callable, inputs: Any, names: Any, like: Any, out_names: Any) -> Any:
    """function(*inputs) on each device's part.

    names: logical names of every array in `inputs`, as a tree of tuples; out_names: the same for
    the result, whose arrays have the shapes of `like`. What no mesh axis cuts is whole everywhere.
    """

    def specs(arrays, names):
        return jax.tree.map(lambda x, axes: spec(axes, x.shape), arrays, names)

    cut, mesh = specs(inputs, names), jax.sharding.get_abstract_mesh()
    parts = jax.tree.leaves(cut, is_leaf=lambda x: isinstance(x, PartitionSpec))
    # What nothing cuts is called as it is, but not on many devices: XLA cannot place a Pallas call.
    alone = mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual
    if alone and not any(map(any, parts)):
        return function(*inputs)
    out = specs(like, out_names)
    return jax.shard_map(function, in_specs=cut, out_specs=out, check_vma=False)(*inputs)
