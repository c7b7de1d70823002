"""What evaluators ask of the data: splits without leaks, fixed choices, padded batches."""

import numpy as np

from eval import common, data
from input_pipeline.examples import Decoded, Examples
from input_pipeline.records import Example


def examples_of(groups, lang="en"):
    items = [Example(str(i), None, {lang: f"name {i}"}, group=g) for i, g in enumerate(groups)]
    images = np.arange(len(groups), dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    return Examples(items, Decoded(images), {})


def test_held_out_pictures_that_equal_training_pictures_are_left_out(config, monkeypatch):
    splits = {"train": examples_of([1, 2, 3]), "test": examples_of([2, 7, -1])}
    monkeypatch.setitem(data.sources.LOADERS, "folder", lambda _, split, size: splits[split])
    held_out = data.captioned(config, "held_out", 8)
    assert [e.group for e in held_out.items] == [7, -1]
    assert held_out.pictures.gather(np.array([0])).ravel().tolist() == [1, 1, 1]
    assert len(data.captioned(config, "train", 8)) == 3


def test_right_names_join_all_splits(config, monkeypatch):
    splits = {"train": examples_of([1, 2]), "test": examples_of([2], "de")}
    splits["validation"] = examples_of([])
    monkeypatch.setitem(data.sources.LOADERS, "folder", lambda _, split, size: splits[split])
    assert data.right_names(config)[2] == {"en": {"name 1"}, "de": {"name 0"}}


def test_one_per_group_is_fixed_by_the_seed():
    examples = examples_of([1, 1, 2, 2, 3, -1, -1])
    rows = data.one_per_group(examples, 10, seed=1)
    groups = [data.group_of(examples, r) for r in rows]
    assert len(groups) == len(set(groups)) == 5  # pictures without a group stand alone
    np.testing.assert_array_equal(rows, data.one_per_group(examples, 10, seed=1))
    assert len(data.one_per_group(examples, 2, seed=1)) == 2


def test_padded_batches_have_one_shape_and_drop_nothing():
    parts = list(common.padded(10, 4))
    assert [real for _, real in parts] == [4, 4, 2]
    assert parts[-1][0].tolist() == [8, 9, 9, 9]
    squares = common.in_batches(lambda x: x**2, 10, 4, lambda i: i)
    np.testing.assert_array_equal(squares, np.arange(10) ** 2)


def test_pixels_round_trip():
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(common.to_uint8(common.to_float(values)), values)
    assert common.to_uint8(np.array([-3.0, 3.0])).tolist() == [0, 255]


def test_generated_ids_end_at_eos(config):
    tok = data.tokenizer(config)
    ids = [*tok.encode("thing 7"), tok.eos, *tok.encode("thing 8")]
    assert data.texts_of(config, np.array([ids])) == ["thing 7"]


def test_rows_of_a_log_that_was_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "tra')
    assert common.read_rows(path) == [{"step": 1, "train/loss": 2.0}]
    assert common.read_rows(tmp_path / "absent") == []


def test_the_shipped_classifier_serves_its_picture_size_only(config):
    assert data.classifier_features(config) is None  # 8 px
    config.data.image_size = 32
    images = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    vectors = np.asarray(data.classifier_features(config)(images))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    assert abs(vectors[0] @ vectors[1]) < 0.999999
