"""Data set "text": packed documents for language models.

Batches: tokens, segment_ids and positions, int32 [B, L]. A document is BOS, its tokens, EOS;
documents are concatenated and cut every L tokens by grain. Segment ids start at 1 in each window,
0 is padding; positions start again with each segment. Windows are packed once and kept, so they
are drawn in any order, by any number of processes, and a position in the data is one number.

config.data.stages mixes folders below config.data.path, in shares that change with the step.
"""

import hashlib
import json
from collections import Counter
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


def windows(
    data, split: str, folder: str = ""
) -> tuple[Windows, tokenizers.TextTokenizer, dict[str, int]]:
    """(packed windows of a split in a fixed order, tokenizer, what was skipped).

    folder: of the texts below data.path; the tokenizer is that of all of them.
    """
    tokenizer = tokenizers.load(data)
    if folder:
        data = data.copy_and_resolve_references()
        data.path = str(Path(data.path) / folder)
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
    """Endless shuffled windows of one split; of the training split, mixed by data.stages."""
    store.check_split(split)
    stages = _checked_stages(config.data) if split == "train" else ()
    folders = tuple(dict.fromkeys(name for _, shares in stages for name, _ in shares)) or ("",)
    sources, skipped = [], Counter()
    for folder in folders:
        found, tokenizer, counts = windows(config.data, split, folder)
        sources.append(found)
        skipped.update(counts)
    starts = np.cumsum([0, *(len(source.tokens) for source in sources)])
    rows = batching.endless(starts[-1], seed)
    if stages:
        where = {name: (starts[i], starts[i + 1]) for i, name in enumerate(folders)}
        rows = _staged(stages, where, config, seed)

    def make(indices: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        chosen = indices["text"]
        whole = len(chosen)  # rows of the global batch
        chosen = chosen[batching.share(whole, process_index, process_count, "config.batch_size")]
        of = np.searchsorted(starts, chosen, side="right") - 1
        shape = (len(chosen), config.data.length)
        batch = {name: np.empty(shape, np.int32) for name in Windows._fields}
        for number, source in enumerate(sources):
            mine = of == number
            for name, array in source._asdict().items():
                batch[name][mine] = array[chosen[mine] - starts[number]]
        return batch

    parts = {"text": batching.Batches(rows, config.batch_size, config.ramp)}
    dataset = batching.assemble(parts, make, seed=seed, prefetch=config.data.prefetch)
    return Pipeline(
        dataset, tokenizer, tokenizer.vocab_size, counts=dict(skipped), on_close=dataset.close
    )


def _checked_stages(data) -> tuple[tuple[int, tuple[tuple[str, float], ...]], ...]:
    """data.stages: ((steps, ((folder, share), ...)), ...)."""
    for stage in data.stages:
        steps, shares = stage
        if data.text != "folder" or steps < 1 or not shares or min(s for _, s in shares) <= 0:
            raise ValueError(
                f"config.data.stages has {stage}: allowed is (steps, ((folder below "
                "config.data.path, share > 0), ...)), with config.data.text='folder'"
            )
    return data.stages


def _staged(stages, where: dict[str, tuple[int, int]], config, seed: int) -> grain.MapDataset:
    """Rows of one stage after another, the last without end; `where` has each folder's rows."""
    parts, step = [], 0
    for number, (steps, shares) in enumerate(stages):
        mixed = grain.MapDataset.mix(
            [
                batching.endless(end - begin, seed + number).map(lambda row, at=begin: row + at)
                for begin, end in (where[name] for name, _ in shares)
            ],
            [share for _, share in shares],
        )
        begin, end = (
            batching.first_row(s, config.batch_size, config.ramp) for s in (step, step + steps)
        )
        last = number == len(stages) - 1
        parts.append(mixed if last else mixed[: end - begin])
        step += steps
    return grain.MapDataset.concatenate(parts)
