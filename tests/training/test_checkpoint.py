"""Checkpoints under damage: truncated, flipped, missing, full disk, read-only, wrong config."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.checkpoint import Checkpoints
from training.data_position import read_positions, set_position
from training.fingerprint import fingerprints
from training.frozen import load_frozen, save_frozen


def make_state(step):
    """A state with a large array, a bfloat16 one, integers and named tuples."""
    kernel = jnp.arange(40_000, dtype=jnp.float32).reshape(200, 200) * (step + 1) / 7
    half = jnp.linspace(0, step, 33).astype(jnp.bfloat16)
    return dict(params=dict(kernel=kernel, half=half), opt=(jnp.int32(step),), step=jnp.int32(step))


def like(state):
    """What restore asks for."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def iterator():
    """An endless grain iterator."""
    return iter(grain.MapDataset.range(100).repeat().to_iter_dataset())


@pytest.fixture
def three(tmp_path):
    """A folder with the checkpoints of steps 1, 2 and 3."""
    store, it = Checkpoints(tmp_path / "checkpoints", keep=5), iterator()
    for step in (1, 2, 3):
        next(it)
        store.save(step, make_state(step), it, {"config": {}})
    store.close()
    return tmp_path / "checkpoints"


def newest(folder):
    """(step, state, data position) that a start would use."""
    store, it = Checkpoints(folder), iterator()
    state, meta = store.restore(like(make_state(0)), it)
    store.close()
    return meta["step"], state, next(it)


def biggest(folder):
    """The file with the most bytes: array contents."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_round_trip(three):
    step, state, position = newest(three)
    assert step == 3 and position == 3
    jax.tree.map(np.testing.assert_array_equal, state, make_state(3))


def test_save_while_saving_and_retention(tmp_path):
    """Saves queue up in order; the newest two and every fourth stay."""
    store, it = Checkpoints(tmp_path, keep=2, keep_every=4), iterator()
    for step in range(1, 11):
        store.save(step, make_state(step), it, {})
    store.wait()
    assert store.steps == [4, 8, 9, 10]
    store.save(10, make_state(10), it, {}, wait=True)  # again: nothing to do
    store.close()
    assert newest(tmp_path)[0] == 10


def truncate(folder):
    path = biggest(folder)
    os.truncate(path, path.stat().st_size // 2)


def flip(folder):
    """One bit: the file still decodes, only the fingerprint can tell."""
    path = biggest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def no_meta(folder):
    (folder / "meta" / "metadata").write_text('{"step": 3, "finger')


def no_arrays(folder):
    shutil.rmtree(folder / "state" / "d")


def no_position(folder):
    next((folder / "data").glob("process_*")).write_text("{")


@pytest.mark.parametrize("damage", [truncate, flip, empty, no_meta, no_arrays, no_position])
def test_damaged_newest_is_reported_and_the_one_before_used(three, damage, capsys):
    damage(three / "3")
    step, state, position = newest(three)
    assert step == 2 and position == 2
    jax.tree.map(np.testing.assert_array_equal, state, make_state(2))
    assert "the checkpoint of step 3 is damaged" in capsys.readouterr().out
    assert sorted(p.name for p in three.iterdir()) == ["1", "2", "damaged-3"]
    store = Checkpoints(three)
    store.save(3, make_state(3), iterator(), {"config": {}}, wait=True)  # its step is free again
    store.close()
    assert newest(three)[0] == 3


def test_all_damaged_is_an_error(three):
    for step in "123":
        truncate(three / step)
    with pytest.raises(OSError, match="step 1 in .* cannot be read.*no other is left"):
        newest(three)


def test_half_written_checkpoint_is_no_checkpoint(three):
    """What a kill leaves behind (a temporary folder) is ignored and cleaned."""
    shutil.copytree(three / "3", three / "4.orbax-checkpoint-tmp-1")
    assert newest(three)[0] == 3
    assert sorted(p.name for p in three.iterdir()) == ["1", "2", "3"]


def test_missing_step_names_what_is_there(three):
    store = Checkpoints(three, write=False)
    with pytest.raises(FileNotFoundError, match=r"--step=7 .* allowed: \[1, 2, 3\]"):
        store.restore(like(make_state(0)), step=7)
    with pytest.raises(ValueError, match="has no 'params/extra'"):
        store.restore(dict(params=dict(extra=like(make_state(0))["step"])))
    store.close()


def test_disk_limit_keeps_the_last_checkpoint(three):
    """A real failing write: files may not grow past 8 kB."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = Checkpoints(three, keep=1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, old[1]))
        with pytest.raises(OSError, match=r"step 4 could not be saved in .* \(step 3 is kept\)"):
            store.save(4, make_state(4), iterator(), {}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    store.close()
    assert newest(three)[0] == 3


FULL_DISK = """
mount -t tmpfs -o size=3m none {there} && {command}; code=$?
cp -r {there} {kept}; exit $code
"""


def test_full_disk(toy, reference, tmp_path):
    """A file system without room: one line, the last checkpoint kept, continued elsewhere."""
    there, kept = tmp_path / "small", tmp_path / "kept"
    there.mkdir()
    mounts = ["unshare", "-rm", "sh", "-c"]
    can = subprocess.run([*mounts, f"mount -t tmpfs none {there}"], capture_output=True)
    if can.returncode:
        pytest.skip("this user may not mount a small file system; RLIMIT_FSIZE is tested above")
    fault = dict(batch=6, fill=str(there / "filler"), after=str(there / "run/checkpoints/4"))
    command = " ".join(f"'{a}'" for a in toy.command(f"--workdir={there / 'run'}"))
    script = FULL_DISK.format(there=there, command=command, kept=kept)
    done = subprocess.run(
        [*mounts, script],
        env=os.environ | {"TOY_FAULT": json.dumps(fault)},
        capture_output=True,
        text=True,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: ") and "No space left" in last, last
    assert "Traceback" not in done.stderr
    assert [p.name for p in (kept / "run/checkpoints").glob("[0-9]*") if p.name.isdigit()] == ["4"]
    assert toy.train(kept / "run") == reference[1]


def test_read_only_workdir(toy, tmp_path):
    (tmp_path / "file").touch()
    places = [tmp_path / "file" / "run"]
    if sys.platform == "linux":
        places.append("/sys/uniflud")  # refuses even root
    for place in places:
        with pytest.raises(OSError, match=f"--workdir={place} cannot be written"):
            toy.train(place)


def test_two_processes_cannot_share_a_workdir(toy, tmp_path):
    from training.workdir import claim

    with claim(tmp_path), pytest.raises(ValueError, match="is in use by another process"):
        toy.train(tmp_path)


def test_config_mismatch_lists_the_keys(toy, reference):
    """What changes the result must match; what does not (evals, mesh, ...) may change."""
    with pytest.raises(ValueError) as wrong:
        toy.train(reference[0], optimizer__lr=0.5, model__dropout=0.0, log_every=7)
    assert "model.dropout=0.0 (checkpoint: 0.2), optimizer.lr=0.5 (checkpoint: 0.01)" in str(
        wrong.value
    )
    assert "log_every" not in str(wrong.value) and "\n" not in str(wrong.value)
    toy.train(reference[0], log_every=7)


def test_fingerprints_see_every_change():
    a = np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32)
    base = fingerprints(dict(a=jnp.asarray(a)))
    b = a.copy()
    b[3, 4] = np.nextafter(b[3, 4], 9)
    swapped = a[::-1].copy()
    assert base != fingerprints(dict(a=jnp.asarray(b)))
    assert base != fingerprints(dict(a=jnp.asarray(swapped)))
    assert base == fingerprints(dict(a=jnp.asarray(a.copy())))
    assert fingerprints({}) == {}
    with pytest.raises(ValueError, match="cannot be saved"):
        fingerprints(dict(a=jnp.zeros(2, jnp.complex64)))


def test_data_position_with_other_host_counts(tmp_path):
    """Equal places continue on any number of hosts; unequal ones are refused."""
    for i in range(4):
        (tmp_path / f"process_{i}-of-4.json").write_text('{"next_index": 5}')
    it = iterator()
    set_position(it, read_positions(tmp_path))
    assert next(it) == 5
    (tmp_path / "process_3-of-4.json").write_text('{"next_index": 6}')
    with pytest.raises(ValueError, match="4 hosts at different places"):
        set_position(it, read_positions(tmp_path))


def test_frozen_is_stored_once_by_contents(tmp_path):
    frozen = dict(params=dict(vae=jnp.arange(5.0)))
    name = save_frozen(tmp_path, frozen)
    assert save_frozen(tmp_path, frozen) == name
    other = save_frozen(tmp_path, dict(params=dict(vae=jnp.arange(5.0) + 1)))
    assert sorted(p.name for p in (tmp_path / "frozen").iterdir()) == sorted([name, other])
    back = load_frozen(tmp_path, name, like(frozen))
    np.testing.assert_array_equal(back["params"]["vae"], np.arange(5.0))
    assert save_frozen(tmp_path, {}) == "" and load_frozen(tmp_path, "", {}) == {}
    shutil.rmtree(tmp_path / "frozen" / name)
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_frozen(tmp_path, name, like(frozen))
