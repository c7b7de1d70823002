"""Loss, gradients, state and codes of two tiny tokenizers on eight devices against one.

python tokenizers_on_mesh.py            prints "what largest-relative-difference"
"""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax.linen import meta  # noqa: E402

from models import MODELS  # noqa: E402
from models.tokenizers.autoencoder import to_float  # noqa: E402
from tests.models.test_image_tokenizers import tiny_config  # noqa: E402
from training.sharding import MESH_AXES, global_batch, make_mesh, scope  # noqa: E402


def main():
    models = {}
    for name in ("bsq", "vq"):
        config = tiny_config(name)  # of vq nearly all codes are revived
        config.model.recipe.update({"bsq": dict(drop_scales=0.5), "vq": dict(revive=2.0)}[name])
        models[name] = MODELS["bsq_vae"](config)

    def init(key):
        return meta.unbox({name: model.init(key) for name, model in models.items()})

    state = jax.jit(init)(jax.random.key(0))
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8),
        "example": np.arange(8, dtype=np.int32),
    }

    def everything(state, batch):
        def loss(params):
            total, extras = 0.0, {}
            for name, model in models.items():
                value, (_, extras[name]) = model.loss(
                    params[name],
                    state[name][1],
                    batch,
                    jax.random.key(3),
                    step=0,
                    norms=model.norms(batch),
                )
                total += value
            return total, extras

        params = {name: parts[0] for name, parts in state.items()}
        (value, extra), grads = jax.value_and_grad(loss, has_aux=True)(params)
        images = to_float(batch["image"])
        codes = {n: m.predict["encode"](params[n], images) for n, m in models.items()}
        codes = jax.tree.map(lambda x: x.astype(jnp.float32), codes)
        return {"loss": value, "gradient": grads, "extra": extra, "codes": codes}

    want = jax.device_get(jax.jit(everything)(jax.device_get(state), batch))
    mesh = make_mesh(dict(zip(MESH_AXES, (4, 2, 1, 1))))
    with scope(mesh):
        got = jax.device_get(jax.jit(everything)(jax.device_get(state), global_batch(batch, mesh)))
    for what in want:
        pairs = zip(jax.tree.leaves(got[what]), jax.tree.leaves(want[what]))
        worst = max(np.abs(a - b).max() / max(np.abs(b).max(), 1.0) for a, b in pairs)
        print(what, f"{worst:.2e}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
