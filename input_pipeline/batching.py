"""What all data sets share: endless shuffled batches of indices, this process's rows, prefetch.

Grain carries indices only; pictures and tokens are gathered a batch at a time. Every process
draws the indices and random numbers of the whole global batch and gathers its own rows, so a
batch is the same on 1 and on 1,000 processes, and a run may resume on another number of them.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np

Ramp = tuple[tuple[int, int], ...]  # (rows, steps) of the first batches, see config.ramp
ENDLESS = 2**45  # examples; repeat(None) overflows a length with some batch sizes


def share(rows: int, process_index: int, process_count: int, what: str) -> slice:
    """The rows of a global batch that belong to a process."""
    if rows % process_count:
        raise ValueError(
            f"{what} gives {rows} rows per batch, which {process_count} processes cannot share "
            "equally; change config.batch_size"
        )
    local = rows // process_count
    return slice(process_index * local, (process_index + 1) * local)


def endless(count: int, seed: int) -> grain.MapDataset:
    """Indices below `count`: each epoch a fresh order of all of them."""
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat(ENDLESS // count)


def index_batches(count: int, batch: int, seed: int) -> grain.MapDataset:
    """Batches int64 [batch] of `endless` indices."""
    return Batches(endless(count, seed), batch)


def first_row(step: int, batch: int, ramp: Ramp) -> int:
    """How many rows the batches before number `step` hold."""
    rows = 0
    for size, steps in ramp:
        here = min(step, steps)
        rows, step = rows + here * size, step - here
    return rows + step * batch


class Batches(grain.MapDataset):
    """Batches int64 of `batch` indices, in the first steps of those sizes that `ramp` lists."""

    def __init__(self, indices: grain.MapDataset, batch: int, ramp: Ramp = ()):
        super().__init__(indices)
        self._batch, self._ramp = batch, ramp

    def __len__(self) -> int:
        return len(self._parent) // self._batch

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        begin, end = (first_row(i, self._batch, self._ramp) for i in (index, index + 1))
        return np.array([self._parent[i] for i in range(begin, end)], np.int64)

    def __str__(self) -> str:
        return f"Batches({self._batch}, {self._ramp})"


class Bucketed(grain.MapDataset):
    """(bucket, indices): the batches of several sets in one fixed order, in which each comes as
    often as its share says."""

    def __init__(self, parts: Sequence[grain.MapDataset], shares: Sequence[int], seed: int):
        super().__init__(parts)
        order = np.repeat(np.arange(len(parts)), shares)
        self._order = np.random.default_rng(seed).permutation(order)
        self._shares = np.array(shares)
        self._earlier = np.zeros_like(order)  # batches of the same bucket before this one
        for bucket, share in enumerate(shares):
            self._earlier[self._order == bucket] = np.arange(share)

    def __len__(self) -> int:
        rounds = min(len(p) // n for p, n in zip(self._parents, self._shares.tolist()))
        return rounds * len(self._order)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        turn, place = divmod(index, len(self._order))
        bucket = int(self._order[place])
        own = turn * int(self._shares[bucket]) + int(self._earlier[place])
        return bucket, self._parents[bucket][own]

    def __str__(self) -> str:
        return f"Bucketed({self._shares.tolist()})"


class Prefetched(grain.IterDataset):
    """Batches made ahead by one thread; remembers its iterators so that they can be closed."""

    def __init__(self, dataset: grain.MapDataset, prefetch: int):
        options = grain.ReadOptions(num_threads=1 if prefetch else 0, prefetch_buffer_size=prefetch)
        self._inner = dataset.to_iter_dataset(options)
        super().__init__(self._inner)
        self._open: weakref.WeakSet = weakref.WeakSet()

    def __iter__(self) -> grain.DatasetIterator:
        iterator = iter(self._inner)
        self._open.add(iterator)
        return iterator

    def __str__(self) -> str:
        return f"Prefetched({self._inner})"

    def close(self) -> None:
        """Stops the threads of every iterator still alive."""
        for iterator in list(self._open):
            iterator.close()


def assemble(
    parts: Mapping[str, grain.MapDataset],
    make: Callable[[dict[str, np.ndarray], np.random.Generator], dict[str, np.ndarray]],
    *,
    seed: int,
    prefetch: int,
) -> Prefetched:
    """Batches `make({name: indices}, rng)`; rng depends on the seed and the batch number only."""
    names = list(parts)
    shortest = min(map(len, parts.values()))  # grain wants equal lengths; all are endless
    zipped = grain.experimental.ZipMapDataset([part[:shortest] for part in parts.values()])
    ds = zipped.seed(seed).random_map(lambda got, rng: make(dict(zip(names, got)), rng))
    return Prefetched(ds, prefetch)
