"""Safetensors files and sharded Hugging Face folders, read as untrusted input.

The header is checked against the size of the file before any tensor is touched: nothing is
allocated on the word of a file.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes; the limit of the format's own reader
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def save_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: dict | None = None
) -> None:
    """Writes {name: array} to one file, whole or not at all. metadata holds strings."""
    path = Path(path)
    # The library writes the raw buffer of a view: a transpose must be copied first.
    dense = {name: np.require(value, requirements="C") for name, value in tensors.items()}
    partial = path.with_name(path.name + ".partial")
    partial.touch()
    mode = partial.stat().st_mode  # the user's umask; the library's files are for the owner alone
    safetensors.numpy.save_file(dense, partial, metadata={"format": "pt", **(metadata or {})})
    partial.chmod(mode)
    os.replace(partial, path)


def load_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a .safetensors file or a folder that holds one (or an index of several shards).

    Arrays are read-only views of the mapped file: bytes are read when they are used.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such safetensors file or folder")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: not a .safetensors file; no other weight format is read")
    entries, start = read_header(path)
    data = np.memmap(path, np.uint8, mode="r", offset=start) if entries else np.zeros(0, np.uint8)
    return {
        name: data[begin:end].view(dtype).reshape(shape)
        for name, (dtype, shape, begin, end) in entries.items()
    }


def read_header(path: str | os.PathLike) -> tuple[dict[str, tuple], int]:
    """Returns ({name: (dtype, shape, begin, end)}, byte where the data start), all checked."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise ValueError(f"{path}: truncated, {size} bytes are too few for a header")
        length = struct.unpack("<Q", first)[0]
        if length > MAX_HEADER:
            raise ValueError(f"{path}: header of {length} bytes, at most {MAX_HEADER} are allowed")
        if length > size - 8:
            raise ValueError(f"{path}: truncated, header of {length} bytes in {size} bytes")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(f"{path}: header is not valid JSON ({reason})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: header is not a JSON object")
    header.pop("__metadata__", None)
    try:
        entries = {name: _entry(name, value) for name, value in header.items()}
        _check_layout(entries, size - 8 - length)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return entries, 8 + length


def _unique(pairs):
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(name: str, value) -> tuple:
    """One header entry as (dtype, shape, begin, end); shape and byte count must agree."""
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        allowed = ", ".join(DTYPES)
        raise ValueError(f"tensor {name!r} has dtype {value['dtype']!r}; allowed: {allowed}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise ValueError(f"tensor {name!r} has shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"tensor {name!r} has data_offsets {offsets!r}")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"tensor {name!r}: {end - begin} bytes for shape {shape} of {value['dtype']}"
        )
    return dtype, tuple(shape), begin, end


def _check_layout(entries: dict[str, tuple], size: int) -> None:
    """Tensors must follow one another without overlap or gap and end where the file ends."""
    position, previous = 0, None
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin < position:
            raise ValueError(f"tensors {previous!r} and {name!r} overlap")
        if begin > position:
            raise ValueError(f"{begin - position} unused bytes before tensor {name!r}")
        position, previous = end, name
    if position > size:
        raise ValueError(f"truncated, {previous!r} ends at byte {position} of {size}")
    if position < size:
        raise ValueError(f"{size - position} bytes after the last tensor")


def _load_folder(folder: Path) -> dict[str, np.ndarray]:
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return load_safetensors(folder / SINGLE)
        raise FileNotFoundError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
    try:
        where = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = sorted(set(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: not a JSON object with a weight_map of file names") from None
    tensors: dict[str, np.ndarray] = {}
    for shard in shards:
        # A shard outside the folder would let an index read any file of the machine.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index}: shard {shard!r} is not a plain file name")
        part = load_safetensors(folder / shard)
        strangers = [name for name in part if where.get(name) != shard]
        if strangers:
            raise ValueError(f"{index}: does not list {strangers[0]!r} in {shard}")
        tensors |= part
    absent = sorted(where.keys() - tensors.keys())
    if absent:
        raise ValueError(f"{index}: {len(absent)} tensors are in no shard, first {absent[0]!r}")
    return tensors
