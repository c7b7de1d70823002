"""Data set "text": packed documents for language models.

Batches: tokens, segment_ids and positions, int32 [B, L]. A document is BOS, its tokens, EOS;
documents are concatenated and cut every L tokens by grain. Segment ids start at 1 in each window,
0 is padding; positions start again with each segment. Windows are packed once and kept, so they
are drawn in any order, by any number of processes, and a position in the data is one number.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from input_pipeline import Pipeline, batching, documents, store, tokenizers

PACKING_SEED = 0  # in which order documents are packed; windows are shuffled every epoch


class Windows(NamedTuple):
    """Packed windows of one split, memory-mapped: each int32 [n, L]."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


def pack(texts, tokenizer: tokenizers.TextTokenizer, length: int) -> Windows:
    """Concatenates the documents in a fixed random order and cuts them into windows."""
    ids = [
        np.array([tokenizer.bos, *row, tokenizer.eos], np.int32)
        for row in tokenizer.encode_batch(texts)
    ]
    ds = grain.MapDataset.source(ids).seed(PACKING_SEED).shuffle()
    packed = grain.experimental.ConcatThenSplitIterDataset(
        ds.map(lambda row: {"tokens": row}).to_iter_dataset(grain.ReadOptions(num_threads=0)),
        length_struct={"tokens": length},
    )
    rows = list(packed)
    names = ("tokens", "tokens_segment_ids", "tokens_positions")
    windows = Windows(*(np.array([r[n] for r in rows], np.int32) for n in names))
    windows.tokens[windows.segment_ids == 0] = tokenizer.pad
    return windows


def windows(data, split: str) -> tuple[Windows, tokenizers.TextTokenizer, dict[str, int]]:
    """(packed windows of a split in a fixed order, tokenizer, what was skipped)."""
    tokenizer = tokenizers.load(data)
    source = documents.prepare(data)
    spelling = hashlib.sha256(tokenizer.inner.to_str().encode()).hexdigest()[:12]
    key = f"windows/{source.name}-{spelling}-{data.length}-{split}"

    def make(path: Path) -> None:
        texts, counts = documents.load(data, split)
        if not texts:
            raise ValueError(f"config.data.text={data.text!r} has no document in split {split!r}")
        path.mkdir()
        for name, array in pack(texts, tokenizer, data.length)._asdict().items():
            np.save(path / f"{name}.npy", array)
        (path / "counts.json").write_text(json.dumps(counts))

    path = store.prepare_once(data, key, make)
    arrays = (np.load(path / f"{name}.npy", mmap_mode="r") for name in Windows._fields)
    return Windows(*arrays), tokenizer, json.loads((path / "counts.json").read_text())


def build(config, *, split: str, seed: int, process_index: int, process_count: int) -> Pipeline:
    """Endless shuffled windows of one split."""
    store.check_split(split)
    found, tokenizer, counts = windows(config.data, split)
    rows = batching.share(config.batch_size, process_index, process_count, "config.batch_size")

    def make(indices: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        chosen = indices["text"][rows]
        return {name: np.asarray(array[chosen]) for name, array in found._asdict().items()}

    parts = {"text": batching.index_batches(len(found.tokens), config.batch_size, seed)}
    dataset = batching.assemble(parts, make, seed=seed, prefetch=config.data.prefetch)
    return Pipeline(dataset, tokenizer, tokenizer.vocab_size, counts=counts, on_close=dataset.close)
