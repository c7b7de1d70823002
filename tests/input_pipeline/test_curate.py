"""Curation: every reason to drop a picture, the report, and reading the result."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from configs.common import load_config
from input_pipeline import DATASETS, curate, duplicates, folder


@pytest.fixture
def dirty(tmp_path):
    """A folder with one picture per reason to drop it, and 30 good ones."""
    path = tmp_path / "dirty"
    path.mkdir()
    rng = np.random.default_rng(0)

    def save(name, image, caption="a fine caption"):
        image.save(path / name)
        if caption is not None:
            (path / name).with_suffix(".txt").write_text(caption)

    def noise(width, height):
        coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8))
        return coarse.resize((width, height), Image.Resampling.BICUBIC)

    for i in range(30):
        save(f"good{i:02}.png", noise(80, 80))
    first = Image.open(path / "good00.png")
    save("z_exact.png", first)
    save("z_near_jpeg.jpg", first)
    save("z_near_size.png", first.resize((96, 96), Image.Resampling.BICUBIC))
    save("z_small.png", noise(80, 20))
    save("z_oblong.png", noise(400, 80))
    save("z_silent.png", noise(80, 80), None)
    save("z_short.png", noise(80, 80), "x")
    save("z_long.png", noise(80, 80), "long " * 50)
    save("z_large.png", noise(300, 200))
    (path / "z_broken.jpg").write_bytes(b"\xff\xd8 broken")
    (path / "z_broken.txt").write_text("a broken picture")
    return path


@pytest.fixture
def config(dirty):
    return load_config("configs/curate.py", **{"data.path": dirty, "data.curate.max_chars": 100})


def test_every_reason(config, tmp_path):
    counts = curate.run(config, tmp_path / "out")
    assert counts == {
        "kept": 31,
        "exact duplicate": 1,
        "near duplicate": 2,
        "too small": 1,
        "too oblong": 1,
        "no fitting caption": 3,
        "unreadable": 1,
    }
    assert json.loads((tmp_path / "out" / "curation.json").read_text()) == counts
    lines = (tmp_path / "out" / "curation.jsonl").read_text().splitlines()
    rows = {row["id"]: row for row in map(json.loads, lines)}
    assert len(rows) == 40
    assert rows["z_exact.png"] == {
        "id": "z_exact.png", "kept": False, "reason": "exact duplicate", "of": "good00.png"
    }  # fmt: skip
    assert rows["z_near_jpeg.jpg"]["of"] == "good00.png"
    assert rows["good07.png"] == {"id": "good07.png", "kept": True}


def test_result_is_a_data_set(config, tmp_path, make_config, fresh_cache, take):
    curate.run(config, tmp_path / "out")
    path = str(tmp_path / "out" / "dataset")
    data = dict(source="folder", path=path, mix=dict(t2i=1.0, caption=1.0, vqa=0.0))
    small = make_config(8, **data)
    ids = {
        e.id for s in ("train", "validation", "test") for e in folder.load(small.data, s, 32).items
    }
    assert len(ids) == 31 and "z_large.png" in ids
    pipeline = DATASETS["image_text"](
        small, split="train", seed=0, process_index=0, process_count=1
    )
    (batch,) = take(pipeline, 1)
    assert batch["gen_image"].shape == (4, 32, 32, 3)
    assert pipeline.tokenizer.decode(batch["gen_tokens"][0]) == "a fine caption"


def test_running_again_replaces_the_result(config, tmp_path, dirty):
    first = curate.run(config, tmp_path / "out")
    (dirty / "good29.png").unlink()
    second = curate.run(config, tmp_path / "out")
    assert second["kept"] == first["kept"] - 1
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_large_pictures_are_shrunk(dirty, tmp_path):
    config = load_config("configs/curate.py", **{"data.path": dirty, "data.curate.size": 64})
    curate.run(config, tmp_path / "out")
    data = config.data.copy_and_resolve_references()
    data.path = str(tmp_path / "out" / "dataset")
    source = curate.records.open_source(folder.prepare(data, 64), "train")
    sizes = {Image.open(io.BytesIO(e.image)).size for _, e in source.readable(None)}
    assert sizes == {(64, 64)}


def test_nothing_kept_is_an_error(dirty, tmp_path):
    config = load_config("configs/curate.py", **{"data.path": dirty, "data.curate.min_size": 999})
    with pytest.raises(ValueError, match="config.data.curate keeps none of 40 pictures"):
        curate.run(config, tmp_path / "out")


def test_openmoji_duplicates(tmp_path):
    counts = curate.run(load_config("configs/curate.py:openmoji"), tmp_path)
    assert sum(counts.values()) == 3953 and counts["kept"] > 3000
    assert counts["exact duplicate"] > 150  # the rest of the 222 are near ones of earlier pictures


@pytest.mark.parametrize("distance", [0, 1, 4, 9])
def test_bands_miss_no_hash(distance):
    rng = np.random.default_rng(distance)
    thumbnail = np.zeros((16, 16, 3), np.int16)
    near = duplicates.NearDuplicates(distance, 0.0)
    base = int(rng.integers(2**63))
    near.add(duplicates.Fingerprint(base, thumbnail), "base")
    for flips in range(0, 14):
        value = base
        for bit in rng.permutation(64)[:flips]:
            value ^= 1 << int(bit)
        found = near.find(duplicates.Fingerprint(value, thumbnail))
        assert (found == "base") == (flips <= distance)
    assert near.find(duplicates.Fingerprint(base, thumbnail + 1)) is None
