"""The rules table: what becomes which spec, and which mistakes are errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import LogicallyPartitioned as Box
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from training.sharding import MESH_AXES, RULES, batch_sharding, make_mesh, shardings_for, spec_for


def mesh(data=2, fsdp=4, tensor=2, seq=1):
    """A mesh without devices."""
    return AbstractMesh((data, fsdp, tensor, seq), MESH_AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize(
    "names, shape, spec",
    [
        (("embed", "mlp"), (8, 6), P("fsdp", "tensor")),
        (("layers", "embed", "heads", "head_dim"), (3, 8, 4, 5), P(None, "fsdp", "tensor", None)),
        (("embed", "mlp"), (6, 6), P(None, "tensor")),  # 4 does not divide 6: replicated
        (("batch", "length", "act_embed"), (16, 6, 8), P(("data", "fsdp"), None, None)),
        (("vocab", None), (10, 3), P("tensor", None)),
        ((), (), P()),
    ],
)
def test_specs(names, shape, spec):
    assert spec_for(names, shape, mesh(), "p") == spec


@pytest.mark.parametrize(
    "names, message",
    [
        (("embed", "mpl"), "a/b: unknown logical axis 'mpl'; known: embed, mlp"),
        (("embed", "embed"), "a/b: axes .* use mesh axis .*fsdp.* twice"),
        (("embed", "batch"), "a/b: axes .* twice"),
        (("embed",), "a/b: 1 axis names"),
    ],
)
def test_mistakes_name_the_parameter(names, message):
    with pytest.raises(ValueError, match=message):
        spec_for(names, (8, 8), mesh(), "a/b")


def test_the_vocabulary_is_complete():
    names = "embed mlp heads kv_heads head_dim vocab layers norm positions patch channels_in "
    names += "channels_out spatial width_in width_out classes time state batch length act_embed "
    names += "act_heads act_kv_heads act_mlp act_vocab"
    assert set(RULES) == set(names.split())


def test_trees_and_paths():
    tree = dict(a=dict(w=Box(jnp.zeros((1, 1)), ("embed", "mlp"))), b=jnp.zeros(3))
    one = make_mesh(dict(data=-1, fsdp=1, tensor=1, seq=1), jax.devices()[:1])
    found = shardings_for(tree, one)
    assert found["a"]["w"].spec == P(None, None) and found["b"].spec == P()
    with pytest.raises(ValueError, match="a/w: unknown logical axis"):
        shardings_for(dict(a=dict(w=Box(jnp.zeros(1), ("colour",)))), one)


@pytest.mark.parametrize(
    "sizes, devices, shape",
    [
        ((-1, 1, 1, 1), 8, (8, 1, 1, 1)),
        ((2, -1, 2, 1), 8, (2, 2, 2, 1)),
        ((1, 1, 1, 1), 1, (1, 1, 1, 1)),
    ],
)
def test_mesh_sizes(sizes, devices, shape, monkeypatch):
    monkeypatch.setattr(jax, "make_mesh", lambda shape, names, **kw: (tuple(shape), names, kw))
    found, names, more = make_mesh(dict(zip(MESH_AXES, sizes)), [object()] * devices)
    assert found == shape and names == MESH_AXES
    assert more["axis_types"] == (AxisType.Auto,) * 4


@pytest.mark.parametrize(
    "sizes", [(2, 1, 1, 1), (-1, -1, 1, 1), (0, 1, 1, 1), (3, -1, 1, 1), (16, 1, 1, 1)]
)
def test_meshes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="config.mesh="):
        make_mesh(dict(zip(MESH_AXES, sizes)), [object()] * 8)


def test_slices_split_the_data_axis(monkeypatch):
    """Several slices: only `data` crosses between them."""
    from jax.experimental import mesh_utils

    class Device:
        def __init__(self, i):
            self.slice_index = i // 4

    devices = [Device(i) for i in range(8)]
    seen = []

    def hybrid(inner, outer, devices):
        seen.append((inner, outer))
        raise StopIteration

    monkeypatch.setattr(mesh_utils, "create_hybrid_device_mesh", hybrid)
    with pytest.raises(StopIteration):
        make_mesh(dict(data=2, fsdp=4, tensor=1, seq=1), devices)
    assert seen == [((1, 4, 1, 1), (2, 1, 1, 1))]


def test_batches(monkeypatch):
    one = make_mesh(dict(data=1, fsdp=1, tensor=1, seq=1), jax.devices()[:1])
    assert batch_sharding((6, 2), one, "x").spec == P(("data", "fsdp"))
    wide = mesh(data=2, fsdp=4)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="'x' has leading size 6, which config.mesh data x fsdp"):
        batch_sharding((6, 2), wide, "x")
    np.testing.assert_equal(one.size, 1)
