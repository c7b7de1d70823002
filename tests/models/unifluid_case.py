"""A small UniFluid with random weights and a random batch, shared by its tests."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.common import load_config
from models import MODELS


def tiny_config(**overrides):
    """The debug variant without data: 16 tokens, window 8 so that local layers bind."""
    config = load_config("configs/uniflud.py:debug")
    with config.unlocked():
        config.model.vocab_size = 64
        config.model.decoder.window = 8
        config.data.prompt_length = 8
        config.data.text_length = 12
        config.batch_size = 16
        for key, value in overrides.items():
            section, _, leaf = key.rpartition("__")
            node = config
            for part in section.split("__") if section else ():
                node = node[part]
            node[leaf] = value
    return config


@functools.cache
def params_of(seed: int = 0):
    """Random parameters with every zero-initialised leaf (norms, adaLN) made non-zero."""
    model = MODELS["unifluid"](tiny_config())
    return randomised(model, seed)


def randomised(model, seed: int = 0):
    """Parameters of `model` plus noise, so that no branch is hidden behind a zero."""
    init = jax.jit(lambda: nn.meta.unbox(model.init(jax.random.key(seed, impl="rbg"))[0]))
    rng = np.random.default_rng(seed)

    def shake(x):
        return jnp.asarray(np.asarray(x) + 0.05 * rng.normal(size=x.shape).astype(np.float32))

    params = jax.tree.map(shake, init())
    latents = params["vae"]["latents"]
    latents["mean"] = jnp.asarray(rng.normal(size=latents["mean"].shape), jnp.float32)
    latents["std"] = jnp.asarray(rng.uniform(0.5, 2.0, latents["std"].shape), jnp.float32)
    return params


def batch_of(model, config, seed: int = 1):
    """A batch of the model's only bucket with ragged lengths."""
    rng = np.random.default_rng(seed)
    batch = {}
    for key, spec in next(iter(model.batches.values())).items():
        if spec.dtype == jnp.uint8:
            batch[key] = rng.integers(0, 256, spec.shape, dtype=np.uint8)
        elif key.endswith("moments"):
            moments = rng.normal(size=spec.shape).astype(np.float32)
            moments[..., spec.shape[-1] // 2 :] -= 3.0  # small posterior variance
            batch[key] = moments
        else:
            batch[key] = rng.integers(4, config.model.vocab_size, spec.shape, dtype=np.int32)
    rows, width = batch["und_tokens"].shape
    batch["und_prefix"] = rng.integers(2, 5, rows).astype(np.int32)
    batch["und_length"] = batch["und_prefix"] + rng.integers(2, width - 5, rows).astype(np.int32)
    length = batch["gen_tokens"].shape[1]
    batch["gen_length"] = rng.integers(1, length + 1, len(batch["gen_length"])).astype(np.int32)
    batch["example"] = np.arange(config.batch_size, dtype=np.int32)
    return jax.tree.map(jnp.asarray, batch)
