"""The loop's smaller promises: numbers, buckets, compilations, samples, profiler, metrics."""

import json
import math
import re
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs.common import load_config
from training import loop, metrics, setup


def test_first_loss_is_a_plain_evaluation_of_the_model(toy, reference):
    """Step 1's loss and gradient norm against model.loss called by hand."""
    from training import state
    from training.sharding import scope

    run = setup.prepare(toy.config())
    with scope(run.mesh):
        first, frozen = state.create(run.plan, state.key_for(run.config, state.INIT), {})
    batch = {k: np.asarray(v) for k, v in next(iter(run.pipeline.dataset)).items()}
    batch["example"] = np.arange(16, dtype=np.int32)
    rng = jax.random.fold_in(state.key_for(run.config, state.DATA), 0)

    def loss(params):
        norms = run.model.norms(batch)
        return run.model.loss(params, first["extra"], batch, rng, step=0, norms=norms)[0]

    value, grads = jax.value_and_grad(loss)(first["params"])
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    row = toy.rows(reference[0])[0]
    assert frozen == {}
    np.testing.assert_allclose(row["train/loss"], value, rtol=1e-6)
    np.testing.assert_allclose(row["train/grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(row["train/lr"], 1e-2 / 3, rtol=1e-6)


def test_rows_files_and_progress_line(toy, tmp_path, capsys):
    """What the workdir holds and what a progress line says."""
    toy.train(tmp_path, steps=6, log_every=3, eval_every=4, tensorboard=True)
    wanted = {"train/loss", "train/first", "train/second", "train/lr", "train/grad_norm"}
    wanted |= {"train/steps_per_s", "train/examples_per_s", "train/data_wait", "train/memory_gib"}
    trained = [r for r in toy.rows(tmp_path) if "train/loss" in r]
    assert [r["step"] for r in trained] == [1, 3, 6] and wanted <= set(trained[-1])
    assert all(isinstance(v, float) for r in trained for k, v in r.items() if k != "step")
    assert [r["step"] for r in toy.rows(tmp_path) if "eval/toy/mean" in r] == [4, 6]
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == ["4.json", "6.json"]
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 6
    assert list((tmp_path / "tensorboard").iterdir())
    out = capsys.readouterr().out
    line = next(x for x in out.splitlines() if x.startswith("step 3/6"))
    assert re.fullmatch(
        r"step 3/6 50%  loss \d+\.\d{4}  lr \S+  \S+ steps/s  \S+ examples/s  "
        r"memory \d+\.\d\d GiB  data wait \d+%  ETA \d+s",
        line,
    ), line


def test_progress_shows_utilisation_where_known(monkeypatch):
    values = dict(loss=1.0, lr=1e-3, steps_per_s=2.0, examples_per_s=64.0, memory_gib=1.5)
    text = metrics.progress(10, 7210, values | dict(data_wait=0.031, mfu=0.412))
    assert text == (
        "step 10/7210 0%  loss 1.0000  lr 1.00e-03  2 steps/s  64 examples/s  MFU 41.2%  "
        "memory 1.50 GiB  data wait 3%  ETA 1h00m"
    )
    compiled = metrics.progress(1, 7210, values | dict(steps_per_s=0.0, data_wait=0.0))
    assert compiled == "step 1/7210 0%  loss 1.0000  lr 1.00e-03  memory 1.50 GiB"
    assert metrics.mfu(1e9, 2.0) is None  # no peak is known for this CPU
    monkeypatch.setitem(metrics.PEAK_FLOPS, jax.devices()[0].device_kind, 1e10)
    assert metrics.mfu(1e9, 2.0) == 2e9 / (1e10 * jax.device_count())
    assert [metrics.duration(s) for s in (9, 200, 3720)] == ["9s", "3m20s", "1h02m"]


def test_measured_flops_are_the_models_without_recomputation(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(metrics.PEAK_FLOPS, jax.devices()[0].device_kind, 1e12)
    toy.train(tmp_path, steps=2)
    row = [r for r in toy.rows(tmp_path) if "train/mfu" in r][-1]
    # Forward, and twice that backward; the first layer's input needs no gradient.
    layer, head = 2 * 2 * 16 * 16 * 32, 2 * 16 * 16 * 2
    flops = 3 * (2 * layer + head)
    measured = row["train/mfu"] * 1e12 / row["train/steps_per_s"]
    assert 0.8 * flops <= measured <= 1.01 * flops


def test_flops_are_counted_outside_the_guard_of_transfers(toy, tmp_path, monkeypatch):
    """Counting builds the model once more, which may put a constant on the device. Where a peak is
    known that is an accelerator, and there the guard of the steps would stop the run."""
    monkeypatch.setitem(metrics.PEAK_FLOPS, jax.devices()[0].device_kind, 1e12)
    seen, real = [], loop.MODELS["toy"]

    def build(config):
        seen.append(jax.config.jax_transfer_guard_host_to_device)
        return real(config)

    monkeypatch.setitem(loop.MODELS, "toy", build)
    toy.train(tmp_path, steps=2)
    assert len(seen) > 1 and "disallow" not in seen


def compiled(monkeypatch):
    """A list that gets the jitted train step of every run."""
    made, build = [], loop.jit_train_step
    monkeypatch.setattr(loop, "jit_train_step", lambda *a: made.append(build(*a)) or made[-1])
    return made


def test_one_compilation_per_bucket_and_none_after(toy, tmp_path, monkeypatch):
    """Two shape buckets, one executable each, in a fresh run and in a resumed one."""
    made = compiled(monkeypatch)
    args = dict(variant="two", checkpoint__every=3)
    toy.train(tmp_path, steps=6, **args)
    assert made[0]._cache_size() == 2
    toy.train(tmp_path, steps=12, **args)
    assert made[1]._cache_size() == 2
    toy.train(tmp_path / "one", steps=8, eval_every=2)
    assert made[2]._cache_size() == 1


def test_ramp_of_the_batch(tmp_path, monkeypatch):
    """4, then 8, then 16 rows: a compilation each; a run cut inside the ramp goes on exactly."""
    made = compiled(monkeypatch)
    (tmp_path / "texts").mkdir()
    for i in range(60):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"snail {i} and volcano {i * i} " * 9)
    changes = {"data.text": "folder", "data.path": str(tmp_path / "texts"), "batch_size": 16}
    changes |= {"ramp": ((4, 2), (8, 2)), "log_every": 1, "evals": (), "sample.prompts": ()}
    changes |= {"checkpoint.every": 1}
    config = load_config("configs/llama.py:debug", **changes, steps=6)
    loop.train(config, tmp_path / "whole")
    assert made[0]._cache_size() == 3
    for steps in (3, 6):
        config = load_config("configs/llama.py:debug", **changes, steps=steps)
        loop.train(config, tmp_path / "cut")
    whole, cut = (
        [r for r in metrics.read_rows(tmp_path / name / "metrics.jsonl") if "train/loss" in r]
        for name in ("whole", "cut")
    )
    timed = [r for r in whole if r["train/steps_per_s"]]  # not the steps that compile
    rows = {r["step"]: round(r["train/examples_per_s"] / r["train/steps_per_s"]) for r in timed}
    assert rows.items() >= {2: 4, 4: 8, 6: 16}.items()
    assert [r["train/loss"] for r in cut] == [r["train/loss"] for r in whole]
    with pytest.raises(ValueError, match=r"config.ramp has \(4, 2\): .*config.data.name='text'"):
        setup.check(load_config("configs/uniflud.py:debug", ramp=((4, 2),)))


def test_batch_of_no_bucket_is_named(toy, tmp_path):
    with pytest.raises(ValueError, match=r"config.data gives batches of .*'x': \(16, 24\).* takes"):
        loop.match_bucket(
            dict(x=np.zeros((16, 24)), y=np.zeros((16, 2)), weight=np.zeros(16)),
            setup.prepare(toy.config()).model.batches,
        )


@pytest.mark.parametrize("bad", [1, 6])
def test_not_finite_stops_and_keeps_the_last_checkpoint(toy, tmp_path, bad):
    """A NaN at step 6 is noticed before step 6 is saved."""
    with pytest.raises(FloatingPointError) as stopped:
        toy.train(tmp_path, model__explode=bad, checkpoint__every=2)
    text = str(stopped.value)
    assert text.startswith(f"step {bad}: ") and "loss=nan" in text and "grad_norm=nan" in text
    saved = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert saved == ([] if bad == 1 else ["2", "4"])
    assert ("step 4 is kept" if bad == 6 else "no checkpoint yet") in text


def test_data_that_ends_is_said(toy, tmp_path):
    with pytest.raises(ValueError, match="config.data.name='toy' ended at step 5 of 12"):
        toy.train(tmp_path, data__epochs=1)


def test_samples_are_drawn_when_due_and_not_twice(toy, tmp_path, monkeypatch):
    """sample.write gets averaged parameters on every due step; a resume makes none again."""
    import inference

    calls = []

    def write(config, model, params, *, tokenizer, step, rng, workdir):
        model.predict["apply"](params, np.zeros((1, config.model.width), np.float32))
        calls.append(step)

    monkeypatch.setattr(inference, "sample", SimpleNamespace(write=write), raising=False)
    args = dict(sample__prompts=("a", "b"), checkpoint__every=4)
    toy.train(tmp_path, steps=8, sample_every=4, **args)
    assert calls == [4, 8]
    toy.train(tmp_path, steps=8, sample_every=4, **args)
    assert calls == [4, 8]


def test_evaluators_get_the_averages(toy, reference, tmp_path):
    """The evaluation of mode eval equals the one of the loop, and uses ema where it is on."""
    loop.evaluate(toy.config(), reference[0])
    again = json.loads((reference[0] / "eval/12.json").read_text())["toy/mean"]
    assert again == [r for r in toy.rows(reference[0]) if "eval/toy/mean" in r][0]["eval/toy/mean"]
    run, params, step = setup.load_for_use(toy.config(), reference[0])
    raw = setup.load_for_use(toy.config(), reference[0], step=8)[1]
    assert step == 12 and run.config.steps == 12
    assert float(abs(params["head"]["kernel"] - raw["head"]["kernel"]).max()) > 0
    with pytest.raises(ValueError, match="does not match the checkpoint.*model.layers=3"):
        setup.load_for_use(toy.config(model__layers=3), reference[0])
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        loop.evaluate(toy.config(), tmp_path)


def test_evaluations_after_the_checkpoint_are_made_again(toy, tmp_path):
    """Killed at step 7 with a checkpoint of step 4: the evaluation of step 6 is logged again."""
    toy.train(tmp_path, steps=4)
    (tmp_path / "eval" / "6.json").write_text("{}")  # left by the part that is lost
    toy.train(tmp_path, steps=8, eval_every=2)
    evaluated = [r["step"] for r in toy.rows(tmp_path) if "eval/toy/mean" in r]
    assert evaluated == [4, 6, 8]
    assert "toy/mean" in (tmp_path / "eval" / "6.json").read_text()


def test_profiler_window(toy, tmp_path):
    """profile=(3, 2) traces two steps after step 3 and leaves a trace file."""
    toy.train(tmp_path, steps=8, profile=(3, 2))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_transfers_are_guarded(toy, tmp_path, monkeypatch):
    """A host array that slips into a step is an error, not a silent copy every step."""
    real = loop.global_batch
    monkeypatch.setattr(
        loop, "global_batch", lambda *a: {k: np.asarray(v) for k, v in real(*a).items()}
    )
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        toy.train(tmp_path, steps=3)


class FakeWandb:
    """Records what is logged; stands in for the optional package."""

    def __init__(self):
        self.runs, self.rows = [], []
        self.util = SimpleNamespace(generate_id=lambda: f"id{len(self.runs)}")

    def init(self, **kwargs):
        self.runs.append(kwargs)
        return SimpleNamespace(
            log=lambda values, step: self.rows.append((step, values)), finish=lambda: None
        )


def test_wandb_continues_the_same_run(toy, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    args = dict(schedule__name="constant", checkpoint__every=2, wandb="project")
    toy.train(tmp_path, steps=2, **args)
    toy.train(tmp_path, steps=4, **args)
    assert [r["id"] for r in fake.runs] == ["id0", "id0"] and fake.runs[0]["project"] == "project"
    assert [step for step, values in fake.rows if "train/loss" in values] == [1, 2, 3, 4]


def test_wandb_that_is_not_installed_is_said(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="config.wandb='project' needs: pip install wandb"):
        toy.train(tmp_path, wandb="project")
