"""Killed anywhere, the same command continues with bit-equal losses."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest

from training.checkpoint import Checkpoints
from training.data_position import read_positions, set_position
from training.preemption import Preempted


def arrays(toy, workdir):
    """{path: array} of the newest checkpoint and the fingerprints stored beside it."""
    from training.setup import prepare

    run = prepare(toy.config())
    store = Checkpoints(workdir / "checkpoints", write=False)
    state, meta = store.restore(run.plan.state)
    store.close()
    return meta["fingerprints"], state


def test_killed_at_every_kind_of_place(toy, reference, tmp_path):
    """SIGKILL before and during a save, SIGTERM in a step, SIGKILL in the last evaluation."""
    workdir = tmp_path / "run"
    arg = f"--workdir={workdir}"

    killed = toy.run(arg, TOY_FAULT='{"batch": 2, "signal": "SIGKILL"}')
    assert killed.returncode == -signal.SIGKILL and not list(workdir.glob("checkpoints/[0-9]*"))

    # Batch 4 is fetched while the save of step 4 runs in the background.
    killed = toy.run(arg, TOY_FAULT='{"batch": 4, "signal": "SIGKILL"}')
    assert killed.returncode == -signal.SIGKILL
    assert "continuing" not in killed.stdout

    stopped = toy.run(arg, TOY_FAULT='{"batch": 9, "signal": "SIGTERM"}')
    assert stopped.returncode == 128 + signal.SIGTERM
    assert stopped.stderr.splitlines()[-1].startswith("stopped by SIGTERM at step 10; the check")
    assert (workdir / "checkpoints" / "10").is_dir()

    killed = toy.run(arg, TOY_FAULT='{"eval": true, "signal": "SIGKILL"}')
    assert killed.returncode == -signal.SIGKILL
    assert "continuing from the checkpoint of step 10" in killed.stdout

    done = toy.run(arg)
    assert done.returncode == 0, done.stderr
    assert "evaluation at step 12" in done.stdout and (workdir / "eval" / "12.json").exists()

    again = toy.run(arg)
    assert again.returncode == 0
    assert again.stdout.strip().startswith("already finished: step 12 of 12")
    assert "evaluation" not in again.stdout

    assert toy.losses(workdir) == reference[1]
    assert arrays(toy, workdir)[0] == arrays(toy, reference[0])[0]
    evals = [r for r in toy.rows(workdir) if "eval/toy/mean" in r]
    assert [r["eval/toy/mean"] for r in evals] == [
        r["eval/toy/mean"] for r in toy.rows(reference[0]) if "eval/toy/mean" in r
    ]


def test_two_parts_equal_one(toy, reference, tmp_path):
    """Six steps and six more (config.steps may grow) equal twelve, dropout and EMA included."""
    args = dict(schedule__name="constant", checkpoint__every=3)
    toy.train(tmp_path / "a", steps=6, **args)
    both = toy.train(tmp_path / "a", steps=12, **args)
    assert both == toy.train(tmp_path / "b", steps=12, **args)


def _after(condition, signum):
    """Send this process a signal once condition() holds."""

    def wait():
        while not condition():
            time.sleep(0.02)
        os.kill(os.getpid(), signum)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stop_inside_an_evaluation(toy, tmp_path, signum):
    """The evaluation is left at once, the state of its step saved, the evaluation made later."""
    args = dict(steps=8, eval_every=6, checkpoint__every=100)
    before = signal.getsignal(signum)
    _after((tmp_path / "eval-started").exists, signum)
    with pytest.raises(Preempted) as stopped:
        toy.train(tmp_path, **args, data__eval_seconds=200.0)
    assert stopped.value.code == 128 + signum
    assert signal.getsignal(signum) is before
    assert (tmp_path / "checkpoints/6").is_dir() and not (tmp_path / "eval").exists()
    with pytest.raises(ValueError, match=r"data.eval_seconds=0.0 \(checkpoint: 200.0\)"):
        toy.train(tmp_path, **args)
    meta = tmp_path / "checkpoints/6/meta/metadata"
    meta.write_text(meta.read_text().replace("200.0", "0.0"))
    toy.train(tmp_path, **args)
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == ["6.json", "8.json"]


def test_rows_after_the_checkpoint_are_dropped(toy, reference, tmp_path):
    """A run that got further than its checkpoint leaves no double or stale rows."""
    toy.train(tmp_path, steps=8)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"step": 9, "train/loss": -1.0}) + "\n")
        file.write('{"step": 10, "train/lo')  # a row cut short by a kill
    again = toy.train(tmp_path, steps=8)
    assert sorted(again) == list(range(1, 9)) and -1.0 not in again.values()


def test_iterator_position_is_part_of_the_checkpoint(toy, tmp_path):
    """The first batch after a resume is the one that would have come next."""
    from input_pipeline import DATASETS

    toy.train(tmp_path, steps=5, checkpoint__every=5)
    config = toy.config(steps=5)
    make = lambda: iter(DATASETS["toy"](  # noqa: E731
        config, split="train", seed=0, process_index=0, process_count=1).dataset)  # fmt: skip
    fresh, restored = make(), make()
    for _ in range(5):
        next(fresh)
    set_position(restored, read_positions(tmp_path / "checkpoints/5/data"))
    np.testing.assert_array_equal(next(fresh)["x"], next(restored)["x"])
