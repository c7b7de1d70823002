"""UniFluid's acceptance checks 10 to 12 (unifluid.md section 9): the command a user types."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
QUIET = ("--config.log_every=1", "--config.evals=()", "--config.sample.prompts=()")


def start(workdir, *flags, devices: int = 1) -> subprocess.Popen:
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    if devices > 1:
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "main.py", "--config=configs/uniflud.py:debug"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process) -> str:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return output


def losses(workdir) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Losses of 20 uninterrupted steps on one device."""
    workdir = tmp_path_factory.mktemp("whole")
    finish(start(workdir, *QUIET))
    found = losses(workdir)
    assert sorted(found) == list(range(1, 21))
    return found


def test_check_10_killed_run_continues_exactly(whole, tmp_path):
    """SIGKILL between two checkpoints; the same command ends with the same losses."""
    flags = (*QUIET, "--config.checkpoint.every=5")
    process = start(tmp_path, *flags)
    deadline = time.monotonic() + 400
    while not (tmp_path / "checkpoints" / "10").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    output = finish(start(tmp_path, *flags))
    assert "continuing from the checkpoint of step" in output
    assert losses(tmp_path) == whole


def test_check_11_mesh_gives_the_same_losses(whole, tmp_path):
    """Data 4 x tensor 2 on eight virtual devices: 20 losses agree to 1e-5."""
    mesh = ("--config.mesh.data=4", "--config.mesh.tensor=2")
    finish(start(tmp_path, *QUIET, *mesh, devices=8))
    found = losses(tmp_path)
    for step, loss in whole.items():
        assert abs(found[step] - loss) < 1e-5 * max(1.0, abs(loss)), step


def test_check_12_train_eval_sample(tmp_path):
    """One command trains, evaluates, draws; then sample mode draws and answers."""
    from PIL import Image

    finish(start(tmp_path))
    results = json.loads((tmp_path / "eval" / "20.json").read_text())
    assert {"captioning/train_loss", "questions/accuracy"} <= results.keys()
    assert 0 <= results["retrieval/train_top1_latent"] <= 1
    sheet = np.asarray(Image.open(tmp_path / "samples" / "generated-20.png"))
    assert sheet.ndim == 3 and sheet.std() > 10

    finish(start(tmp_path, "--mode=sample", "--prompt=red apple", "--prompt=ピザ"))
    picture = np.asarray(Image.open(tmp_path / "samples" / "sample-20-1.png"))
    assert picture.shape == (32, 32, 3)
    source = tmp_path / "samples" / "sample-20-0.png"
    output = finish(start(tmp_path, "--mode=sample", f"--image={source}", "--prompt=caption en"))
    assert f"{source}\tcaption en\t" in output
