"""config.init_from: whole models and parts, from published files and from runs of ours."""

import json

import jax
import numpy as np
import pytest

from configs.common import base
from export.weights import flat_map, save_safetensors, to_published
from models import MODELS
from tests.models.test_image_tokenizers import tiny_config
from training import init_from, setup, state
from training.checkpoint import Checkpoints
from training.objectives import OBJECTIVES
from training.sharding import make_mesh, scope
from training.state import INIT, create, key_for
from training.tree import flat


def first_state(config):
    """The state before step one, with init_from applied."""
    run = setup.prepare(config)
    with scope(run.mesh):
        loaded = init_from.load(config, run.model, run.plan.params)
        return create(run.plan, key_for(config, INIT), loaded)


def test_parse():
    assert init_from.parse("") == {} and init_from.parse("a/b") == {"": "a/b"}
    assert init_from.parse("vae=x/y, gemma=z") == dict(vae="x/y", gemma="z")
    for wrong in ("vae=", "a=b,a=c"):
        with pytest.raises(ValueError, match=f"config.init_from='{wrong}' must be DIR or name="):
            init_from.parse(wrong)


def test_from_files(toy, tmp_path):
    """A whole model and one part of it; the averages start from the loaded values too."""
    config = toy.config(seed=5)
    params, _ = first_state(config)
    params = jax.tree.map(np.asarray, params["params"])
    save_safetensors(tmp_path / "all.safetensors", to_published(params, flat_map(params)))
    head = params["head"]
    save_safetensors(tmp_path / "head.safetensors", to_published(head, flat_map(head)))

    state, _ = first_state(toy.config(init_from=str(tmp_path / "all.safetensors")))
    jax.tree.map(np.testing.assert_array_equal, state["params"], params)
    for name, value in flat(state["params"]).items():
        np.testing.assert_array_equal(state["ema"][name], value)

    part, _ = first_state(toy.config(init_from=f"head={tmp_path / 'head.safetensors'}"))
    np.testing.assert_array_equal(part["params"]["head"]["kernel"], head["kernel"])
    fresh, _ = first_state(toy.config())
    np.testing.assert_array_equal(part["params"]["trunk"]["up"], fresh["params"]["trunk"]["up"])


def test_the_loop_starts_from_them_and_resumes_without(toy, tmp_path):
    """Loaded weights change step 1; a resume no longer needs the file."""
    toy.train(tmp_path / "source", seed=5)
    args = dict(init_from=str(tmp_path / "source"), checkpoint__every=3)
    losses = toy.train(tmp_path / "run", steps=6, **args)
    assert losses[1] != toy.train(tmp_path / "plain", steps=6)[1]
    (tmp_path / "source").rename(tmp_path / "gone")
    assert len(toy.train(tmp_path / "run", steps=9, **args)) == 9


def test_from_a_run_takes_its_averages(toy, reference):
    state, _ = first_state(toy.config(init_from=str(reference[0])))
    _, used, _ = setup.load_for_use(toy.config(), reference[0])
    jax.tree.map(np.testing.assert_array_equal, state["params"], used)


def test_from_a_run_with_frozen_parts(toy, tmp_path):
    """The frozen trunk of the source is found beside its checkpoint."""
    args = dict(objective__freeze=("trunk",), checkpoint__every=3)
    toy.train(tmp_path, steps=3, **args)
    state, _ = first_state(toy.config(init_from=str(tmp_path), seed=9))
    _, used, _ = setup.load_for_use(toy.config(steps=3, **args), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state["params"], used)
    with pytest.raises(ValueError, match="has no parameter 'trunk/"):
        (tmp_path / "frozen").rename(tmp_path / "gone")
        first_state(toy.config(init_from=str(tmp_path)))


def test_from_a_run_with_adapters_takes_what_it_evaluates_with(toy, tmp_path):
    """The merged matrices, averages of the adapters where it has them."""
    args = dict(objective__name="low_rank", objective__rank=3, objective__leaves=("*",))
    toy.train(tmp_path, steps=6, **args)
    _, used, _ = setup.load_for_use(toy.config(steps=6, **args), tmp_path)
    state, _ = first_state(toy.config(init_from=str(tmp_path), seed=9))
    for name, value in flat(used).items():
        np.testing.assert_allclose(flat(state["params"])[name], value, rtol=1e-6, atol=1e-7)
    fresh, _ = first_state(toy.config(seed=9))
    assert np.abs(used["trunk"]["up"] - fresh["params"]["trunk"]["up"]).max() > 1e-3


def test_from_a_run_takes_its_running_statistics(tmp_path):
    """A codebook's revived codes lie in the state beside the parameters; they come along."""
    tiny = tiny_config("vq")
    config = base(model=tiny.model, data=dict(image_size=16), batch_size=4)
    model, mesh = MODELS["bsq_vae"](config), make_mesh(config.mesh)
    with scope(mesh):
        plan = state.plan(model, OBJECTIVES["model"](model, config), config, mesh)
        made, _ = create(plan, key_for(config, INIT), {})
        made["extra"]["quantiser"]["offset"] += 3.0
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        meta = dict(config=json.loads(config.to_json_best_effort()), frozen=None)
        checkpoints.save(1, made, None, meta, wait=True)
        checkpoints.close()
        config.init_from = str(tmp_path)
        loaded = init_from.load(config, model, plan.params)
    for name, value in flat(made["params"]).items():
        moved = 3.0 if name == "quantiser/embedding" else 0.0
        np.testing.assert_allclose(loaded[name], value + moved, rtol=1e-6)


def test_a_frozen_part_that_nothing_loads_is_named(toy, reference, tmp_path, capsys):
    """A transformer on a random tokenizer learns nothing that anybody wants."""
    freeze = dict(objective__freeze=("trunk",))
    toy.train(tmp_path / "random", **freeze)
    assert "warning: 'trunk' is frozen as it starts, at random" in capsys.readouterr().out
    toy.train(tmp_path / "loaded", init_from=str(reference[0]), **freeze)
    assert "warning" not in capsys.readouterr().out


def test_frozen_parts_are_loaded_before_they_freeze(toy, reference):
    config = toy.config(init_from=str(reference[0]), objective__freeze=("trunk",))
    _, frozen = first_state(config)
    _, used, _ = setup.load_for_use(toy.config(), reference[0])
    jax.tree.map(np.testing.assert_array_equal, frozen["params"]["trunk"], used["trunk"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("nowhere", "config.init_from='nowhere': nowhere does not exist"),
        ("vae=nowhere", "config.init_from='vae=nowhere': the model has no part 'vae'; its parts"),
    ],
)
def test_mistakes_are_named(toy, text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        first_state(toy.config(init_from=text))


def test_wrong_file_lists_the_names(toy, tmp_path):
    save_safetensors(tmp_path / "x.safetensors", {"kernel": np.zeros((3, 2), np.float32)})
    with pytest.raises(ValueError, match="missing: bias.*mis-shaped: kernel"):
        first_state(toy.config(init_from=f"head={tmp_path / 'x.safetensors'}"))
