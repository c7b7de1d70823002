"""Our own encoder, to check the library's by: merges by rank, in time n log n.

Pieces of stage 2 are whole lines or longer, so what a merge costs must not depend on their length:
tokens are a linked list, and a heap holds (rank, position) of the pairs that can be merged.
"""

import heapq
from collections.abc import Iterable, Sequence

from input_pipeline.superbpe.bpe import Bpe, unspell
from input_pipeline.superbpe.tokenizer_json import cutter


class Encoder:
    """encode and decode with a Bpe whose pieces are cut by `patterns`."""

    def __init__(self, bpe: Bpe, patterns: Sequence[str]):
        self.vocab = bpe.vocab
        self.spelling = {index: token for token, index in bpe.vocab.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(bpe.merges)}
        self.cutter = cutter(patterns)

    def encode(self, text: str) -> list[int]:
        """Ids of the text; bytes without a symbol in the alphabet are left out."""
        pieces = self.cutter.pre_tokenize_str(text)
        return [self.vocab[token] for piece, _ in pieces for token in self.merge(piece)]

    def merge(self, piece: str) -> list[str]:
        """The tokens of one piece in byte spelling."""
        tokens: list[str | None] = [symbol for symbol in piece if symbol in self.vocab]
        after = list(range(1, len(tokens) + 1))
        before = list(range(-1, len(tokens) - 1))
        heap: list[tuple[int, int, str, str]] = []

        def consider(at: int) -> None:
            if at >= 0 and after[at] < len(tokens):
                pair = tokens[at], tokens[after[at]]
                if (rank := self.ranks.get(pair)) is not None:
                    heapq.heappush(heap, (rank, at, *pair))

        for at in range(len(tokens)):
            consider(at)
        while heap:
            _, at, left, right = heapq.heappop(heap)
            end = after[at]
            if tokens[at] != left or end >= len(tokens) or tokens[end] != right:
                continue  # one of the two is part of another token by now
            tokens[at], tokens[end] = left + right, None
            after[at] = after[end]
            if after[at] < len(tokens):
                before[after[at]] = at
            consider(before[at])
            consider(at)
        return [token for token in tokens if token is not None]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD."""
        return unspell("".join(self.spelling[i] for i in ids)).decode(errors="replace")
