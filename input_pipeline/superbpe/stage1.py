"""Stage 1: ordinary byte-level BPE by the stock trainer of the `tokenizers` package."""

import json
from collections.abc import Iterable

import tokenizers

from input_pipeline.superbpe.bpe import Bpe, byte_symbols
from input_pipeline.superbpe.rules import S1
from input_pipeline.superbpe.tokenizer_json import cutter


def train(
    texts: Iterable[str],
    *,
    vocab_size: int = 0,
    merges: int | None = None,
    patterns: tuple[str, ...] = (S1,),
    all_bytes: bool = False,
    progress: bool = False,
) -> Bpe:
    """Merges the most frequent pair again and again, ties to the smaller ids.

    texts:      any strings; they are cut behind every newline, as the stock file trainer does
    vocab_size: of alphabet and products; or
    merges:     this many merges
    all_bytes:  the alphabet is all 256 bytes instead of those seen, so that none is unknown
    """
    if (merges is None) == (vocab_size == 0):
        raise ValueError("stage 1 needs either vocab_size or merges")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = cutter(patterns, lines=True)
    # The alphabet's size is not known before the texts are read, and never above 256.
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size if merges is None else merges + 256,
        initial_alphabet=sorted(byte_symbols()) if all_bytes else [],
        show_progress=progress,
    )
    inner.train_from_iterator(texts, trainer)
    model = json.loads(inner.to_str())["model"]
    pairs = tuple(tuple(pair) for pair in model["merges"])
    found = Bpe(model["vocab"], pairs)
    return found if merges is None else found.first(min(merges, len(pairs)))
