"""Crops of photographs: same every time, no photograph in two splits, sizes, the missing extra."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from configs.data import data_config
from input_pipeline import photos, sources
from input_pipeline.examples import Decoded, Examples, concatenate
from input_pipeline.records import Example


def test_splits_share_no_photograph():
    names = [name for split in photos.FILES.values() for name in split]
    assert len(names) == len(set(names)) == 16


def test_crops_are_squares_of_every_size_and_the_same_every_time(tmp_path):
    ramp = np.linspace(0, 255, 300).astype(np.uint8)
    picture = np.stack([np.tile(ramp, (200, 1))] * 3, -1)  # brightness = column
    Image.fromarray(picture).save(tmp_path / "ramp.png")
    found = photos.crops(tmp_path / "ramp.png", 16, 200)
    assert found.shape == (200, 16, 16, 3)
    np.testing.assert_array_equal(found, photos.crops(tmp_path / "ramp.png", 16, 200))
    width = (found[:, 0, -1, 0].astype(int) - found[:, 0, 0, 0]) * 299 / 255 * 16 / 15
    assert width.min() < 25 and 150 < width.max() < 205  # from 16 to all 200 rows
    middle = found[:, :, 7:9].mean((1, 2, 3))
    assert middle.min() < 60 and middle.max() > 195


def test_the_shipped_photographs():
    pytest.importorskip("skimage")
    data = data_config(source="photos")
    train, test = (sources.load(data, split, 32) for split in ("train", "test"))
    assert len(train) == 3000 and len(test) == 192
    picture = test.pictures.gather(np.arange(len(test)))
    assert picture.std((1, 2, 3)).min() > 1  # none of them blank


def test_part_of_several_sets():
    """Examples chosen from a chain are the chosen ones of each set, with their own pictures."""
    parts = [
        Examples([Example(f"{p}{i}", None, {}) for i in range(n)], Decoded(pictures), {})
        for p, n, pictures in (
            ("a", 5, np.arange(5, dtype=np.uint8)[:, None, None, None]),
            ("b", 0, np.zeros((0, 1, 1, 1), np.uint8)),
            ("c", 4, np.arange(10, 14, dtype=np.uint8)[:, None, None, None]),
        )
    ]
    wanted = {"a1": 1, "a4": 4, "c0": 10, "c3": 13}
    some = concatenate(parts).where(lambda e: e.id in wanted)
    assert [e.id for e in some.items] == list(wanted)
    assert some.pictures.gather(np.arange(4)).ravel().tolist() == list(wanted.values())
    assert some.where(lambda e: e.id == "c3").pictures.gather(np.array([0])).item() == 13


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    photos._load.cache_clear()
    with pytest.raises(ValueError, match=r"'photos' needs pip install -e '\.\[photos\]'"):
        sources.load(data_config(source="photos"), "train", 16)
