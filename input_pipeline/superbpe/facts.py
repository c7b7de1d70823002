"""What the veto needs to know of two tokens to judge their product without making it.

A few bits and the number of words for each token; `forbidden` is constant time and touches no
string. It is the same function in plain Python and, compiled, in numba. rules.rejected says the
same on strings, and tests compare the two.
"""

from typing import NamedTuple

import numpy as np

from input_pipeline.superbpe.rules import MARKS, NEWLINE, NUMERALS, SPACE, Veto, words

STARTS, ENDS = 1, 2  # with a space
COLON, COLON_SPACE = 4, 8  # ends with ":"; holds ": "
NEWLINES, INSIDE = 16, 32  # holds a newline; before its end
DIGIT, OTHER, MARK = 64, 128, 256  # holds an ASCII digit; anything else; ASCII punctuation
LIMIT = 255  # longer tokens and more words count as this


class Facts(NamedTuple):
    """By id: `flags` bits above, `words`, `length` in bytes; veto = (max_words, other rules)."""

    flags: np.ndarray  # int16
    words: np.ndarray  # uint8
    length: np.ndarray  # uint8
    veto: tuple[int, int, int, int, int]


def facts_of(size: int, veto: Veto) -> Facts:
    """Room for `size` ids, filled by `note`."""
    rules = (veto.max_words, veto.colon, veto.newlines, veto.digits, veto.punctuation)
    return Facts(
        np.zeros(size, np.int16),
        np.zeros(size, np.uint8),
        np.zeros(size, np.uint8),
        tuple(map(int, rules)),
    )


def note(facts: Facts, index: int, token: str) -> None:
    """Writes down what is to be known of one token in byte spelling."""
    facts.flags[index] = (
        STARTS * token.startswith(SPACE)
        | ENDS * token.endswith(SPACE)
        | COLON * token.endswith(":")
        | COLON_SPACE * (":" + SPACE in token)
        | NEWLINES * (NEWLINE in token)
        | INSIDE * (NEWLINE in token[:-1])
        | DIGIT * bool(NUMERALS.intersection(token))
        | OTHER * (not NUMERALS.issuperset(token))
        | MARK * (not MARKS.isdisjoint(token))
    )
    facts.words[index] = min(words(token), LIMIT)
    facts.length[index] = min(len(token), LIMIT)


def forbidden(left, right, facts, veto):
    """Whether the veto rejects the product of two ids."""
    a, b = facts.flags[left], facts.flags[right]
    both = a | b
    count = int(facts.words[left]) + int(facts.words[right])
    if not (a & ENDS or b & STARTS):  # one word reaches over the border
        count -= 1
    if veto[0] > 0 and count > veto[0]:
        return True
    if veto[1] and (both & COLON_SPACE or (a & COLON and b & STARTS)):
        return True
    if veto[2] and (a & NEWLINES or b & INSIDE):
        return True
    size = int(facts.length[left]) + int(facts.length[right])
    if veto[3] and both & DIGIT and (both & OTHER or size > 3):
        return True
    return bool(veto[4] and count > 1 and both & MARK)
