"""1 device = 8 virtual devices in several meshes = 2 processes x 4 devices; moves between them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mesh_runs.py")
STEPS = 20


def environment(devices, **more):
    """Environment with so many virtual CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | more


@pytest.fixture(scope="module")
def one_device(toy, tmp_path_factory):
    """{step: loss} of 20 steps on one device, and where."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    args = dict(schedule__name="constant", checkpoint__every=10, checkpoint__keep=9)
    return toy.train(workdir, steps=STEPS, **args), workdir


def assert_same(one, other):
    """Same losses to 1e-5 of max(1, |loss|) at every step."""
    assert sorted(one) == sorted(other) == list(range(1, STEPS + 1))
    for step, loss in one.items():
        assert abs(loss - other[step]) <= 1e-5 * max(1, abs(loss)), (step, loss, other[step])


def test_muon_on_eight_devices(toy, tmp_path):
    """Matrices that are cut over fsdp and tensor are orthogonalised whole."""
    args = dict(schedule__name="constant", optimizer__name="muon")
    one = toy.train(tmp_path / "one", steps=STEPS, **args)
    command = [sys.executable, SCRIPT, tmp_path, str(STEPS), "2,2,2,1"]
    env = environment(8, OPTIMIZER="muon")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(one, toy.losses(tmp_path / "2,2,2,1"))


def test_eight_devices(toy, one_device, tmp_path):
    """Two meshes from the start, one that continues the checkpoint of another mesh."""
    shutil.copytree(one_device[1], tmp_path / "one")
    meshes = ["2,2,2,1", "4,1,1,2", "1,8,1,1:2,2,2,1"]
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, str(STEPS), *meshes],
        env=environment(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for mesh in meshes:
        assert_same(one_device[0], toy.losses(tmp_path / mesh.replace(":", "-")))
    assert done.stdout.count("continuing from the checkpoint of step 10") == 1
    wanted = {
        "params/trunk/up": "(None, 'fsdp', 'tensor')",
        "params/trunk/down": "(None, 'tensor', 'fsdp')",
        "params/trunk/scale": "(None, None)",
        "ema/trunk/up": "(None, 'fsdp', 'tensor')",
        "params/head/kernel": "('fsdp', 'tensor')",
    }
    lines = [line.split(" ", 3) for line in done.stdout.splitlines() if line.startswith("shardi")]
    found = {name: spec for _, mesh, name, spec in lines if mesh == "2,2,2,1"}
    assert {name: found.get(name) for name in wanted} == wanted
    moments = [spec for name, spec in found.items() if name.endswith("mu/head/kernel")]
    assert moments == [wanted["params/head/kernel"]]


def two_processes(tmp_path, *meshes, steps=STEPS, **more):
    """Two processes of four devices each, joined through the environment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    hosts = [
        dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i))
        for i in range(2)
    ]
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, tmp_path, str(steps), *meshes],
            env=environment(4, **host, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in hosts
    ]


def test_two_processes(toy, one_device, tmp_path):
    """2 x 4 devices: the same losses, also when continuing a run of one process."""
    shutil.copytree(one_device[1], tmp_path / "one")
    meshes = ["2,2,2,1", "8,1,1,1:one"]
    both = two_processes(tmp_path, *meshes)
    results = [p.communicate(timeout=1200) for p in both]
    assert [p.returncode for p in both] == [0, 0], results[0][1][-3000:] + results[1][1][-3000:]
    for mesh in meshes:
        assert_same(one_device[0], toy.losses(tmp_path / mesh.replace(":", "-")))


def test_two_processes_stop_together(toy, tmp_path):
    """SIGTERM to one of them: both save the same step and stop."""
    both = two_processes(tmp_path, "2,2,2,1", steps=100_000)
    rows = tmp_path / "2,2,2,1" / "metrics.jsonl"
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and not (rows.exists() and len(rows.read_text()) > 2000):
        time.sleep(0.1)
    both[1].send_signal(signal.SIGTERM)
    results = [p.communicate(timeout=1200) for p in both]
    assert [p.returncode for p in both] != [0, 0]
    saved = [int(p.name) for p in (rows.parent / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved) == max(toy.losses(rows.parent)), results[0][1][-2000:]
    assert all("stopped by SIGTERM" in err or "Preempted" in err for _, err in results), results
