"""Twenty steps of training and drawn pictures on eight devices against one.

python infinity_on_mesh.py            prints "what largest-relative-difference"
"""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from inference import infinity as sampler  # noqa: E402
from tests.models import infinity_case as case  # noqa: E402
from training.sharding import MESH_AXES, global_batch, make_mesh, scope, shardings_for  # noqa: E402

MESH, STEPS = (2, 2, 2, 1), 20


def trained(model, params, batch):
    """Losses of the steps and the last parameters; the tokenizer is frozen."""
    own = {k: v for k, v in params.items() if k != "vae"}
    tx = optax.adamw(1e-3)

    @jax.jit
    def train(own, vae, batch):
        def step(carry, i):
            own, opt = carry

            def loss(own):
                rng = jax.random.fold_in(jax.random.key(5), i)
                norms = model.norms(batch)
                return model.loss(own | {"vae": vae}, {}, batch, rng, step=i, norms=norms)[0]

            value, grads = jax.value_and_grad(loss)(own)
            updates, opt = tx.update(grads, opt, own)
            return (optax.apply_updates(own, updates), opt), value

        return jax.lax.scan(step, (own, tx.init(own)), jnp.arange(STEPS))[1]

    return jax.device_get(train(own, params["vae"], batch))


def drawn(model, params, batch):
    """Pictures with guidance on the log odds, of fewer rows than there are devices."""
    batch = {k: v[:6] for k, v in batch.items()}
    options = dict(guidance=(1.0, 2.0, 3.0), top_p=0.97)
    return jax.device_get(
        sampler.generate_images(
            model, params, batch["gen_tokens"], batch["gen_length"], jax.random.key(7), **options
        ).images
    )


def main():
    model, params = case.tiny()
    batch = case.batch_of(model)
    losses, images = trained(model, params, batch), drawn(model, params, batch)
    mesh = make_mesh(dict(zip(MESH_AXES, MESH)))
    boxed = jax.eval_shape(model.init, jax.random.key(0))[0]
    with scope(mesh):
        placed = jax.device_put(params, shardings_for(boxed, mesh))
        cut = global_batch(batch, mesh)
        sampler._compiled.cache_clear()  # traced again, under the mesh
        got = trained(model, placed, cut), drawn(model, placed, cut)
    print("losses", f"{np.abs((got[0] - losses) / losses).max():.2e}")
    print("images", f"{np.abs(got[1].astype(int) - images).max():.2e}")
    assert losses[-1] < losses[0] and images.std() > 1


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
