"""The transformer whose outputs tests/golden/infinity.npz holds, and a small one of our own."""

import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.common import load_config
from export.weights import WeightMap, from_published, to_published
from models import MODELS, infinity, infinity_build, infinity_text, infinity_weights
from models.tokenizers import discrete
from models.tokenizers.quantisers import schedules
from tests.golden import recipes

LENGTHS = np.array([5, 3], np.int32)  # of the golden texts
TALL = schedules.infinity(1.5, "0.06M")


def shapes(cfg):
    """Abstract parameters of a transformer."""
    return jax.eval_shape(lambda: nn.meta.unbox(infinity.init(jax.random.key(0), cfg)))


def published_shapes(cfg) -> dict:
    """Of every tensor, by published name."""
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes(cfg))
    return {k: v.shape for k, v in to_published(zeros, infinity_weights.weight_map(cfg)).items()}


@functools.cache
def golden(patchify: bool = False):
    """(system, params, model) of the golden file: bits of 6, or 2 x 2 of them; the encoder gives
    the golden texts whatever the tokens, the decoder three of the latents."""
    depth, seed = (2, 64) if patchify else (4, 60)
    cfg = infinity.TransformerConfig(
        48, depth, 4, bits=24 if patchify else 6, text_width=256, text_length=16, chunks=2
    )
    tensors = recipes.weights(published_shapes(cfg), seed)
    own = from_published(tensors, infinity_weights.weight_map(cfg), shapes(cfg))
    text = infinity_text.TextEncoder(None, lambda params, *_: params, 256, WeightMap({}))
    schedule = "dynamic_2x2" if patchify else "dynamic"
    system = infinity_build.System(
        infinity_build.InfinityConfig(
            transformer=cfg,
            tokenizer=discrete.TokenizerConfig(z=6, schedule=schedule),
            patchify=patchify,
            correction="self",
            strength=0.3,
            noise_scales=13,
            reweight=True,
            text_drop=0.0,
        ),
        infinity.Infinity(cfg),
        text,
    )
    vectors, texts = recipes.normal(61, 8, 256), np.zeros((2, 5, 256), np.float32)
    texts[0], texts[1, :3] = vectors[:5], vectors[5:]
    texts[1, 3:] = 7.0  # padding that must not be seen
    predict = infinity_build.predictions(system, lambda ratio: (21, 14), jnp.float32)
    predict["decode_latents"] = lambda params, z: z[..., :3]
    if patchify:  # the first five scales
        part = schedules.infinity(1.0, "0.06M")[:5]
        layout = infinity_build.Layout(schedules.doubled(part), part)
        predict["layout"] = lambda ratio: layout
    params = {"transformer": own, "text": jnp.asarray(texts)}
    return system, params, SimpleNamespace(predict=predict)


def tiny_config(**overrides):
    """The debug variant without data, 16 px in 21 tokens of 8 bits on three scales."""
    config = load_config("configs/infinity.py:debug", init_from="")
    with config.unlocked():
        config.model.vocab_size, config.batch_size = 32, 8
        config.data.update(image_size=16, prompt_length=6)
        config.model.transformer.update(width=32, drop_path=0.2)
        config.model.text.update(width=32, mlp=64, heads=2, kv_heads=2, head_dim=16)
        tokenizer = dict(size="small_32", ch=16, z=8, groups=4, resolution=16, scales=3)
        config.model.tokenizer = tokenizer
        for key, value in overrides.items():
            section, _, leaf = key.rpartition("__")
            node = config
            for part in section.split("__") if section else ():
                node = node[part]
            node[leaf] = value
    return config


@functools.cache
def tiny(head: str = "bits"):
    """(model, params) of the tiny config, with noise so that no branch is hidden behind a zero."""
    model = MODELS["infinity"](tiny_config(model__transformer__head=head))
    params = jax.jit(lambda: nn.meta.unbox(model.init(jax.random.key(0))[0]))()
    rng = np.random.default_rng(0)

    def shake(x):
        return np.asarray(x) + 0.1 * rng.normal(size=x.shape).astype(np.float32)

    return model, params | {"transformer": jax.tree.map(shake, params["transformer"])}


def batch_of(model, seed: int = 1):
    """A batch of the model's first bucket with ragged captions."""
    spec, rng = next(iter(model.batches.values())), np.random.default_rng(seed)
    rows, length = spec["gen_tokens"].shape
    return {
        "gen_tokens": rng.integers(4, 32, (rows, length)).astype(np.int32),
        "gen_length": rng.integers(1, length + 1, rows).astype(np.int32),
        "gen_image": rng.integers(0, 256, spec["gen_image"].shape).astype(np.uint8),
        "example": np.arange(rows, dtype=np.int32),
    }
