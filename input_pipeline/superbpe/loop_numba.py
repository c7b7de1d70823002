"""The merge loop in numba: flat arrays, every step in time of what it changes.

The text stays where it is. A token that was merged occupies several cells: its first cell holds
its id, the others DEAD; the first cell's `link` is its end, the last cell's its beginning, so both
neighbours are found at once. All positions of a pair are a doubly linked list through `after` and
`before`, for a position begins one pair at most: 20 bytes a cell, however many merges follow.

Pairs live in slots (key, count, first position), found by an open-addressing table of
left << 32 | right. The heap orders (-count, key); an entry is out of date when its count is not
the slot's, and then goes back with the right one. Pairs whose product the veto forbids get no slot:
the veto reads a few numbers of the two tokens (`facts.py`).
"""

from typing import NamedTuple

import numba
import numpy as np

from input_pipeline.superbpe.facts import Facts, forbidden
from input_pipeline.superbpe.pieces import Pieces

DEAD = -2  # separators are -1: both are below every id
NONE = -1
LEAST = 1 << 12  # slots to begin with
USED, HEAPED, CHANGED = 0, 1, 2  # places in Text.sizes: slots, heap entries, changed slots
_forbidden = numba.njit(cache=True)(forbidden)


class Text(NamedTuple):
    """The pieces and, for each position, its pair's list."""

    ids: np.ndarray
    link: np.ndarray
    after: np.ndarray
    before: np.ndarray
    weights: np.ndarray


class Pairs(NamedTuple):
    """Slots of pairs with their table."""

    key: np.ndarray  # int64: left << 32 | right
    count: np.ndarray  # int64
    first: np.ndarray  # first position, NONE without
    size: np.ndarray  # positions in the list
    queued: np.ndarray  # count under which the heap holds it, 0 where it does not
    table: np.ndarray  # slots by hash of the key, NONE where empty
    sizes: np.ndarray  # int64: USED, HEAPED, CHANGED
    changed: np.ndarray  # slots whose count grew in this merge, some several times


class Heap(NamedTuple):
    """Binary heap by (-count, key)."""

    count: np.ndarray
    key: np.ndarray
    slot: np.ndarray


@numba.njit(cache=True)
def _find(key, pairs):
    """Place in the table where the key is or would go."""
    mask = len(pairs.table) - 1
    h = key * np.int64(-7046029254386353131)  # 2^64 / golden ratio
    place = (h ^ (h >> 29)) & mask
    while pairs.table[place] != NONE and pairs.key[pairs.table[place]] != key:
        place = (place + 1) & mask
    return place


@numba.njit(cache=True)
def _slot(left, right, pairs):
    """Slot of a pair, NONE when it has none."""
    return pairs.table[_find(np.int64(left) << 32 | np.int64(right), pairs)]


@numba.njit(cache=True)
def _insert(at, left, right, text, pairs):
    """Adds position `at` to the pair's list; makes a slot for a new pair."""
    key = np.int64(left) << 32 | np.int64(right)
    place = _find(key, pairs)
    slot = pairs.table[place]
    if slot == NONE:
        slot = pairs.sizes[USED]
        pairs.sizes[USED] += 1
        pairs.table[place] = slot
        pairs.key[slot], pairs.count[slot], pairs.size[slot] = key, 0, 0
        pairs.first[slot], pairs.queued[slot] = NONE, 0
    first = pairs.first[slot]
    text.after[at], text.before[at] = first, NONE
    if first != NONE:
        text.before[first] = at
    pairs.first[slot] = at
    pairs.count[slot] += text.weights[at]
    pairs.size[slot] += 1
    return slot


@numba.njit(cache=True)
def _remove(at, left, right, text, pairs):
    """Takes position `at` out of the pair's list; nothing for a pair that the veto forbids."""
    slot = _slot(left, right, pairs)
    if slot == NONE:
        return
    after, before = text.after[at], text.before[at]
    if before == NONE:
        pairs.first[slot] = after
    else:
        text.after[before] = after
    if after != NONE:
        text.before[after] = before
    pairs.count[slot] -= text.weights[at]
    pairs.size[slot] -= 1


@numba.njit(cache=True)
def _before(a, b, heap):
    """Whether heap entry a comes before entry b."""
    if heap.count[a] != heap.count[b]:
        return heap.count[a] > heap.count[b]
    return heap.key[a] < heap.key[b]


@numba.njit(cache=True)
def _swap(a, b, heap):
    heap.count[a], heap.count[b] = heap.count[b], heap.count[a]
    heap.key[a], heap.key[b] = heap.key[b], heap.key[a]
    heap.slot[a], heap.slot[b] = heap.slot[b], heap.slot[a]


@numba.njit(cache=True)
def _push(slot, pairs, heap):
    """Puts a slot into the heap under its present count."""
    i = pairs.sizes[HEAPED]
    pairs.sizes[HEAPED] += 1
    count = pairs.count[slot]
    heap.count[i], heap.key[i], heap.slot[i] = count, pairs.key[slot], slot
    pairs.queued[slot] = count
    while i > 0 and _before(i, (i - 1) // 2, heap):
        _swap(i, (i - 1) // 2, heap)
        i = (i - 1) // 2


@numba.njit(cache=True)
def _sink(i, size, heap):
    """Moves entry i down to where it belongs."""
    while True:
        best = i
        for child in (2 * i + 1, 2 * i + 2):
            if child < size and _before(child, best, heap):
                best = child
        if best == i:
            return
        _swap(i, best, heap)
        i = best


@numba.njit(cache=True)
def refill(pairs, heap):
    """Makes the heap anew from all pairs that occur."""
    size = 0
    for slot in range(pairs.sizes[USED]):
        pairs.queued[slot] = pairs.count[slot]
        if pairs.count[slot] > 0:
            heap.count[size], heap.key[size] = pairs.count[slot], pairs.key[slot]
            heap.slot[size] = slot
            size += 1
    pairs.sizes[HEAPED] = size
    for i in range(size // 2 - 1, -1, -1):
        _sink(i, size, heap)


@numba.njit(cache=True)
def top(pairs, heap):
    """The slot of the most frequent pair, taken out of the heap; NONE when there is none."""
    while pairs.sizes[HEAPED] > 0:
        count, slot = heap.count[0], heap.slot[0]
        last = pairs.sizes[HEAPED] - 1
        pairs.sizes[HEAPED] = last
        heap.count[0], heap.key[0], heap.slot[0] = heap.count[last], heap.key[last], heap.slot[last]
        _sink(0, last, heap)
        if count != pairs.queued[slot]:  # a later entry of this pair holds
            continue
        pairs.queued[slot] = 0
        if pairs.count[slot] == count:
            return slot
        if pairs.count[slot] > 0:
            _push(slot, pairs, heap)
    return NONE


@numba.njit(cache=True)
def count_pairs(start, stop, text, pairs, facts, veto):
    """Fills lists and counts from position stop - 1 down to start, so that lists ascend.

    Returns the position before which it stopped for want of slots, or start.
    """
    for at in range(stop - 1, start - 1, -1):
        left, right = text.ids[at], text.ids[at + 1]
        if left < 0 or right < 0 or _forbidden(left, right, facts, veto):
            continue
        if 2 * (pairs.sizes[USED] + 1) > len(pairs.table):
            return at + 1
        _insert(at, left, right, text, pairs)
    return start


@numba.njit(cache=True)
def _join(at, left, right, product, text, pairs, facts, veto):
    """Makes the pair at one position its product, with all that this changes beside it."""
    ids, link = text.ids, text.link
    middle = link[at] if ids[at + 1] == DEAD else at + 1
    end = link[middle] if ids[middle + 1] == DEAD else middle + 1
    previous = link[at - 1] if ids[at - 1] == DEAD else at - 1
    if ids[previous] >= 0:
        _remove(previous, ids[previous], left, text, pairs)
    if ids[end] >= 0:
        _remove(middle, right, ids[end], text, pairs)
    ids[at], ids[middle] = product, DEAD
    link[at], link[end - 1] = end, at
    if ids[previous] >= 0 and not _forbidden(ids[previous], product, facts, veto):
        _grown(_insert(previous, ids[previous], product, text, pairs), pairs)
    if ids[end] >= 0 and not _forbidden(product, ids[end], facts, veto):
        _grown(_insert(at, product, ids[end], text, pairs), pairs)


@numba.njit(cache=True)
def _grown(slot, pairs):
    pairs.changed[pairs.sizes[CHANGED]] = slot
    pairs.sizes[CHANGED] += 1


@numba.njit(cache=True)
def merge(slot, left, right, product, text, pairs, heap, facts, veto):
    """Replaces the pair everywhere, from left to right where occurrences overlap."""
    places = np.empty(pairs.size[slot], text.after.dtype)
    at, pairs.sizes[CHANGED] = pairs.first[slot], 0
    for i in range(len(places)):
        places[i] = at
        at = text.after[at]
    if left == right:
        places.sort()  # in "aaa" only the first "aa" is one
    # No list of this pair any more: nothing else of it is left when all is done.
    for at in places:
        if text.ids[at] != left:
            continue  # was the right half of the one before
        if left == right:
            middle = text.link[at] if text.ids[at + 1] == DEAD else at + 1
            if text.ids[middle] != right:
                continue
        _join(at, left, right, product, text, pairs, facts, veto)
    pairs.count[slot], pairs.size[slot], pairs.first[slot] = 0, 0, NONE
    for i in range(pairs.sizes[CHANGED]):
        changed = pairs.changed[i]
        if pairs.count[changed] > pairs.queued[changed]:
            _push(changed, pairs, heap)


@numba.njit(cache=True)
def _table(pairs):
    """Enters every slot into an empty table."""
    for slot in range(pairs.sizes[USED]):
        pairs.table[_find(pairs.key[slot], pairs)] = slot


class Loop:
    """The pieces and their pairs; facts.flags and facts.words hold every token that may come."""

    def __init__(self, pieces: Pieces, facts: Facts):
        ids = pieces.ids.copy()
        place = np.int32 if len(ids) < 2**31 else np.int64
        cells = [np.empty(len(ids), place) for _ in range(3)]
        self.text = Text(ids, *cells, pieces.weights)
        self.facts, self.veto = facts, facts.veto
        self.pairs = _empty_pairs(LEAST, place)
        self.heap = _empty_heap(0)
        at = len(ids) - 1
        while (at := count_pairs(0, at, self.text, self.pairs, facts, self.veto)) > 0:
            self._grow(len(self.pairs.key))
        self._grow(0)
        self._slot = NONE

    def _grow(self, more: int) -> None:
        """Drops the slots of pairs that are gone, makes room for `more`, and a new heap."""
        old, live = self.pairs, np.flatnonzero(self.pairs.count[: self.pairs.sizes[USED]])
        pairs = _empty_pairs(max(LEAST, len(live) + len(live) // 2 + more), old.first.dtype)
        for name in ("key", "count", "first", "size"):
            getattr(pairs, name)[: len(live)] = getattr(old, name)[live]
        pairs.sizes[USED] = len(live)
        self.pairs = pairs
        del old
        _table(pairs)
        self.heap = _empty_heap(len(pairs.key) + len(live) // 2)
        refill(pairs, self.heap)

    def pop(self) -> tuple[int, int, int] | None:
        """(left, right, count) of the most frequent pair; None when none is left."""
        self._slot = top(self.pairs, self.heap)
        if self._slot == NONE:
            return None
        key = int(self.pairs.key[self._slot])
        return key >> 32, key & 0xFFFFFFFF, int(self.pairs.count[self._slot])

    def merge(self, left: int, right: int, product: int) -> None:
        """Replaces the pair, the last one popped, by its product everywhere."""
        pairs, most = self.pairs, 2 * int(self.pairs.size[self._slot])
        room = min(len(pairs.key) - pairs.sizes[USED], len(self.heap.key) - pairs.sizes[HEAPED])
        if most > room:
            self._grow(most)
            key = left << 32 | right
            self._slot = _find(np.int64(key), self.pairs)
            self._slot = self.pairs.table[self._slot]
            self.pairs.queued[self._slot] = 0  # its entry in the new heap is out of date
        if most > len(self.pairs.changed):
            self.pairs = self.pairs._replace(changed=np.empty(2 * most, np.int32))
        where, rules = (self.text, self.pairs, self.heap), (self.facts, self.veto)
        merge(self._slot, left, right, product, *where, *rules)

    def tokens(self) -> int:
        """Tokens of all pieces, repeated pieces counted every time."""
        return int(self.text.weights[self.text.ids >= 0].sum(dtype=np.int64))


def _empty_pairs(slots: int, place: type) -> Pairs:
    table = 1 << max(2 * slots - 1, 1).bit_length()
    slots = table // 2
    return Pairs(
        key=np.empty(slots, np.int64),
        count=np.zeros(slots, np.int64),
        first=np.empty(slots, place),
        size=np.empty(slots, place),
        queued=np.zeros(slots, np.int64),
        table=np.full(table, NONE, np.int32),
        sizes=np.zeros(3, np.int64),
        changed=np.empty(LEAST, np.int32),
    )


def _empty_heap(size: int) -> Heap:
    return Heap(np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int32))
