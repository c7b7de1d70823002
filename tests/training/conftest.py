"""Fixtures of the loop's tests: the toy system, in-process runs and real subprocesses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent
TOY = HERE / "toy.py"


def _load_toy():
    if "uniflud_toy" not in sys.modules:
        spec = importlib.util.spec_from_file_location("uniflud_toy", TOY)
        module = importlib.util.module_from_spec(spec)
        sys.modules["uniflud_toy"] = module
        spec.loader.exec_module(module)
        module.register()
    return sys.modules["uniflud_toy"]


def rows(workdir) -> list[dict]:
    """Rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def losses(workdir) -> dict[int, float]:
    """{step: train/loss}; every step must be there once."""
    found = [(r["step"], r["train/loss"]) for r in rows(workdir) if "train/loss" in r]
    assert len(found) == len(dict(found)), "a step was logged twice"
    return dict(found)


def command(*args: str) -> list[str]:
    """The toy's command line."""
    return [sys.executable, str(TOY), f"--config={HERE / 'toy_config.py'}", *map(str, args)]


def run(*args: str, **env: str) -> subprocess.CompletedProcess:
    """`command` in a process of its own."""
    return subprocess.run(
        command(*args), env=os.environ | env, capture_output=True, text=True, timeout=1200
    )


@pytest.fixture(scope="session")
def toy():
    """The toy system, registered; .config(variant, **overrides), .train(workdir, ...), .run()."""
    module = _load_toy()
    from configs.common import load_config
    from training import loop

    def config(variant="", **overrides):
        spec = module.CONFIG + (f":{variant}" if variant else "")
        return load_config(spec, **{k.replace("__", "."): v for k, v in overrides.items()})

    def train(workdir, variant="", **overrides):
        loop.train(config(variant, **overrides), workdir)
        return losses(workdir)

    return SimpleNamespace(
        config=config, train=train, run=run, command=command, losses=losses, rows=rows
    )


@pytest.fixture(scope="session")
def reference(toy, tmp_path_factory):
    """An uninterrupted run of the toy: (workdir, {step: loss})."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    return workdir, toy.train(workdir)
