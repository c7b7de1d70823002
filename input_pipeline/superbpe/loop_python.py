"""The merge loop without numba: the same merges, in plain Python.

Every different piece is a list of tokens with a weight. For each pair: how often it occurs (every
adjacent position, so "aaa" holds "a a" twice) and in which pieces; a heap of (-count, left, right)
gives the most frequent pair, ties to the smaller ids. Entries whose count has changed since are
put back with the right one.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from input_pipeline.superbpe.pieces import SEPARATOR, Pieces


class Loop:
    """Counts of pairs, and the pieces that they are in."""

    def __init__(self, pieces: Pieces, allowed: Callable[[int, int], bool]):
        self.allowed = allowed
        borders = np.flatnonzero(pieces.ids == SEPARATOR)
        self.pieces = [pieces.ids[a + 1 : b].tolist() for a, b in pairwise(borders.tolist())]
        self.weights = [int(pieces.weights[a]) for a in borders[:-1].tolist()]
        self.counts: dict[tuple[int, int], int] = defaultdict(int)
        self.where: dict[tuple[int, int], set[int]] = defaultdict(set)
        for number in range(len(self.pieces)):
            self._add(number, +1)
        self.heap = [(-count, *pair) for pair, count in self.counts.items()]
        heapq.heapify(self.heap)

    def _add(self, number: int, sign: int) -> set[tuple[int, int]]:
        """Adds the pairs of a piece to the counts, or takes them away."""
        changed = set()
        weight = sign * self.weights[number]
        for pair in pairwise(self.pieces[number]):
            if self.allowed(*pair):
                self.counts[pair] += weight
                changed.add(pair)
                if sign > 0:
                    self.where[pair].add(number)
                else:
                    self.where[pair].discard(number)
        return changed

    def pop(self) -> tuple[int, int, int] | None:
        """(left, right, count) of the most frequent pair; None when none is left."""
        while self.heap:
            negative, *pair = heapq.heappop(self.heap)
            count = self.counts.get(tuple(pair), 0)
            if count == -negative > 0:
                return *pair, count
            if 0 < count < -negative:  # had it grown, it would be in the heap once more
                heapq.heappush(self.heap, (-count, *pair))
        return None

    def merge(self, left: int, right: int, product: int) -> None:
        """Replaces the pair by its product everywhere, from left to right."""
        changed: set[tuple[int, int]] = set()
        for number in sorted(self.where.pop((left, right), ())):
            changed |= self._add(number, -1)
            old, new, i = self.pieces[number], [], 0
            while i < len(old):
                if old[i] == left and i + 1 < len(old) and old[i + 1] == right:
                    new.append(product)
                    i += 2
                else:
                    new.append(old[i])
                    i += 1
            self.pieces[number] = new
            changed |= self._add(number, +1)
        for pair in changed:
            if count := self.counts[pair]:
                heapq.heappush(self.heap, (-count, *pair))
            else:
                del self.counts[pair]
                self.where.pop(pair, None)

    def tokens(self) -> int:
        """Tokens of all pieces, repeated pieces counted every time."""
        return sum(w * len(p) for w, p in zip(self.weights, self.pieces))
