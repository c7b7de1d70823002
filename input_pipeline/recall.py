"""Data sets "recall" and "needle": key-value pairs to remember, drawn afresh for every batch.

recall: all pairs first, then nothing but keys again, each followed by its value: multi-query
associative recall (Arora et al., arXiv 2312.04927). No silence in between: asked half as often,
models stay much longer where they know the values but not whose they are.
needle: the pairs anywhere in random other tokens, the last quarter is keys again with their values.
Any key may be asked for, however often it was: if each were asked once, a model could answer with
the values that are left (0.34 of eight right, a loss of 1.33) and never learn to look up.

tokens, segment_ids, positions int32 [B, L], and scored int32 [B, L]: 1 where the token that follows
is an answer; only those count. Chance is one of the values: 3 / (vocab_size - 4).
"""

import grain
import numpy as np

from input_pipeline import Pipeline, batching, store

FIRST = 4  # ids below are marks, as in every vocabulary here


def ranges(vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(keys, values, other tokens): a third of the vocabulary each."""
    third = (vocab_size - FIRST) // 3
    return tuple(FIRST + third * i + np.arange(third) for i in range(3))


def draw(rng: np.random.Generator, rows: int, data, fewest: int = 0) -> dict[str, np.ndarray]:
    """One batch of `rows` rows; config.data: length, pairs, vocab_size, name.

    fewest: a row's questions are about this many of its pairs, or any number up to all; 0: all.
    """
    pairs, slots = data.pairs, data.length // 2
    keys, values, hay = ranges(data.vocab_size)
    if 2 * pairs > slots or pairs > len(keys):
        raise ValueError(
            f"config.data.pairs={pairs}: length={data.length} holds {slots // 2} pairs with their "
            f"questions, and vocab_size={data.vocab_size} has {len(keys)} keys"
        )

    def some(count, low, high):
        """`count` different slots of each row."""
        every = np.tile(np.arange(low, high), (rows, 1))
        return rng.permuted(every, axis=1)[:, :count]

    key = rng.permuted(np.tile(keys, (rows, 1)), axis=1)[:, :pairs]
    value = rng.choice(values, (rows, pairs))
    if data.name == "needle":
        tokens = rng.choice(hay, (rows, slots, 2))
        end = slots - slots // 4
        told, asked = some(pairs, 0, end), some(slots - end, end, slots)
    else:
        tokens = np.empty((rows, slots, 2), np.int64)
        told, asked = some(pairs, 0, pairs), some(slots - pairs, pairs, slots)
    row, scored = np.arange(rows)[:, None], np.zeros((rows, slots, 2))
    pair = np.stack([key, value], axis=2)
    tokens[row, told] = pair
    among = rng.integers(fewest or pairs, pairs + 1, (rows, 1))
    tokens[row, asked] = pair[row, rng.integers(0, among, asked.shape)]
    scored[row, asked, 0] = 1
    flat = (tokens.reshape(rows, -1), scored.reshape(rows, -1))
    ids, scored = (np.pad(x, ((0, 0), (0, data.length % 2))).astype(np.int32) for x in flat)
    ones = np.ones_like(ids)
    return dict(
        tokens=ids, segment_ids=ones, positions=np.cumsum(ones, 1, np.int32) - 1, scored=scored
    )


def build(config, *, split: str, seed: int, process_index: int, process_count: int) -> Pipeline:
    """Endless fresh batches; splits differ by their random numbers."""
    store.check_split(split)
    rows = batching.share(config.batch_size, process_index, process_count, "config.batch_size")
    fewest = config.data.fewest if split == "train" else 0

    def make(indices: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        del indices  # every batch is new
        got = draw(rng, config.batch_size, config.data, fewest)
        return {name: array[rows] for name, array in got.items()}

    seed = 3 * seed + store.SPLITS.index(split)
    # Not shuffled: grain takes 5 ms for each index below 16.
    parts = {"text": grain.MapDataset.range(batching.ENDLESS)}
    dataset = batching.assemble(parts, make, seed=seed, prefetch=config.data.prefetch)
    return Pipeline(dataset, vocab_size=config.data.vocab_size, on_close=dataset.close)
