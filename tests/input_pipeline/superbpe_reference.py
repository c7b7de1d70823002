"""BPE as one would explain it on a blackboard: count every pair, merge the most frequent one.

Slow on purpose. Pieces are lists of ids with a weight; nothing is remembered from one merge to the
next but what has been rejected.
"""

import re
from collections import Counter

from tests.input_pipeline.superbpe_cuts import cut


def merge(piece: list[int], pair: tuple[int, int], product: int) -> list[int]:
    """The piece with the pair replaced from left to right."""
    out, i = [], 0
    while i < len(piece):
        if tuple(piece[i : i + 2]) == pair:
            out.append(product)
            i += 2
        else:
            out.append(piece[i])
            i += 1
    return out


def rejected(product: str, max_words: int, colon: bool) -> bool:
    """The two rules of the published tokenizers."""
    count = len([piece for piece in product.split("Ġ") if piece])
    return (0 < max_words < count) or (colon and ":Ġ" in product)


def train(
    text: str, pattern: str, inherited, vocab_size: int, *, max_words: int = 0, colon: bool = False,
    alphabet=(),
):  # fmt: skip
    """(merges, vocabulary): replays `inherited` merges, then goes on to vocab_size tokens."""
    lines = re.findall("[^\n]*\n|[^\n]+", text)
    pieces = Counter(piece for line in lines for piece in cut(line, pattern))
    vocab = {s: i for i, s in enumerate(sorted({*alphabet, *"".join(pieces)}))}
    names = list(vocab)
    rows = [[[vocab[s] for s in piece], weight] for piece, weight in pieces.items()]
    merges, banned = [], set()

    def counts() -> Counter:
        found: Counter = Counter()
        for piece, weight in rows:
            for pair in zip(piece, piece[1:]):
                found[pair] += weight
        return found

    def apply(pair: tuple[int, int]) -> None:
        product = names[pair[0]] + names[pair[1]]
        if product not in vocab:
            vocab[product] = len(vocab)
            names.append(product)
        merges.append((names[pair[0]], names[pair[1]]))
        for row in rows:
            row[0] = merge(row[0], pair, vocab[product])

    for left, right in inherited:
        pair = vocab.get(left), vocab.get(right)
        if any(pair in zip(piece, piece[1:]) for piece, _ in rows):  # otherwise it is skipped
            apply(pair)
    while len(vocab) < vocab_size:
        left = {p: n for p, n in counts().items() if p not in banned}
        if not left:
            break
        best = min(left, key=lambda p: (-left[p], p))
        if rejected(names[best[0]] + names[best[1]], max_words, colon):
            banned.add(best)
        else:
            apply(best)
    return merges, vocab
