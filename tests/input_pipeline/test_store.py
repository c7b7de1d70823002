"""Preparing once: two processes, a kill, a folder that cannot be written; damaged records."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from input_pipeline import examples, records, scenes, store

ROOT = Path(__file__).resolve().parents[2]

PREPARE = """
import sys
from configs.data import data_config
from input_pipeline import scenes
data = data_config(categories=("food",), scenes=300, vocab_size=512)
print(scenes.prepare(data, 32))
assert "tensorflow" not in sys.modules
"""


def start(cache: Path) -> subprocess.Popen:
    env = os.environ | {"UNIFLUD_CACHE": str(cache)}
    command = [sys.executable, "-c", PREPARE]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


def test_two_processes_prepare_one_set(tmp_path, make_config):
    processes = [start(tmp_path) for _ in range(2)]
    outputs = [p.communicate(timeout=300)[0].strip() for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    left = [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")]
    assert left == [Path(outputs[0]).name]  # no temporary folder stays
    found = examples.load(make_config().data, Path(outputs[0]), "train", 32)
    assert len(found) == 300 and not found.counts


def test_a_killed_preparation_leaves_nothing_behind(tmp_path, monkeypatch, make_config):
    process = start(tmp_path)
    while not list(tmp_path.glob(".scenes*.part")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(tmp_path.glob(".scenes*.part"))  # it was in the middle
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]
    monkeypatch.setenv("UNIFLUD_CACHE", str(tmp_path))
    data = make_config(scenes=300).data
    path = scenes.prepare(data, 32)
    assert path.is_dir() and not list(tmp_path.glob(".scenes*.part"))


def test_a_failed_preparation_leaves_nothing_behind(fresh_cache, make_config):
    def fail(path):
        path.mkdir()
        raise RuntimeError("no")

    data = make_config().data
    with pytest.raises(RuntimeError, match="no"):
        store.prepare_once(data, "x", fail)
    assert [p.name for p in fresh_cache.iterdir()] == [".x.lock"]
    assert store.prepare_once(data, "x", lambda path: path.mkdir()).is_dir()


def test_where_data_lives(monkeypatch, tmp_path, make_config):
    monkeypatch.delenv("UNIFLUD_CACHE")
    data = make_config(dir=str(tmp_path / "here")).data
    assert store.data_dir(data) == tmp_path / "here"
    monkeypatch.setenv("UNIFLUD_CACHE", str(tmp_path / "there"))
    assert store.data_dir(data) == tmp_path / "there"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNIFLUD_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match="config.data.dir=.*cannot be created"):
        store.data_dir(data)


@pytest.fixture
def damaged(tmp_path, make_config):
    """A copy of the stored scenes in which the 31st training record is damaged."""
    path = tmp_path / "damaged"
    shutil.copytree(scenes.prepare(make_config().data, 32), path)
    file = next(path.glob("*train*"))
    content = bytearray(file.read_bytes())
    start = -1
    for _ in range(31):
        start = content.index(b"PNG", start + 1)
    content[start : start + 40] = bytes(b ^ 255 for b in content[start : start + 40])
    file.write_bytes(bytes(content))
    return path


def test_a_damaged_record_is_skipped_and_counted(damaged, make_config):
    found = examples.load(make_config().data, damaged, "train", 32)
    assert len(found) == 59 and found.counts == {"unreadable": 1}
    assert "train-30" not in {e.id for e in found.items}
    assert found.pictures.gather(np.arange(59)).shape == (59, 32, 32, 3)


def test_damage_past_the_limit_is_an_error(damaged, make_config):
    with pytest.raises(records.Unreadable, match="config.data.max_unreadable=0 is passed.*record"):
        examples.load(make_config(max_unreadable=0).data, damaged, "train", 32)
    file = next(damaged.glob("*train*"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(records.Unreadable, match="config.data.max_unreadable=5 is passed"):
        examples.load(make_config(max_unreadable=5).data, damaged, "train", 32)


def test_damage_while_running_is_replaced_by_the_next_record(tmp_path, make_config):
    path = tmp_path / "set"
    shutil.copytree(scenes.prepare(make_config().data, 32), path)
    found = examples.load(make_config(cache_mb=0).data, path, "train", 32)
    good = found.pictures.gather(np.arange(4))
    read = found.pictures.source.__class__.__getitem__
    broken = records.Source.__new__(records.Source)
    broken.__dict__ |= found.pictures.source.__dict__

    class Breaking:
        def __getitem__(self, index):
            if index == 1:
                raise RuntimeError("chunk hash mismatch")
            return read(broken, index)

    found.pictures.source = Breaking()
    got = found.pictures.gather(np.arange(4))
    np.testing.assert_array_equal(got[[0, 2, 3]], good[[0, 2, 3]])
    np.testing.assert_array_equal(got[1], good[2])
    assert found.counts == {"unreadable": 1}


ALL = """
import sys
import ml_collections
from configs.data import data_config
from input_pipeline import DATASETS, curate
for fields in (dict(), dict(name="images"), dict(name="text", text="captions", length=64)):
    data = data_config(categories=("food",), scenes=60, vocab_size=512, langs=("en",), **fields)
    config = ml_collections.ConfigDict(dict(batch_size=4, ramp=(), data=data))
    build = DATASETS[data.name]
    pipeline = build(config, split="train", seed=0, process_index=0, process_count=1)
    next(iter(pipeline.dataset))
    pipeline.close()
assert not [m for m in sys.modules if m.split(".")[0] in ("tensorflow", "torch")]
"""


def test_tensorflow_is_never_imported(tmp_path):
    for name in ("tensorflow", "torch"):  # found first; importing it fails
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", ALL], cwd=ROOT, env=env, check=True, timeout=300)
