"""Objectives through the loop: freezing, a frozen reference, two players with a late start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import LogicallyPartitioned as Box

from training import setup
from training.checkpoint import Checkpoints
from training.objectives import OBJECTIVES, Objective, join, take
from training.tree import flat


def final(config, workdir):
    """(run, params, frozen) of the newest checkpoint, as trained."""
    run = setup.prepare(config)
    store = Checkpoints(workdir / "checkpoints", write=False)
    values, frozen, _ = setup.restore(run, workdir, store, None)
    store.close()
    return run, values["params"], frozen


def test_take_and_join():
    tree = dict(a=dict(x=1, y=2), b=dict(z=3), c=4)
    rest, taken = take(tree, ("a/x", "b"))
    assert rest == dict(a=dict(y=2), c=4) and taken == dict(a=dict(x=1), b=dict(z=3))
    assert join(rest, taken) == tree and tree == dict(a=dict(x=1, y=2), b=dict(z=3), c=4)
    with pytest.raises(ValueError, match="config.objective.freeze has 'd', .* there are a, b, c"):
        take(tree, ("d",))


@pytest.mark.parametrize("freeze", [("trunk",), ("trunk/up", "head/bias")])
def test_freeze(toy, reference, tmp_path, freeze):
    """Frozen parts keep their first values, have no optimiser state, and come back in `use`."""
    args = dict(objective__freeze=freeze, checkpoint__every=3)
    toy.train(tmp_path, steps=6, **args)
    config = toy.config(steps=12, **args)
    _, params, frozen = final(config, tmp_path)
    held = flat(frozen["params"])
    assert set(held) == {k for k in flat(params) | held if k.startswith(freeze)}
    mu = [k for k in flat(setup.prepare(config).plan.state["opt"]) if "/mu/" in k]
    assert sorted(k.partition("/mu/")[2] for k in mu) == sorted(flat(params))
    toy.train(tmp_path, steps=12, **args)
    assert len(list((tmp_path / "frozen").iterdir())) == 1
    _, _, again = final(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, frozen, again)
    _, used, _ = setup.load_for_use(config, tmp_path)
    assert set(flat(used)) == set(flat(params)) | set(held)


def with_reference(model, config):
    """The loss plus a distance to the outputs of the first parameters, as in DPO or KL terms."""

    def init(rng, params):
        return params, dict(reference=params)

    def loss(params, frozen, extra, batch, rng, *, step, norms):
        value, (metrics, extra) = model.loss(params, extra, batch, rng, step=step, norms=norms)
        apply = model.predict["apply"]
        gap = apply(params, batch["x"]) - apply(frozen["reference"], batch["x"])
        distance = jnp.square(gap).sum() / norms["second"]
        return value + distance, (metrics | dict(distance=distance), extra)

    def labels(params):
        return jax.tree.map(lambda _: "all", params)

    return Objective(init, loss, labels, None, lambda params, frozen: params)


def test_frozen_reference(toy, tmp_path, monkeypatch):
    """The reference is not donated, not trained, stored once and survives a resume exactly."""
    monkeypatch.setitem(OBJECTIVES, "reference", with_reference)
    args = dict(objective__name="reference", checkpoint__every=3, schedule__name="constant")
    toy.train(tmp_path / "a", steps=6, **args)
    both = toy.train(tmp_path / "a", steps=12, **args)
    assert both == toy.train(tmp_path / "b", steps=12, **args)
    distances = [r["train/distance"] for r in toy.rows(tmp_path / "a") if "train/distance" in r]
    assert distances[0] == 0.0 and min(distances[1:]) > 0
    config = toy.config(steps=12, **args)
    first, _ = _initial(config)
    _, params, frozen = final(config, tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, frozen["reference"], first)
    assert [p.name for p in (tmp_path / "a/frozen").iterdir()] == [
        p.name for p in (tmp_path / "b/frozen").iterdir()
    ]
    next((tmp_path / "a/frozen").iterdir()).rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="frozen.* is missing"):
        toy.train(tmp_path / "a", steps=13, **args)


def _initial(config):
    """(params, frozen) before the first step."""
    from training import state
    from training.sharding import scope

    run = setup.prepare(config)
    with scope(run.mesh):
        values, frozen = state.create(run.plan, state.key_for(config, state.INIT), {})
    return values["params"], frozen


def two_players(model, config):
    """Generator (the model) and discriminator: one summed loss, stop-gradients, a late start."""
    start, hold = config.objective.start, jax.lax.stop_gradient

    def init(rng, params):
        judge = Box(0.1 * jax.random.normal(rng, (2, 4)), ("width_in", "mlp"))
        return dict(model=params, judge=dict(kernel=judge)), {}

    def score(judge, y):
        return jnp.tanh(y @ judge["kernel"]).sum(-1)

    def loss(params, frozen, extra, batch, rng, *, step, norms):
        value, (metrics, extra) = model.loss(
            params["model"], extra, batch, rng, step=step, norms=norms
        )
        made = model.predict["apply"](params["model"], batch["x"])
        on = jnp.where(step >= start, 1.0, 0.0)
        fool = -score(hold(params["judge"]), made).sum() / norms["second"]
        tell = (score(params["judge"], hold(made)) - score(params["judge"], batch["y"])).sum()
        tell = tell / norms["second"]
        metrics = metrics | dict(fool=on * fool, tell=on * tell)
        return value + on * (0.1 * fool + tell), (metrics, extra)

    def labels(params):
        return {k: jax.tree.map(lambda _, k=k: k, v) for k, v in params.items()}

    return Objective(init, loss, labels, None, lambda params, frozen: params["model"])


def test_two_groups_with_a_late_start(toy, tmp_path, monkeypatch):
    """The judge stands still before `start`; then each group moves at its own rate."""
    monkeypatch.setitem(OBJECTIVES, "players", two_players)
    groups = "{'judge': {'lr_scale': 0.5, 'weight_decay_scale': 0.0}}"
    args = dict(
        objective__name="players",
        optimizer__groups=groups,
        ema__groups="('model',)",
        schedule__name="constant",
        checkpoint__every=4,
    )
    config = toy.config(**args)
    with config.unlocked():
        config.objective.start = 5
    from training import loop

    loop.train(config, tmp_path)
    rows = {r["step"]: r for r in toy.rows(tmp_path) if "train/tell" in r}
    assert all(rows[s]["train/tell"] == 0 for s in range(1, 6)) and rows[6]["train/tell"] != 0
    before, _ = _initial(config)
    run = setup.prepare(config)
    store = Checkpoints(tmp_path / "checkpoints", write=False)
    state, _ = store.restore(run.plan.state)
    store.close()
    # Adam's step is at most lr x lr_scale an update; seven updates ran after the start.
    moved = abs(state["params"]["judge"]["kernel"] - before["judge"]["kernel"])
    assert 0 < moved.max() <= 7 * 1e-2 * 0.5 * 1.5
    assert set(state["ema"]) == {f"model/{k}" for k in flat(state["params"]["model"])}
    _, used, _ = setup.load_for_use(config, tmp_path)
    assert set(used) == {"trunk", "head"}  # evaluators never see the judge


def test_rollout_makes_the_batch(toy, tmp_path, monkeypatch):
    """With a rollout the data set gives prompts and the objective makes what is trained on."""

    def build(model, config):
        plain = OBJECTIVES["model"](model, config)

        def rollout(state, frozen, prompts, rng):
            made = model.predict["apply"](state["params"], prompts["x"])
            return prompts | dict(y=made + jax.random.normal(rng, made.shape))

        return plain._replace(rollout=rollout)

    monkeypatch.setitem(OBJECTIVES, "own_batches", build)
    args = dict(objective__name="own_batches", model__dropout=0.0)
    losses = toy.train(tmp_path, **args)
    # Its own output plus unit noise is missed by one, twice: two terms of mean one each.
    assert 1.0 < np.mean(list(losses.values())) < 3.0


def test_low_rank_starts_as_the_given_model_and_merges(toy, tmp_path):
    """W + alpha / rank A B at the hidden matrices; nothing else changes, here or in `use`."""
    args = dict(objective__name="low_rank", objective__rank=3, objective__alpha=6.0)
    args["objective__leaves"] = ("*",)
    config = toy.config(steps=12, **args)
    run = setup.prepare(config)
    shapes = {k: v.shape for k, v in flat(run.plan.state["params"]).items()}
    assert shapes == {
        "adapters/trunk/up/a": (2, 16, 3), "adapters/trunk/up/b": (2, 3, 32),
        "adapters/trunk/down/a": (2, 32, 3), "adapters/trunk/down/b": (2, 3, 16),
        "adapters/head/kernel/a": (16, 3), "adapters/head/kernel/b": (3, 2),
    }  # fmt: skip
    toy.train(tmp_path, steps=6, **args)
    toy.train(tmp_path, steps=12, **args)
    _, params, frozen = final(config, tmp_path)
    given = flat(frozen["params"])
    plain = setup.prepare(toy.config()).plan  # the same first parameters without adapters
    first = flat(plain.init(jax.random.key(0), {})[0]["params"])
    assert set(given) == set(first)
    _, used, _ = setup.load_for_use(config, tmp_path)
    merged, parts = flat(run.objective.model_params(params, frozen)), flat(params["adapters"])
    for name, value in merged.items():
        want = given[name]
        if f"{name}/a" in parts:
            assert np.abs(parts[f"{name}/b"]).max() > 0
            want = want + 2.0 * np.asarray(parts[f"{name}/a"]) @ np.asarray(parts[f"{name}/b"])
            assert (flat(used)[name] != given[name]).any()
        else:
            np.testing.assert_array_equal(flat(used)[name], given[name])
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)


def test_low_rank_products_follow_the_axes_of_heads():
    """Inputs and outputs of several axes, and stacked layers anywhere in front."""
    from training.objectives import low_rank

    shapes = dict(
        q=((3, 8, 2, 4), ("layers", "embed", "heads", "head_dim")),
        o=((3, 2, 4, 8), ("layers", "heads", "head_dim", "embed")),
        table=((7, 8), ("vocab", "embed")),
    )
    boxes = {k: Box(jnp.zeros(shape), names) for k, (shape, names) in shapes.items()}
    found = low_rank.cuts(boxes, ("*",))
    assert found == {
        "q": low_rank.Cut((0,), (1,), (2, 3)), "o": low_rank.Cut((0,), (1, 2), (3,))
    }  # fmt: skip
    for name, terms in dict(q="nir,nrhk->nihk", o="nhkr,nri->nhki").items():
        a, b = low_rank.factors(jax.random.key(1), boxes[name], found[name], 5).values()
        assert not b.value.any() and a.value.std() == pytest.approx(8**-0.5, rel=0.3)
        b = jax.random.normal(jax.random.key(2), b.value.shape)
        got = low_rank.product(a.value, b, found[name])
        np.testing.assert_allclose(got, jnp.einsum(terms, a.value, b), rtol=1e-5, atol=1e-6)
        assert got.shape == shapes[name][0]
    with pytest.raises(ValueError, match="leaves has 'k', which no hidden matrix matches; they ar"):
        low_rank.cuts(boxes, ("q", "k"))
