"""Exported functions give the same numbers in a process that has only jax and the files."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.core import meta

from configs.common import load_config
from export import run
from export.functions import functions
from export.weights import flatten, load_safetensors, unflatten
from models import MODELS

# What a server runs: no code of ours, only the files.
READER = """
import json, pathlib, sys
import jax, jax.export, numpy as np, safetensors.numpy
folder = pathlib.Path(sys.argv[1])
index = json.loads((folder / "index.json").read_text())
params = safetensors.numpy.load_file(folder / index["params"])
given = dict(np.load(folder / "inputs.npz"))
load = lambda name: jax.export.deserialize((folder / f"{name}.stablehlo").read_bytes()).call
take = lambda name, extra={}: {
    k: (given | extra)[k] for k in index["functions"][f"{name}.stablehlo"]["inputs"]}
out = {"logits": load("text_logits")(params, take("text_logits"))["logits"]}
state = load("image_prefill")(params, take("image_prefill"))
step = load("image_token_step")
tokens = []
for k in range(3):
    state = step(params, take("image_token_step", dict(state) | {
        "position": given["order"][k : k + 1], "next_position": given["order"][k + 1 : k + 2]}))
    tokens.append(state["token"])
out["tokens"] = np.concatenate(tokens)
out["image"] = load("image_decode")(params, {"tokens": given["tokens"]})["image"]
np.savez(folder / "out.npz", **out)
assert not any(name.split(".")[0] in ("models", "export", "flax") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny flagship with random parameters, exported; guidance on, so two cache rows."""
    small = {"model.vocab_size": 64, "sample.steps": 3, "model.decoder.layers": 2}
    config = load_config("configs/uniflud.py:debug", **small)
    model = MODELS[config.model.name](config)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0))[0])
    rng = np.random.default_rng(0)  # cheaper than compiling the initialisation
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), shapes)
    folder = run.write(config, model, params, 7, tmp_path_factory.mktemp("export"))
    return config, model, params, folder


def make_inputs(model, tokens: int):
    rng = np.random.default_rng(0)
    batch = model.batches["image_text"]
    side = batch["und_image"].shape[1]
    text = batch["und_tokens"].shape[1]
    return {
        "und_image": rng.integers(0, 255, (1, side, side, 3)).astype(np.uint8),
        "und_tokens": rng.integers(4, 64, (1, text)).astype(np.int32),
        "und_prefix": np.array([5], np.int32),
        "und_length": np.array([9], np.int32),
        "gen_tokens": rng.integers(4, 64, (1, batch["gen_tokens"].shape[1])).astype(np.int32),
        "gen_length": np.array([6], np.int32),
        "order": rng.permutation(tokens).astype(np.int32),
        "guidance": np.float32(2.0),
        "temperature": np.float32(0.9),
        "key": np.array([1, 2], np.uint32),
    }


def test_fresh_process_gives_equal_numbers(exported):
    config, model, params, folder = exported
    found = functions(model, config, params)
    count, channels = found["image_decode"].inputs["tokens"].shape[1:]
    given = make_inputs(model, count)
    given["tokens"] = np.random.default_rng(1).normal(size=(1, count, channels)).astype(np.float32)
    given["next_position"] = given["order"][:1]
    np.savez(folder / "inputs.npz", **given)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(folder)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    out = np.load(folder / "out.npz")

    def call(name, extra=None):
        function = found[name]
        values = given | (extra or {})
        return jax.jit(function.call)(params, {k: values[k] for k in function.inputs})

    close = dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out["logits"], call("text_logits")["logits"], **close)
    np.testing.assert_allclose(out["image"], call("image_decode")["image"], **close)
    state = call("image_prefill")
    for k in range(3):
        at = {"position": given["order"][k : k + 1], "next_position": given["order"][k + 1 : k + 2]}
        state = call("image_token_step", dict(state) | at)
        np.testing.assert_allclose(out["tokens"][k : k + 1], state["token"], **close)


def test_index_lists_shapes(exported):
    index = json.loads((exported[3] / "index.json").read_text())
    entry = index["functions"]["image_token_step.stablehlo"]
    assert entry["platforms"] == ["cpu", "cuda", "tpu"]
    fed_back = {k for k in entry["inputs"] if k.startswith("cache_")} | {"slot", "inputs"}
    assert fed_back <= entry["outputs"].keys() and len(fed_back) > 2
    assert entry["inputs"]["slot"] == "int32[2]"  # with the prompt and without
    assert entry["inputs"]["temperature"] == "float32[]"


def test_weights_and_configuration(exported):
    config, model, params, folder = exported
    tensors = load_safetensors(folder / json.loads((folder / "index.json").read_text())["params"])
    assert tensors.keys() == flatten(params).keys()
    jax.tree.map(np.testing.assert_array_equal, unflatten(dict(tensors)), params)
    described = json.loads((folder / "config.json").read_text())
    assert described["model_type"] == "unifluid" and described["uniflud"]["step"] == 7
    assert described["uniflud"]["config"]["sample"]["steps"] == 3


def test_a_rotary_grid_is_not_exported_step_by_step():
    """order_pos="rope2d": its step needs the place of the token before; the rest is offered."""
    config = load_config("configs/uniflud.py:debug", **{"model.vocab_size": 64})
    config.model.order_pos = "rope2d"
    model = MODELS[config.model.name](config)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0))[0])
    assert set(functions(model, config, shapes)) == {"text_logits"}
