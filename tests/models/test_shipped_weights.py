"""The weights that come with the repository: what the default run and its evaluators rest on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from ml_collections import ConfigDict

from configs.data import data_config
from configs.evals import eval_config
from eval import common, data, metrics, retrieval
from export.load import load_pretrained
from input_pipeline import openmoji
from models.tokenizers import discrete, discrete_weights, kl_vae, kl_vae_weights


def rebuilder(path: str, abstract, weight_map, rebuild):
    """uint8 pictures through shipped weights and back, by `rebuild(params, images)`."""
    path = data.ROOT / "models/tokenizers/weights" / path
    assert path.stat().st_size < 2_000_000
    run = functools.partial(jax.jit(rebuild), load_pretrained(path, weight_map, abstract))
    return lambda images: common.to_uint8(np.asarray(run(common.to_float(images))))


def kl(size):
    """The KL autoencoder, by the mean of its posterior."""
    cfg = kl_vae.SIZES[f"small_{size}"]
    abstract = jax.eval_shape(lambda: meta.unbox(kl_vae.init(jax.random.key(0), cfg)))

    def rebuild(params, images):
        return kl_vae.decode(params, cfg, kl_vae.posterior_mean(kl_vae.encode(params, cfg, images)))

    names = kl_vae_weights.weight_map(cfg)
    return rebuilder(f"kl_vae_{size}.safetensors", abstract, names, rebuild)


def codes(kind, size):
    """A tokenizer of bits or of rows of a codebook."""
    cfg = discrete.SIZES[{"bsq_vae": f"small_{size}", "vqgan": f"small_vq_{size}"}[kind]]

    def rebuild(params, images):
        return discrete.decode(params, cfg, discrete.encode(params, cfg, images))

    names = discrete_weights.weight_map(cfg)
    return rebuilder(f"{kind}_{size}.safetensors", discrete.abstract(cfg), names, rebuild)


@pytest.mark.parametrize(
    "kind, size, least",
    [("kl_vae", 32, 20.0), ("kl_vae", 64, 24.0), ("bsq_vae", 32, 22.0), ("vqgan", 32, 22.0)],
)
def test_tokenizer_and_classifier(kind, size, least):
    """Held-out food glyphs survive the tokenizer, and the classifier knows rebuilt pictures again:
    the ceiling of what retrieval can report for drawn ones."""
    settings = ConfigDict(
        dict(
            data=data_config(source="openmoji", categories=("food",), image_size=size),
            evaluation=eval_config(),
        )
    )
    rebuild = kl(size) if kind == "kl_vae" else codes(kind, size)
    held_out = openmoji.load(settings.data, "test", size)
    real = held_out.pictures.gather(np.arange(len(held_out)))
    assert metrics.psnr(rebuild(real), real).mean() > least
    train = openmoji.load(settings.data, "train", size)
    rows = data.one_per_group(train, 64, seed=0)
    real, group = train.pictures.gather(rows), np.array([data.group_of(train, r) for r in rows])
    features = data.classifier_features(settings)
    found, own = (np.asarray(features(common.to_float(x))) for x in (rebuild(real), real))
    sets = retrieval.candidate_sets(group, group, len(rows) - 1, seed=0)
    rank = retrieval.ranks(found, own, own, sets)
    assert (rank == 0).mean() > 0.9 and jnp.isfinite(found).all()
