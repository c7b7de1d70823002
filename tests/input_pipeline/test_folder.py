"""The user's own pictures: captions from .txt and jsonl, broken files, changes."""

import json

import numpy as np
import pytest
from PIL import Image

from input_pipeline import DATASETS, folder, openmoji, records


@pytest.fixture
def config(make_config, pictures, fresh_cache):
    return make_config(
        8, source="folder", path=str(pictures), mix=dict(t2i=1.0, caption=1.0, vqa=0.0)
    )


def build(config, name="image_text"):
    return DATASETS[name](config, split="train", seed=0, process_index=0, process_count=1)


def everything(data):
    return {
        e.id: e for s in ("train", "validation", "test") for e in folder.load(data, s, 32).items
    }


def test_txt_beside_each_picture(config, take):
    found = everything(config.data)
    assert len(found) == 40
    assert found["more/p05.webp"].captions == {"en": "picture number 5"}
    for split in ("train", "validation", "test"):
        items = folder.load(config.data, split, 32).items
        assert all(openmoji.split_of(e.id) == split for e in items)
    pipeline = build(config)
    (batch,) = take(pipeline, 1)
    assert batch["gen_image"].shape == (4, 32, 32, 3)
    assert pipeline.tokenizer.decode(batch["gen_tokens"][0]).startswith("picture number ")
    question = pipeline.tokenizer.decode(batch["und_tokens"][0])
    assert question.startswith("caption en\n picture number ")


def test_jsonl(config, pictures, take):
    rows = [
        {"file": "p01.jpg", "caption": "one", "split": "train"},
        {"file": "p02.webp", "caption": {"en": "two", "de": "zwei"}, "split": "train"},
        {
            "file": "p03.png",
            "caption": "three",
            "split": "test",
            "questions": [{"question": "how many?", "answer": "3", "kind": "count"}],
        },
    ]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    (pictures / "captions.jsonl").write_text(lines)
    config.data.mix.vqa = 1.0
    found = everything(config.data)
    assert set(found) == {"p01.jpg", "p02.webp", "p03.png"}
    assert found["p02.webp"].captions == {"en": "two", "de": "zwei"}
    assert found["p03.png"].questions == (("count", "how many?", "3"),)
    assert len(folder.load(config.data, "train", 32)) == 2
    with pytest.raises(ValueError, match="config.data.mix.vqa=1.0 .* no question"):
        build(config)


@pytest.mark.parametrize("line", ["{", '{"caption": "x"}', '{"file": "a", "caption": 3}', "[1]"])
def test_bad_jsonl_names_the_line(config, pictures, line):
    (pictures / "captions.jsonl").write_text('{"file": "p01.jpg", "caption": "one"}\n' + line)
    with pytest.raises(ValueError, match="config.data.path: line 2 of .*captions.jsonl"):
        build(config)


def test_tux_paint_captions():
    text = "A pink flamingo.\n\nde.utf8=Ein rosa Flamingo.\npt_BR.utf8=Um flamingo.\n"
    assert folder.parse_txt(text) == {
        "en": "A pink flamingo.", "de": "Ein rosa Flamingo.", "pt": "Um flamingo."
    }  # fmt: skip
    assert folder.parse_txt("two\nlines") == {"en": "two lines"} and folder.parse_txt(" \n") == {}


def _break(folder_path):
    (folder_path / "p01.jpg").write_bytes(b"not a picture")
    whole = (folder_path / "p03.png").read_bytes()
    (folder_path / "p03.png").write_bytes(whole[: len(whole) // 2])
    (folder_path / "p04.jpg").write_bytes(b"")


def test_broken_files_are_skipped_counted_and_named(config, pictures, caplog):
    _break(pictures)
    config.data.max_unreadable = 3
    with caplog.at_level("WARNING"):
        pipeline = build(config)
    assert pipeline.counts["unreadable"] == 3
    assert {"p01.jpg", "p03.png", "p04.jpg"} <= set(caplog.text.replace(":", " ").split())
    assert len(everything(config.data)) == 37
    assert build(config).counts["unreadable"] == 3  # also when the set is already prepared


def test_too_many_broken_files_are_an_error(config, pictures):
    _break(pictures)
    config.data.max_unreadable = 2
    with pytest.raises(records.Unreadable, match="config.data.max_unreadable=2 is passed.*p01.jpg"):
        build(config)


def test_changes_in_the_folder_are_seen(config, pictures):
    first = folder.prepare(config.data, 32)
    folder._scanned.cache_clear()  # a new process
    assert folder.prepare(config.data, 32) == first
    (pictures / "p01.txt").write_text("another caption, longer")
    folder._scanned.cache_clear()
    second = folder.prepare(config.data, 32)
    assert second != first
    Image.new("RGB", (50, 50), (1, 2, 3)).save(pictures / "p02.webp")
    folder._scanned.cache_clear()
    assert folder.prepare(config.data, 32) not in (first, second)


def test_pictures_without_captions_serve_images_only(config, pictures, take):
    for text in pictures.rglob("*.txt"):
        text.unlink()
    (batch,) = take(build(config, "images"), 1)
    assert batch["image"].shape == (8, 32, 32, 3)
    with pytest.raises(ValueError, match="config.data.mix.t2i=1.0 .* no captioned picture"):
        build(config)


def test_labels_of_own_pictures_are_their_numbers(config, take):
    pipeline = build(config, "images")
    found = folder.load(config.data, "train", 32)
    (batch,) = take(pipeline, 1)
    stored = found.pictures.gather(batch["label"])
    np.testing.assert_array_equal(batch["image"], stored)
    assert pipeline.classes == len(found)


def test_missing_and_empty_folders_are_explained(make_config, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.data.path='' is not a folder"):
        build(make_config(source="folder"))
    with pytest.raises(ValueError, match="holds no picture"):
        build(make_config(source="folder", path=str(tmp_path)))


@pytest.fixture
def wide_and_tall(tmp_path):
    """31 pictures 80 high or wide, whose red is their number; every third is square."""
    rows = []
    for i in range(31):
        sides = ((80, 80), (80, 120), (120, 80))[i % 3]  # (w, h)
        Image.new("RGB", sides, (8 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"file": f"{i}.png", "caption": f"picture {i}", "split": "train"})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_shapes_share_one_pass_over_the_headers(make_config, wide_and_tall, monkeypatch):
    """Every picture is read once for its shape and once for itself, however many shapes there
    are."""
    shapes = ((32, 32), (48, 32), (32, 48), (32, 64), (64, 32))
    read, item = [], records.Source.__getitem__
    mix = dict(t2i=1.0, caption=0.0, vqa=0.0)
    c = make_config(4, source="folder", path=str(wide_and_tall), mix=mix, shapes=shapes)
    monkeypatch.setattr(
        records.Source, "__getitem__", lambda self, i: (read.append(i), item(self, i))[1]
    )
    found = [len(folder.load(c.data, "train", shape)) for shape in shapes]
    assert found == [11, 10, 10, 0, 0] and sorted(read) == sorted([*range(31), *range(31)])


def test_one_shape_a_batch_and_every_picture_in_a_round(make_config, wide_and_tall, take):
    shapes = ((32, 32), (48, 32), (32, 48))
    mix = dict(t2i=1.0, caption=0.0, vqa=0.0)
    c = make_config(4, source="folder", path=str(wide_and_tall), mix=mix, shapes=shapes)
    pipeline = build(c)
    round_of = -(-11 // 4) + 2 * -(-10 // 4)  # batches
    seen = []
    for batch in take(pipeline, round_of):
        shape, numbers = batch["gen_image"].shape[1:3], batch["gen_image"][:, 0, 0, 0] / 8
        np.testing.assert_array_equal(numbers % 3, shapes.index(shape))  # none in a foreign shape
        for tokens, length, number in zip(batch["gen_tokens"], batch["gen_length"], numbers):
            said = pipeline.tokenizer.decode(tokens[:length])
            assert said.strip() == f"picture {number:g}"
        seen += numbers.tolist()
    assert set(seen) == set(range(31)) and len(seen) == 4 * round_of
    halves = [
        DATASETS["image_text"](c, split="train", seed=0, process_index=i, process_count=2)
        for i in range(2)
    ]
    for one, first, second in zip(take(build(c), 5), *(take(half, 5) for half in halves)):
        both = np.concatenate([first["gen_image"], second["gen_image"]])
        np.testing.assert_array_equal(one["gen_image"], both)
    assert c.data.image_size == 32 and len(folder.load(c.data, "train", 32)) == 31  # squares still


def test_shapes_are_for_folders(make_config):
    c = make_config(4, mix=dict(t2i=1.0, caption=0.0, vqa=0.0), shapes=((32, 32), (48, 32)))
    with pytest.raises(ValueError, match="config.data.shapes: source 'openmoji.*squares only"):
        build(c)
