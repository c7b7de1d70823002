"""Mode export after training a toy: files, names, averages, and the way back through init_from."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import load_config
from export import run
from export.files import load_safetensors, read_header
from export.weights import flatten
from training import loop, setup

TOY = Path(__file__).resolve().parents[1] / "training" / "toy.py"


@pytest.fixture(scope="module")
def config():
    """The toy system of the loop's tests, registered, for three steps."""
    spec = importlib.util.spec_from_file_location("export_toy", TOY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.register()
    return load_config(str(TOY.with_name("toy_config.py")), steps=3)


def test_export_of_a_trained_run(config, tmp_path, capsys):
    loop.train(config, tmp_path)
    folder = run.run(config, tmp_path)
    assert "model.safetensors" in capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "config.json"}
    loaded, params, step = setup.load_for_use(config, tmp_path)
    loaded.pipeline.close()
    tensors = load_safetensors(folder)
    assert tensors.keys() == {"trunk/up", "trunk/down", "trunk/scale", "head/kernel", "head/bias"}
    jax.tree.map(np.testing.assert_array_equal, tensors, flatten(params))  # the averages
    described = json.loads((folder / "config.json").read_text())
    assert described["uniflud"]["step"] == step == 3
    assert described["torch_dtype"] == "float32"
    assert read_header(folder / "model.safetensors")[0]["head/bias"][1] == (2,)


def test_export_of_a_part_in_another_type(config, tmp_path):
    """What the shipped weights are made with: head/ alone, half as many bytes, and said so."""
    loop.train(config, tmp_path)
    whole = load_safetensors(run.run(config, tmp_path))
    small = config.copy_and_resolve_references()
    with small.unlocked():
        small.export.update(dtype="bfloat16", part="head")
    folder = run.run(small, tmp_path)
    tensors = load_safetensors(folder)
    assert tensors.keys() == {"kernel", "bias"}
    for name, tensor in tensors.items():
        assert tensor.dtype == jnp.bfloat16
        np.testing.assert_array_equal(tensor, whole[f"head/{name}"].astype(tensor.dtype))
    described = json.loads((folder / "config.json").read_text())
    assert described["torch_dtype"] == "bfloat16"
    assert described["uniflud"]["parameters"] == sum(x.size for x in tensors.values())
    for key, value, message in (("part", "hat", "the parts are"), ("dtype", "int8", "allowed are")):
        with small.unlocked():
            small.export.update(dtype="", part="")
            small.export[key] = value
        with pytest.raises(ValueError, match=message):
            run.run(small, tmp_path)


def test_without_a_checkpoint_it_says_train_first(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint; train first"):
        run.run(config, tmp_path)
