"""Decoder loss, gradients, decoding, tower and text encoder on meshes against one device.

python blocks_on_mesh.py data,fsdp,tensor,seq ...     prints "mesh what largest-relative-difference"
"""

import dataclasses
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from kernels.attention import MaskSpec  # noqa: E402
from models import t5  # noqa: E402
from models.blocks.decoder import SIZES, Decoder, init_cache  # noqa: E402
from models.blocks.losses import chunked_cross_entropy  # noqa: E402
from models.blocks.vit import SIZES as VITS  # noqa: E402
from models.blocks.vit import ViT  # noqa: E402
from training.sharding import MESH_AXES, make_mesh, scope, shardings_for  # noqa: E402

# One kv head does not divide over two devices; a vocabulary of 510 needs padded slices.
CFG = dataclasses.replace(SIZES["debug"], vocab_size=510, layers=3, window=6)
T5 = dataclasses.replace(t5.SIZES["debug"], heads=4)
BATCH, LENGTH = 8, 16


def init(key):
    """Boxed parameters of decoder, tower and text encoder."""
    tokens, images = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 32, 32, 3))
    tower = dataclasses.replace(VITS["debug"], map_head=True)
    return {
        "decoder": Decoder(CFG).init(key, tokens, method="text")["params"],
        "vit": ViT(tower).init(key, images, method="pooled")["params"],
        "t5": t5.init(key, T5),
    }


def everything(params, tokens, images):
    """Loss and gradients, hidden states of two cached steps, pooled images, embedded text."""
    decoder = Decoder(CFG, remat="dots")
    variables = {"params": params["decoder"]}
    lengths = jnp.arange(BATCH) % 5 + 6
    mask = MaskSpec(prefix_length=lengths)

    def embed(ids):
        return decoder.apply(variables, ids, method="embed")

    def loss(p):
        x = decoder.apply({"params": p}, tokens, method="embed")
        hidden = decoder.apply({"params": p}, x, mask)[0].reshape(-1, CFG.width)
        weights = jnp.ones(hidden.shape[:1])
        nll, _ = chunked_cross_entropy(
            hidden, p["embedding"], tokens.reshape(-1), weights, softcap=30.0, chunk=64
        )
        return nll / weights.size

    value, grads = jax.value_and_grad(loss)(params["decoder"])
    hidden, cache = decoder.apply(
        variables, embed(tokens[:, :12]), mask, None, init_cache(CFG, BATCH, LENGTH), lengths
    )
    for i in range(2):
        ids = jnp.take_along_axis(tokens, lengths[:, None] + i, axis=1)
        hidden, cache = decoder.apply(variables, embed(ids), None, lengths[:, None] + i, cache)
    tower = ViT(dataclasses.replace(VITS["debug"], map_head=True))
    pooled = tower.apply({"params": params["vit"]}, images, method="pooled")[1]
    text = t5.encode(params["t5"], T5, tokens, lengths)
    return {"loss": value, "gradient": grads, "decode": hidden, "pooled": pooled, "text": text}


def main(meshes):
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, CFG.vocab_size)
    images = jax.random.uniform(jax.random.key(2), (BATCH, 32, 32, 3))
    boxed = jax.jit(init)(jax.random.key(0))
    params = jax.tree.map(np.asarray, nn.unbox(boxed))
    want = jax.device_get(jax.jit(everything)(params, tokens, images))
    for text in meshes:
        mesh = make_mesh(dict(zip(MESH_AXES, map(int, text.split(",")))))
        with scope(mesh):
            shardings = shardings_for(jax.eval_shape(init, jax.random.key(0)), mesh)
            placed = jax.device_put(params, shardings)
            got = jax.device_get(jax.jit(everything)(placed, tokens, images))
        for name, tree in want.items():
            pairs = zip(jax.tree.leaves(got[name]), jax.tree.leaves(tree))
            scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))
            print(text, name, max(np.abs(a - b).max() for a, b in pairs) / scale, flush=True)
        q = placed["decoder"]["layers"]["0_local"]["attn"]["q"]["kernel"]
        print(text, "shards", q.size // q.addressable_shards[0].data.size, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
