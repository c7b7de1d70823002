"""Prepared data is kept between test runs, in a folder that changes with the code that makes it."""

import hashlib
import shutil
import tempfile
import time
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from PIL import Image

from configs.data import data_config

ROOT = Path(__file__).resolve().parents[2]


def cache_dir() -> Path:
    digest = hashlib.sha256()
    for path in sorted((ROOT / "input_pipeline").glob("*.py")):
        digest.update(path.read_bytes())
    return Path(tempfile.gettempdir()) / f"uniflud-test-data-{digest.hexdigest()[:12]}"


@pytest.fixture(autouse=True, scope="session")
def _forget_old_data():
    """Removes what earlier versions of the code prepared, a day after its last use."""
    for path in Path(tempfile.gettempdir()).glob("uniflud-test-data-*"):
        if path.stat().st_mtime < time.time() - 86_400:
            shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    """UNIFLUD_CACHE points to the shared folder."""
    path = cache_dir()
    monkeypatch.setenv("UNIFLUD_CACHE", str(path))
    return path


@pytest.fixture
def fresh_cache(monkeypatch, tmp_path):
    """UNIFLUD_CACHE points to an empty folder."""
    path = tmp_path / "cache"
    monkeypatch.setenv("UNIFLUD_CACHE", str(path))
    return path


@pytest.fixture
def make_config():
    """make_config(batch_size, **fields of config.data): small, food glyphs and 60 scenes."""

    def make(batch_size: int = 16, **fields) -> ml_collections.ConfigDict:
        small = dict(categories=("food",), scenes=60, vocab_size=512, prefetch=0)
        return ml_collections.ConfigDict(
            dict(batch_size=batch_size, ramp=(), seed=0, data=data_config(**small | fields))
        )

    return make


@pytest.fixture
def pictures(tmp_path):
    """A folder of 40 distinct pictures, a caption beside each, some of them rectangular."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(40):
        height, width = (48, 48) if i % 2 else (40, 80)
        coarse = rng.integers(0, 255, (4, 4, 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        suffix = ("png", "jpg", "webp")[i % 3]
        path = folder / ("more" if i % 5 == 0 else "") / f"p{i:02}.{suffix}"
        image.save(path)
        path.with_suffix(".txt").write_text(f"picture number {i}\n")
    return folder


def batches(pipeline, count: int) -> list[dict]:
    """The first batches of a pipeline."""
    iterator = iter(pipeline.dataset)
    out = [next(iterator) for _ in range(count)]
    pipeline.close()
    return out


@pytest.fixture
def take():
    return batches
