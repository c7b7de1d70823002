"""docs/running_on_pods.md: its commands parse, and its two-process block runs as it stands."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from configs.common import load_config
from training import cli, platform, topology

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "running_on_pods.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
COMMANDS = sorted(
    set(re.findall(r"python main\.py[^\n;\"]*", "\n".join(BLOCKS).replace("\\\n", " ")))
)


def test_there_are_commands():
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    args = dict(text[2:].partition("=")[::2] for text in shlex.split(command)[2:])
    known = {"config", "mode", "workdir", "topology"}
    assert {a for a in args if not a.startswith("config.")} <= known
    assert args.get("mode", "train") in cli.MODES
    overrides = [f"{a[7:]}={v}" for a, v in args.items() if a.startswith("config.")]
    config = load_config(args["config"], *overrides)
    assert config.task == "train"
    if "topology" in args:
        topology.parse(args["topology"])


def test_two_processes_block_runs(tmp_path):
    """The block of section 5, with the toy system in place of the flagship."""
    (block,) = [b for b in BLOCKS if "JAX_NUM_PROCESSES=2" in b]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    toy = ROOT / "tests" / "training"
    script = (
        block.replace("python main.py", f"{sys.executable} {toy / 'toy.py'}")
        .replace("configs/uniflud.py:debug", str(toy / "toy_config.py"))
        .replace("runs/two", str(tmp_path / "two"))
        .replace(":9876", f":{port}")
    )
    done = subprocess.run(
        ["bash", "-ec", script], cwd=ROOT, env=os.environ, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("finished: 12 steps") >= 1
    rows = (tmp_path / "two" / "metrics.jsonl").read_text()
    assert rows.count('"train/loss"') == 12  # one writer


@pytest.mark.parametrize("answer", [None, ValueError("no coordinator"), OSError("no metadata")])
def test_tpu_vms_are_asked_for_their_hosts(monkeypatch, answer):
    import jax

    calls = []

    def initialize(*args):
        calls.append(args)
        if answer is not None:
            raise answer

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(platform, "accelerators", lambda: ["tpu"])
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    platform.join_hosts()
    assert calls == [()]
