"""Safetensors files are untrusted: each malformed header ends in one line, before any read."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from export.files import load_safetensors, read_header, save_safetensors


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ATTACKS = {
    "empty": (b"", b"", 0, "not valid JSON"),
    "header longer than the file": ({"a": entry()}, bytes(8), 10**6, "truncated, header of"),
    "oversized header": ({"a": entry()}, bytes(8), 2**63, "at most"),
    "truncated data": ({"a": entry()}, bytes(7), None, "truncated, 'a' ends at byte 8 of 7"),
    "trailing data": ({"a": entry()}, bytes(9), None, "1 bytes after the last tensor"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), None, "'a' and 'b'"),
    "same bytes twice": ({"a": entry(), "b": entry()}, bytes(8), None, "overlap"),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), None, "4 unused bytes"),
    "unknown dtype": ({"a": entry("F33")}, bytes(8), None, "dtype 'F33'; allowed: F64"),
    "unhashable dtype": ({"a": entry([])}, bytes(8), None, r"dtype \[\]"),
    "wrong byte count": ({"a": entry(shape=(3,))}, bytes(8), None, "8 bytes for shape"),
    "huge shape": ({"a": entry(shape=(2**40, 2**40))}, bytes(8), None, "8 bytes for shape"),
    "negative shape": ({"a": entry(shape=(-1, -2))}, bytes(8), None, "has shape"),
    "boolean shape": ({"a": entry(shape=(True, 2))}, bytes(8), None, "has shape"),
    "negative offsets": ({"a": entry(offsets=(-8, 0))}, bytes(8), None, "data_offsets"),
    "three offsets": ({"a": entry(offsets=(0, 8, 8))}, bytes(8), None, "data_offsets"),
    "no shape": ({"a": {"dtype": "F32"}}, bytes(8), None, "lacks dtype, shape"),
    "a list": ([1, 2], b"", None, "not a JSON object"),
    "a name twice": (
        b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}",
        bytes(8), None, "occurs twice",
    ),
    "nested too deep": (b"[" * 100_000, b"", None, "not valid JSON"),
    "not UTF-8": (b"\xff\xfe{}", b"", None, "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_malformed_headers(tmp_path, name):
    header, data, length, message = ATTACKS[name]
    path = write(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(ValueError, match=message) as caught:
        load_safetensors(path)
    assert "\n" not in str(caught.value) and "x.safetensors" in str(caught.value)


def test_too_short_missing_and_other_formats(tmp_path):
    (tmp_path / "s.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="3 bytes are too few"):
        load_safetensors(tmp_path / "s.safetensors")
    with pytest.raises(FileNotFoundError, match="no such"):
        load_safetensors(tmp_path / "absent.safetensors")
    (tmp_path / "p.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="no other weight format"):
        load_safetensors(tmp_path / "p.bin")


def test_every_truncation_of_a_good_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors(path, {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.int8)})
    good = path.read_bytes()
    for cut in range(len(good)):
        path.write_bytes(good[:cut])
        with pytest.raises(ValueError):
            load_safetensors(path)


def test_views_scalars_and_empty_tensors(tmp_path):
    tensors = {
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "scalar": np.float32(3.0),
        "empty": np.zeros((0, 4), np.float32),
        "bf16": np.arange(4).astype(ml_dtypes.bfloat16),
        "flag": np.array([True, False]),
    }
    save_safetensors(tmp_path / "x.safetensors", tensors, {"step": "7"})
    loaded = load_safetensors(tmp_path / "x.safetensors")
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
        np.testing.assert_array_equal(loaded[name], value)
    assert not loaded["transposed"].flags.writeable
    assert read_header(tmp_path / "x.safetensors")[0].keys() == tensors.keys()


def test_others_may_read_a_file_where_the_umask_lets_them(tmp_path):
    other = tmp_path / "written.txt"
    other.touch()
    for _ in range(2):  # the second replaces the first
        save_safetensors(tmp_path / "x.safetensors", {"a": np.ones(2, np.float32)})
        assert (tmp_path / "x.safetensors").stat().st_mode == other.stat().st_mode


def sharded(tmp_path, where):
    save_safetensors(tmp_path / "one.safetensors", {"a": np.ones(2, np.float32)})
    save_safetensors(tmp_path / "two.safetensors", {"b": np.zeros(3, np.float32)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tmp_path


def test_sharded_folder(tmp_path):
    folder = sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert {k: v.shape for k, v in load_safetensors(folder).items()} == {"a": (2,), "b": (3,)}


@pytest.mark.parametrize(
    "where, message",
    [
        ({"a": "../one.safetensors"}, "not a plain file name"),
        ({"a": "/etc/passwd"}, "not a plain file name"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "does not list 'b'"),
        ({"a": "one.safetensors", "z": "one.safetensors"}, "1 tensors are in no shard"),
        ({"a": 3}, "not a plain file name"),
        ({"a": []}, "weight_map"),
        ([], "weight_map"),
    ],
)
def test_bad_index(tmp_path, where, message):
    with pytest.raises(ValueError, match=message):
        load_safetensors(sharded(tmp_path, where))


def test_folder_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither"):
        load_safetensors(tmp_path)
    save_safetensors(tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)})
    assert load_safetensors(tmp_path).keys() == {"a"}
