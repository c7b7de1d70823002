"""What stage 2 merges in: the text's pieces as tokens of stage 1, each different piece once.

One flat array holds all pieces, a separator (-1) in front of each and behind the last, and a
weight for each cell: how often the piece occurs. That is 4 bytes a token for the ids and 4 for
the weights, whatever the length of the pieces, which in stage 2 are lines and nearly all
different. Texts are encoded by rank with the stage-1 merges on stage-2 pieces, which gives what
replaying the merges one by one would.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from input_pipeline.superbpe import tokenizer_json
from input_pipeline.superbpe.bpe import Bpe, Pair, byte_symbols

BATCH = 1 << 20  # characters encoded at a time: the library's results are a hundred times larger
LONGEST = 1 << 12  # characters of one string given to the library; whole lines
SEPARATOR = -1


class Pieces(NamedTuple):
    """ids: tokens, separators between pieces; weights: of the piece that a cell belongs to."""

    ids: Int[np.ndarray, "n"]
    weights: Int[np.ndarray, "n"]
    present: Bool[np.ndarray, "v"]  # tokens that occur, in pieces of one token too
    tokens: int  # of the whole text, repeated pieces counted every time
    bytes: int  # UTF-8 of the whole text


def blocks(texts: Iterable[str], size: int = LONGEST) -> Iterator[str]:
    """The same texts in strings of about `size` characters, cut behind newlines only."""
    for text in texts:
        begin = 0
        while len(text) - begin > size:
            cut = text.rfind("\n", begin, begin + size) + 1
            cut = cut or text.find("\n", begin + size) + 1 or len(text)
            yield text[begin:cut]
            begin = cut
        if begin < len(text):
            yield text[begin:]


def batches(texts: Iterable[str], size: int = BATCH) -> Iterator[list[str]]:
    """Lists of strings of about `size` characters together."""
    held, count = [], 0
    for text in texts:
        held.append(text)
        count += len(text)
        if count >= size:
            yield held
            held, count = [], 0
    if held:
        yield held


def with_all_bytes(bpe: Bpe) -> Bpe:
    """The same merges over all 256 bytes; those that are new get the last ids."""
    new = [s for s in byte_symbols() if s not in bpe.vocab]
    free = max(bpe.vocab.values(), default=-1) + 1
    return Bpe({**bpe.vocab, **{s: free + i for i, s in enumerate(new)}}, bpe.merges)


def collect(
    texts: Iterable[str] | Iterable[tuple[str, int]],
    bpe: Bpe,
    patterns: tuple[str, ...],
    *,
    counted: bool = False,
    normalizer: dict | None = None,
) -> Pieces:
    """Cuts and encodes texts; bpe must hold all bytes (`with_all_bytes`).

    counted: `texts` are (piece, how often) instead, already normalised and cut.
    """
    inner = tokenizer_json.build(bpe, () if counted else patterns, lines=not counted)
    if not counted:
        texts = tokenizer_json.normalised(texts, normalizer)
    found: Counter[bytes] = Counter()
    present = np.zeros(max(bpe.vocab.values()) + 1, bool)
    tokens = size = 0
    for batch, counts in _batched(texts, counted):
        encoded = inner.encode_batch(
            batch, add_special_tokens=False
        )  # the fast one forgets borders
        for text, times, one in zip(batch, counts, encoded):
            ids = np.array(one.ids, np.int32)
            present[ids] = True
            tokens += times * len(ids)
            size += times * len(text.encode())
            of = np.array(one.word_ids, np.int32)
            ends = [0, *(np.flatnonzero(np.diff(of)) + 1).tolist(), len(ids)]
            for begin, end in zip(ends, ends[1:]):
                if end - begin > 1:  # a piece of one token has nothing to merge
                    found[ids[begin:end].tobytes()] += times
    return Pieces(*_flat(found), present, tokens, size)


def _batched(texts, counted: bool) -> Iterator[tuple[list[str], list[int]]]:
    if not counted:
        for batch in batches(blocks(texts)):
            yield batch, [1] * len(batch)
        return
    pieces, counts, size = [], [], 0
    for piece, count in texts:
        pieces.append(piece)
        counts.append(count)
        size += len(piece)
        if size >= BATCH:
            yield pieces, counts
            pieces, counts, size = [], [], 0
    if pieces:
        yield pieces, counts


def _flat(found: Counter[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Ids with separators, and weights; `found` is emptied on the way."""
    lengths = np.fromiter((len(k) // 4 for k in found), np.int64, len(found))
    weights = np.fromiter(found.values(), np.int64, len(found))
    ids = np.full(int(lengths.sum()) + len(found) + 1, SEPARATOR, np.int32)
    inside = np.ones(len(ids), bool)
    inside[np.concatenate([[0], np.cumsum(lengths + 1)])] = False
    ids[inside] = np.frombuffer(b"".join(found), np.int32)
    found.clear()
    small = weights.max(initial=0) < 2**31
    spread = np.repeat(weights.astype(np.int32 if small else np.int64), lengths + 1)
    return ids, np.append(spread, spread.dtype.type(0))


def used(bpe: Bpe, present: np.ndarray) -> tuple[set[str], tuple[Pair, ...]]:
    """(byte symbols, merges) that made the tokens that occur; the others are skipped.

    A token's own merge happened, and so did those of its two parts, down to single bytes.
    """
    parts: dict[str, list[Pair]] = {}
    for pair in bpe.merges:
        parts.setdefault(pair[0] + pair[1], []).append(pair)
    waiting = [token for token, i in bpe.vocab.items() if present[i]]
    seen = set(waiting)
    while waiting:
        for pair in parts.get(waiting.pop(), ()):
            new = set(pair) - seen
            seen |= new
            waiting += new
    merges = tuple(pair for pair in bpe.merges if pair[0] + pair[1] in seen)
    return {t for t in seen if len(t) == 1}, merges
