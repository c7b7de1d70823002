"""Stage 2: byte-level BPE goes on across spaces, from any tokenizer, under a veto.

    first = stage1.train(texts, vocab_size=200_000).first(80_000)
    found = stage2.train(texts, first, vocab_size=200_000)

1. Texts are cut by the rules' `train` regexes and encoded by the inherited merges.
2. Inherited merges that never happen in these pieces are skipped: their token gets no id.
3. The most frequent pair is merged, ties to the smaller ids, until the vocabulary is full or no
   pair is left. Pairs whose product the veto rejects are never merged: a later pair with the same
   product would be rejected too, and other pairs' counts do not change.

The merges so far are all the state there is: training that goes on from them gives what one
uninterrupted run gives, so a checkpoint is a list of merges.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from input_pipeline.superbpe import pieces as pieces_of
from input_pipeline.superbpe.bpe import Bpe, Pair, byte_symbols
from input_pipeline.superbpe.facts import facts_of, forbidden, note
from input_pipeline.superbpe.pieces import SEPARATOR, Pieces
from input_pipeline.superbpe.rules import PRESETS, Rules

EVERY = 0.5  # seconds between two calls of `on_progress`


class Progress(NamedTuple):
    """Where a training stands; `merges` begins with the inherited ones that are left."""

    done: int
    total: int
    base: Bpe
    merges: list[Pair]


class Found(NamedTuple):
    """The tokenizer and what happened."""

    bpe: Bpe
    inherited: int  # merges of stage 1 that happened in the pieces
    skipped: int  # and that did not
    counts: tuple[int, ...]  # how often each new pair occurred when it was merged
    tokens: tuple[int, int]  # of the whole text: before and after


def has_numba() -> bool:
    """Whether the extra "superbpe" is installed."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def train(
    texts: Iterable[str] | Iterable[tuple[str, int]],
    start: Bpe,
    vocab_size: int,
    rules: Rules = PRESETS["repo"],
    *,
    counted: bool = False,
    all_bytes: bool = False,
    keep: bool = False,
    first_new: int = 0,
    normalizer: dict | None = None,
    engine: str = "auto",
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Found:
    """Adds merges to `start` until vocab_size tokens, alphabet included.

    counted:     texts are (piece, how often), normalised and cut already (counting.py)
    all_bytes:   the alphabet is all 256 bytes; otherwise those of `start` and those seen
    keep:        the vocabulary of `start` stays whole and keeps its ids, which extends a model's
                 tokenizer; otherwise unused merges are skipped and ids are canonical
    first_new:   new tokens get ids from here on, where others (marks) have the ones before
    normalizer:  JSON of a normaliser that texts pass first
    engine:      numba, python, or auto: numba where it is installed; both give the same merges
    on_progress: called every few seconds and at the end
    """
    full = pieces_of.with_all_bytes(start)
    found = pieces_of.collect(texts, full, rules.train, counted=counted, normalizer=normalizer)
    base, skipped, found = _renumbered(start, full, found, all_bytes, keep, first_new)
    if not base.vocab:
        raise ValueError("stage 2 has no text to train on, and a tokenizer without any symbol")
    merges, counts, after = grow(found, base, vocab_size, rules, engine, on_progress, first_new)
    bpe = extended(base, merges, first_new)
    return Found(bpe, len(base.merges), skipped, tuple(counts), (found.tokens, after))


def _free(vocab: Mapping[str, int], first_new: int) -> int:
    """The next id that nothing has."""
    return max(first_new, max(vocab.values(), default=-1) + 1)


def extended(base: Bpe, merges: Sequence[Pair], first_new: int = 0) -> Bpe:
    """`base` after more merges, of which `merges` begins with its own; new tokens get new ids."""
    vocab = dict(base.vocab)
    free = _free(vocab, first_new)
    for left, right in merges:
        if left + right not in vocab:
            vocab[left + right] = free
            free += 1
    return Bpe(vocab, tuple(merges))


def _renumbered(start: Bpe, full: Bpe, found: Pieces, all_bytes: bool, keep: bool, first_new: int):
    """(the tokenizer that stage 2 begins with, merges skipped, the pieces in its ids)."""
    symbols, merges = pieces_of.used(full, found.present)
    symbols = set(byte_symbols()) if all_bytes else symbols | set(start.alphabet)
    if keep:
        free = _free(start.vocab, first_new)
        new = sorted(symbols - start.vocab.keys())
        base = Bpe({**start.vocab, **{s: free + i for i, s in enumerate(new)}}, start.merges)
    else:
        base = Bpe.of(sorted(symbols), merges)
    ids = np.full(max(full.vocab.values()) + 2, SEPARATOR, np.int32)  # -1 stays the separator
    for token, index in full.vocab.items():
        ids[index] = base.vocab.get(token, SEPARATOR)
    return base, len(start.merges) - len(base.merges), found._replace(ids=ids[found.ids])


def grow(
    found: Pieces, base: Bpe, vocab_size: int, rules: Rules, engine: str, on_progress, first_new=0
):
    """(all merges, counts of the new ones, tokens left), from pieces in base's ids."""
    spelling = {index: token for token, index in base.vocab.items()}
    ids = dict(base.vocab)
    free = _free(ids, first_new)
    new = max(vocab_size - len(ids), 0)
    facts = facts_of(free + new + 1, rules.veto)
    for index, token in spelling.items():
        note(facts, index, token)
    loop = _loop(engine, found, facts)
    before = loop.tokens()
    merges, counts, known = list(base.merges), [], set(base.merges)
    told = time.monotonic()
    while len(ids) < vocab_size and (best := loop.pop()) is not None:
        left, right, count = best
        pair = (spelling[left], spelling[right])
        product = pair[0] + pair[1]
        index = ids.get(product)
        if index is None:
            index = ids[product] = free
            spelling[index] = product
            free += 1
            note(facts, index, product)
        loop.merge(left, right, index)
        if pair not in known:  # a pair can come back when another pair makes one of its halves
            known.add(pair)
            merges.append(pair)
            counts.append(count)
        if time.monotonic() - told > EVERY:
            on_progress(Progress(len(counts), new, base, merges))
            told = time.monotonic()
    on_progress(Progress(len(counts), len(counts), base, merges))
    return merges, counts, found.tokens - before + loop.tokens()


def _loop(engine: str, found: Pieces, facts):
    if engine not in ("auto", "numba", "python"):
        raise ValueError(f"config.data.superbpe.engine={engine!r}: allowed are auto, numba, python")
    if engine == "python" or (engine == "auto" and not has_numba()):
        from input_pipeline.superbpe.loop_python import Loop

        return Loop(found, lambda left, right: not forbidden(left, right, facts, facts.veto))
    from input_pipeline.superbpe.loop_numba import Loop

    return Loop(found, facts)
