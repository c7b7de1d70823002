"""Moments of the autoencoder: equal to encoding directly, made once, keyed by the weights."""

import dataclasses

import jax
import ml_collections
import numpy as np
import pytest

from export import weights
from input_pipeline import DATASETS, latents, scenes
from models.tokenizers import kl_vae, kl_vae_weights

SIZE = dict(size="small_32", ch=8, groups=4)


CFG = dataclasses.replace(kl_vae.SIZES["small_32"], ch=8, groups=4)


def save_vae(path, seed):
    boxed = jax.jit(lambda key: kl_vae.init(key, CFG))(jax.random.key(seed))
    params = {k: np.asarray(v) for k, v in weights.flatten(boxed).items()}
    params = weights.unflatten(params)
    published = weights.to_published(params, kl_vae_weights.weight_map(CFG))
    weights.save_safetensors(path, published)
    return params


def build(config, index=0, count=1):
    return DATASETS["image_text"](
        config, split="train", seed=0, process_index=index, process_count=count
    )


@pytest.fixture
def config(make_config, tmp_path):
    config = make_config(8, source="scenes", latents=str(tmp_path / "vae.safetensors"))
    config.model = ml_collections.ConfigDict(dict(vae=SIZE))
    return config


def test_moments_of_the_right_pictures(config, take, tmp_path):
    params = save_vae(tmp_path / "vae.safetensors", 0)
    pipeline = build(config)
    found = scenes.load(config.data, "train", 32)
    rows = {e.captions["en"]: i for i, e in enumerate(found.items)}
    images = found.pictures.gather(np.arange(len(found))) / 127.5 - 1.0
    want = np.asarray(jax.jit(lambda p, x: kl_vae.encode(p, CFG, x))(params, images))
    for batch in take(pipeline, 2):
        assert batch["gen_moments"].shape == (4, 4, 4, 32) and "gen_image" not in batch
        texts = [pipeline.tokenizer.decode(t) for t in batch["gen_tokens"]]
        chosen = want[[rows[t] for t in texts]]
        np.testing.assert_allclose(batch["gen_moments"], chosen, atol=1e-5 * np.abs(want).max())


def test_moments_are_made_once_per_weights(config, tmp_path, monkeypatch, fresh_cache):
    save_vae(tmp_path / "vae.safetensors", 0)
    build(config)
    monkeypatch.setattr(latents, "encode_all", lambda *a: pytest.fail("encoded again"))
    build(config)
    monkeypatch.undo()
    monkeypatch.setenv("UNIFLUD_CACHE", str(fresh_cache))
    save_vae(tmp_path / "vae.safetensors", 1)
    build(config)
    assert len(list((fresh_cache / "moments").glob("*.npy"))) == 2


def test_edits_have_moments_of_both_pictures(config, take, tmp_path):
    save_vae(tmp_path / "vae.safetensors", 0)
    config.data.edit = True
    (batch,) = take(build(config), 1)
    assert batch["gen_source_moments"].shape == batch["gen_moments"].shape
    assert (batch["gen_source_moments"] != batch["gen_moments"]).any((1, 2, 3)).all()
    assert batch["gen_source_image"].shape == (4, 32, 32, 3)


def test_unusable_weights_are_explained(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.data.latents=.* does not exist"):
        build(config)
    weights.save_safetensors(tmp_path / "vae.safetensors", {"x": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="config.data.latents="):
        build(config)
