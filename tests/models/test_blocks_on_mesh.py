"""The blocks on eight virtual devices equal one device (a process of its own: eight devices)."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from models.blocks.common import constrain
from training.sharding import make_mesh, scope

MESHES = {"2,1,2,2": 2, "1,4,2,1": 8}


@pytest.mark.long
def test_8_devices_equal_one_device():
    """All four mesh axes; parameters are split as the rules say, one kv head stays whole."""
    script = Path(__file__).parent / "blocks_on_mesh.py"
    run = subprocess.run(
        [sys.executable, str(script), *MESHES],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 6 * len(MESHES)
    for mesh, what, value in lines:
        if what == "shards":
            assert int(value) == MESHES[mesh]
        else:
            assert float(value) < 1e-5, (mesh, what, value)


def test_constrain_names_unknown_axes():
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(constrain(x, "batch", "colour"), x)  # no mesh, no rules
    mesh = make_mesh(dict(data=-1, fsdp=1, tensor=1, seq=1))
    with scope(mesh), pytest.raises(ValueError, match="colour"):
        constrain(x, "batch", "colour")
