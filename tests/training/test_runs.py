"""Task runs: ordinary resumable runs in order, then one report."""

import json
from pathlib import Path

import jax
import pytest

from training import loop, runs


def test_two_runs_and_a_report(toy, tmp_path, capsys):
    """Two seeds and one report; again is free; a run may start from what another left."""
    spec = toy.config.__globals__["HERE"] / "toy_config.py"
    config = toy.config()
    with config.unlocked():
        config.task = "runs"
        config.runs = (
            ("a", f"{spec}:debug", ("steps=6", "seed=1")),
            ("b", f"{spec}", ("steps=6", "init_from={workdir}/a")),
        )
        config.report = "toy"
    runs.run(config, tmp_path, loop.train)
    out = capsys.readouterr().out
    assert out.index("run 1 of 2: a") < out.index("run 2 of 2: b")
    assert list(toy.losses(tmp_path / "a")) == list(toy.losses(tmp_path / "b")) == [*range(1, 7)]
    assert json.loads((tmp_path / "eval/0.json").read_text())["toy/total"] == 2.0
    runs.run(config, tmp_path, loop.train)
    assert capsys.readouterr().out.count("already finished") == 2


@pytest.mark.parametrize("names", [(), ("a", "a")])
def test_names_must_differ(toy, tmp_path, names):
    config = toy.config()
    with config.unlocked():
        config.runs = tuple((name, "x.py", ()) for name in names)
    with pytest.raises(ValueError, match="config.runs must be a list of runs with different names"):
        runs.run(config, tmp_path, loop.train)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux counts memory maps")
def test_programs_of_ended_runs_are_dropped(toy, tmp_path):
    """A list of a hundred runs must not come to vm.max_map_count, where XLA segfaults."""
    spec = toy.config.__globals__["HERE"] / "toy_config.py"
    config, programs, maps = toy.config(), [], []
    with config.unlocked():
        config.runs = tuple((str(i), str(spec), ()) for i in range(4))

    def train_one(_, workdir):
        maps.append(len(Path("/proc/self/maps").read_text().splitlines()))
        for i in range(40):
            programs.append(jax.jit(lambda x, a=f"{workdir}{i}": x * 2.0 + len(a)))
            programs[-1](1.0)

    runs.run(config, tmp_path, train_one)
    assert maps[3] - maps[1] < 40, maps  # 120 a run where they are kept
