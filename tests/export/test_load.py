"""Pretrained weights are found in published names and in our own."""

import jax
import numpy as np
import pytest

from export import weights as w
from export.load import load_pretrained

PARAMS = {"layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "bias": np.ones(3)}
MAP = w.WeightMap(
    {"layer/kernel": w.linear("model.layer.weight"), "bias": w.plain("model.bias")}
)  # fmt: skip
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), PARAMS)


@pytest.mark.parametrize("saved_with", [MAP, w.flat_map(PARAMS)])
@pytest.mark.parametrize("folder", [False, True])
def test_both_name_styles(tmp_path, saved_with, folder):
    w.save_safetensors(tmp_path / "model.safetensors", w.to_published(PARAMS, saved_with))
    path = tmp_path if folder else tmp_path / "model.safetensors"
    loaded = load_pretrained(path, MAP, ABSTRACT)
    jax.tree.map(np.testing.assert_array_equal, loaded, PARAMS)
    assert loaded["bias"].dtype == np.float32


def test_without_a_map_our_names_are_expected(tmp_path):
    w.save_safetensors(tmp_path / "x.safetensors", w.to_published(PARAMS, MAP))
    with pytest.raises(ValueError, match="x.safetensors: weights do not fit .* 2 missing: "):
        load_pretrained(tmp_path / "x.safetensors", None, ABSTRACT)


def test_nearly_published_file_is_explained_in_published_names(tmp_path):
    tensors = w.to_published(PARAMS, MAP)
    tensors["model.layers.weight"] = tensors.pop("model.layer.weight")
    w.save_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ValueError, match="model.layer.weight .did you mean model.layers.weight"):
        load_pretrained(tmp_path / "x.safetensors", MAP, ABSTRACT)
