"""The mesh and the one table from logical axis names to mesh axes.

Models name axes ("embed", "heads", ...); only this file knows which mesh axis each becomes. An
unknown name, or one mesh axis used twice by an array, is an error with the parameter's path.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from training.tree import is_box, path_name

MESH_AXES = ("data", "fsdp", "tensor", "seq")

# logical name -> mesh axes; parameters first, then activations.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "width_out": "tensor",
    "head_dim": None,
    "layers": None,
    "norm": None,
    "positions": None,
    "patch": None,
    "channels_in": None,
    "channels_out": None,
    "spatial": None,
    "width_in": None,
    "classes": None,
    "time": None,
    "state": None,
    "batch": ("data", "fsdp"),
    "length": "seq",
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over MESH_AXES; one size may be -1 (the devices that are left)."""
    devices = list(jax.devices() if devices is None else devices)
    shape = [int(sizes[axis]) for axis in MESH_AXES]
    fixed = int(np.prod([s for s in shape if s != -1]))
    if shape.count(-1) > 1 or any(s < 1 and s != -1 for s in shape):
        raise ValueError(f"config.mesh={dict(sizes)}: sizes must be >= 1, at most one may be -1")
    if len(devices) % fixed or (-1 not in shape and fixed != len(devices)):
        raise ValueError(
            f"config.mesh={dict(sizes)} does not fit {len(devices)} devices: the product must be "
            f"{len(devices)} (one size may be -1)"
        )
    shape = [len(devices) // fixed if s == -1 else s for s in shape]
    auto = (AxisType.Auto,) * len(MESH_AXES)
    slices = {getattr(d, "slice_index", 0) for d in devices}
    if len(slices) > 1 and shape[0] % len(slices) == 0:
        from jax.experimental import mesh_utils

        # Only the data axis crosses the slow network between slices.
        inner = (shape[0] // len(slices), *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inner, (len(slices), 1, 1, 1), devices)
        return Mesh(grid, MESH_AXES, axis_types=auto)
    return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=devices)


def rules() -> tuple[tuple[str, Any], ...]:
    """RULES in the form flax.linen.logical_axis_rules takes."""
    return tuple(RULES.items())


@contextmanager
def scope(mesh: Mesh):
    """Context under which models are traced: the mesh and the axis rules."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules()):
        yield


def spec_for(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, path: str):
    """PartitionSpec of one array; a dimension its mesh axes do not divide is replicated."""
    if len(names) != len(shape):
        raise ValueError(f"{path}: {len(names)} axis names {tuple(names)} for shape {tuple(shape)}")
    entries, used = [], set()
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"{path}: unknown logical axis {name!r}; known: {', '.join(RULES)}")
        axes = RULES.get(name) or ()
        axes = tuple(a for a in ((axes,) if isinstance(axes, str) else axes) if mesh.shape[a] > 1)
        if not axes or size % int(np.prod([mesh.shape[a] for a in axes])):
            entries.append(None)
            continue
        if used & set(axes):
            raise ValueError(f"{path}: axes {tuple(names)} use mesh axis {axes} twice")
        used |= set(axes)
        entries.append(axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*entries)


def shardings_for(boxed: Any, mesh: Mesh) -> Any:
    """NamedSharding of every leaf of an abstract tree whose leaves may be boxed with names."""

    def one(path, leaf):
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        names = leaf.names
        return NamedSharding(mesh, spec_for(names, leaf.value.shape, mesh, path_name(path)))

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_box)


def batch_sharding(shape: Sequence[int], mesh: Mesh, key: str) -> NamedSharding:
    """Leading axis over data and fsdp; the batch must divide when there are several hosts."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if shape and shape[0] % ways == 0:
        return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    if jax.process_count() > 1 or not shape:
        raise ValueError(
            f"batch key {key!r} has leading size {shape[0] if shape else 'none'}, which "
            f"config.mesh data x fsdp = {ways} does not divide"
        )
    return NamedSharding(mesh, PartitionSpec())


def global_batch(local: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's part of a batch -> arrays of the whole batch, sharded over the mesh."""
    hosts = jax.process_count()

    def put(key, x):
        x = np.asarray(x)
        shape = (x.shape[0] * hosts, *x.shape[1:]) if x.ndim else ()
        sharding = batch_sharding(shape, mesh, key)
        return jax.make_array_from_process_local_data(sharding, x, shape)

    # The one place where host data goes to the devices, so the transfer guard is lifted here.
    with jax.transfer_guard_host_to_device("allow"):
        return {key: put(key, value) for key, value in local.items()}


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array every process holds -> a global array; each host sends only its shards."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
