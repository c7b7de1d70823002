"""One split of one or more sets in memory: texts as objects, pictures decoded or on demand."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from input_pipeline import records, transforms
from input_pipeline.records import Example, Skipped, Source
from input_pipeline.transforms import Size


class Decoded:
    """Pictures held in memory as uint8 [n, h, w, 3]."""

    def __init__(self, images: np.ndarray):
        images.setflags(write=False)  # shared by every pipeline of the process
        self.images = images

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [b, h, w, 3]."""
        return self.images[indices]

    def take(self, indices: np.ndarray) -> "Decoded":
        """The pictures at these indices."""
        return self if len(indices) == len(self.images) else Decoded(self.images[indices])


class OnDemand:
    """Pictures read and decoded when asked for: sets larger than config.data.cache_mb."""

    def __init__(self, source: Source, rows: np.ndarray, size: Size, skipped: Skipped):
        self.source, self.rows, self.size, self.skipped = source, rows, size, skipped

    def _read(self, index: int) -> np.ndarray:
        # A record that went bad since it was indexed is replaced by the next one: the batch
        # keeps its shape and a resumed run draws the same replacement.
        for step in range(len(self.rows)):
            row = int(self.rows[(index + step) % len(self.rows)])
            try:
                return transforms.decode(self.source[row].image, self.size)
            except (RuntimeError, *transforms.UNREADABLE) as error:
                self.skipped.add(f"record {row} of {self.source}", error)
        raise records.Unreadable(f"no picture of {self.source} can be read")

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [b, h, w, 3]."""
        return np.stack([self._read(int(i)) for i in indices])

    def take(self, indices: np.ndarray) -> "OnDemand":
        """The pictures at these indices."""
        return OnDemand(self.source, self.rows[indices], self.size, self.skipped)


class Chain:
    """Pictures of several sets, one after the other."""

    def __init__(self, parts: Sequence):
        self.parts = [pictures for _, pictures in parts]
        self.starts = np.cumsum([0] + [n for n, _ in parts])

    def take(self, indices: np.ndarray) -> "Chain":
        """The pictures at these indices, which rise."""
        ends = np.searchsorted(indices, self.starts)
        rows = [
            indices[a:b] - start
            for a, b, start in zip(ends[:-1], ends[1:], self.starts[:-1], strict=True)
        ]
        parts = zip(rows, self.parts, strict=True)
        return Chain([(len(own), pictures.take(own)) for own, pictures in parts])

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [b, h, w, 3]."""
        which = np.searchsorted(self.starts, indices, side="right") - 1
        out = None
        for part in np.unique(which):
            rows = which == part
            got = self.parts[part].gather(indices[rows] - self.starts[part])
            out = np.empty((len(indices), *got.shape[1:]), got.dtype) if out is None else out
            out[rows] = got
        return out


@dataclass(frozen=True)
class Examples:
    """Texts (`items`, without their pictures) and pictures of one split, by index."""

    items: list[Example]
    pictures: Decoded | OnDemand | Chain
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.items)

    def where(self, kept: Callable[[Example], bool]) -> "Examples":
        """The examples for which `kept` holds."""
        rows = np.array([i for i, e in enumerate(self.items) if kept(e)], np.int64)
        return Examples([self.items[i] for i in rows], self.pictures.take(rows), self.counts)


def concatenate(parts: Sequence[Examples]) -> Examples:
    """Several sets as one, in order."""
    if len(parts) == 1:
        return parts[0]
    counts: dict[str, int] = {}
    for part in parts:
        for key, value in part.counts.items():
            counts[key] = counts.get(key, 0) + value
    pictures = Chain([(len(p), p.pictures) for p in parts])
    return Examples([e for p in parts for e in p.items], pictures, counts)


def load(data, path: Path, split: str, size: Size) -> Examples:
    """One split of the stored set at `path`, read once per process; where `size` is (h, w), the
    pictures to which that is the nearest of config.data.shapes."""
    among = () if isinstance(size, int) else tuple(map(tuple, data.shapes))
    return _load(path, split, size, among, data.max_unreadable, data.cache_mb)


@functools.lru_cache(maxsize=4)
def _by_shape(
    path: Path, split: str, among: tuple[Size, ...], max_unreadable: int
) -> tuple[dict[Size, list[int]], dict[str, int]]:
    """Records by the nearest of some shapes, from one pass over their headers, and what is counted
    as unreadable."""
    source = records.open_source(path, split)
    skipped = Skipped(max_unreadable, records.noted_skips(path))
    rows: dict[Size, list[int]] = {size: [] for size in among}
    for row, example in source.readable(skipped):
        try:
            rows[transforms.shape_of(example.image, among)].append(row)
        except transforms.UNREADABLE as error:
            skipped.add(f"the picture of record {row} of {source}", error)
    return rows, skipped.counts


@functools.lru_cache(maxsize=64)
def _load(
    path: Path, split: str, size: Size, among: tuple, max_unreadable: int, cache_mb: int
) -> Examples:
    source = records.open_source(path, split)
    chosen, counts = range(len(source)), records.noted_skips(path)
    if among:
        by_shape, counts = _by_shape(path, split, among, max_unreadable)
        chosen, counts = by_shape[size], dict(counts)
    skipped = Skipped(max_unreadable, counts)
    h, w = transforms.sides(size)
    in_memory = len(chosen) * h * w * 3 <= cache_mb * 2**20
    items, images, rows = [], [], []
    for row, example in source.readable(skipped, chosen):
        try:
            if in_memory:
                images.append(transforms.decode(example.image, size))
        except transforms.UNREADABLE as error:
            skipped.add(f"the picture of record {row} of {source}", error)
            continue
        rows.append(row)
        items.append(Example(**{**vars(example), "image": None}))
    if in_memory:
        shape = (0, h, w, 3)
        pictures = Decoded(np.stack(images) if images else np.zeros(shape, np.uint8))
    else:
        pictures = OnDemand(source, np.array(rows, np.int64), size, skipped)
    return Examples(items, pictures, skipped.counts)
