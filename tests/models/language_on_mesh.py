"""Loss and gradients of the language models on the meshes in argv against one device.

python language_on_mesh.py model,model data,fsdp,tensor,seq ...
prints "model mesh what largest-difference", relative to the largest number of each leaf
"""

import dataclasses
import functools
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

from models import hymba, language, llama, mamba  # noqa: E402
from training.sharding import MESH_AXES, make_mesh, scope, shardings_for  # noqa: E402

SMALL = dict(vocab_size=96, layers=2)
NETS = {
    # Five heads do not divide over two devices: they stay whole, the Mamba branch is cut.
    "hymba": hymba.Hymba(
        dataclasses.replace(
            hymba.SIZES["debug"], **SMALL, width=80, heads=5, meta=4, window=5,
            global_layers=(0,), groups=(),
        )
    ),
    "mamba": mamba.Mamba(dataclasses.replace(mamba.SIZES["debug"], **SMALL)),
    "mamba2": mamba.Mamba(dataclasses.replace(mamba.SIZES["debug2"], **SMALL)),
    "llama": llama.Llama(dataclasses.replace(llama.SIZES["debug"], **SMALL)),
}  # fmt: skip
ROWS, LENGTH = 8, 16


def main(names, meshes):
    rng = np.random.default_rng(0)
    lengths = [5, 1, 10]
    batch = dict(
        tokens=rng.integers(0, 96, (ROWS, LENGTH)).astype(np.int32),
        segment_ids=np.tile(np.repeat([1, 2, 3], lengths), (ROWS, 1)).astype(np.int32),
        positions=np.tile(np.concatenate([np.arange(n) for n in lengths]), (ROWS, 1)),
    )
    for name in names:
        net = NETS[name]
        boxed = jax.jit(functools.partial(language.init, net))(jax.random.key(0))
        params = jax.tree.map(np.asarray, nn.unbox(boxed))

        def run(params, batch):
            def total(p):
                norms = language.norms(batch)
                return language.loss(net, p, {}, batch, None, step=0, norms=norms)[0]  # noqa: B023

            return dict(zip(("loss", "gradient"), jax.value_and_grad(total)(params)))

        want = jax.device_get(jax.jit(run)(params, batch))
        for text in meshes:
            mesh = make_mesh(dict(zip(MESH_AXES, map(int, text.split(",")))))
            with scope(mesh):
                init = functools.partial(language.init, net)
                shardings = shardings_for(jax.eval_shape(init, jax.random.key(0)), mesh)
                got = jax.device_get(jax.jit(run)(jax.device_put(params, shardings), batch))
            for what, tree in want.items():
                pairs = zip(jax.tree.leaves(got[what]), jax.tree.leaves(tree))
                differences = [np.abs(a - b).max() / np.abs(b).max() for a, b in pairs]
                print(name, text, what, np.max(differences), flush=True)


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2:])
