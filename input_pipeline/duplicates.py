"""Finding pictures that are nearly the same: a difference hash proposes, a thumbnail decides.

The hash alone would drop drawings that differ in a detail (the digits on keycaps).
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
from PIL import Image

BITS = 64


class Fingerprint(NamedTuple):
    """What a picture is compared by."""

    hash: int  # 64 bits: is each pixel of a grey 9 x 8 thumbnail brighter than its left neighbour?
    thumbnail: np.ndarray  # int16 [16, 16, 3]


def fingerprint(image: Image.Image) -> Fingerprint:
    """Difference hash and thumbnail of a picture."""
    grey = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    pixels = np.asarray(grey, np.int16)
    bits = np.packbits((pixels[:, 1:] > pixels[:, :-1]).ravel())
    thumbnail = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.int16)
    return Fingerprint(int.from_bytes(bits.tobytes(), "big"), thumbnail)


class NearDuplicates:
    """Kept pictures, asked for one within `distance` bits and `levels` of mean difference.

    The bits are cut into distance + 1 bands. Two hashes that differ in at most `distance` bits
    agree on one band at least, so looking up equal bands misses none.
    """

    def __init__(self, distance: int, levels: float):
        if not 0 <= distance < 16:
            raise ValueError(f"config.data.curate.near={distance} is not in 0..15 bits (of {BITS})")
        self.distance, self.levels = distance, levels
        edges = np.linspace(0, BITS, distance + 2).astype(int).tolist()
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in zip(edges, edges[1:])]
        self._kept: list[defaultdict] = [defaultdict(list) for _ in self._bands]

    def _keys(self, value: int) -> list[int]:
        return [value >> low & mask for low, mask in self._bands]

    def _near(self, a: Fingerprint, b: Fingerprint) -> bool:
        if (a.hash ^ b.hash).bit_count() > self.distance:
            return False
        return float(np.abs(a.thumbnail - b.thumbnail).mean()) <= self.levels

    def find(self, picture: Fingerprint) -> str | None:
        """Name of a kept picture that is near, or None."""
        for table, key in zip(self._kept, self._keys(picture.hash)):
            for other, name in table.get(key, ()):
                if self._near(other, picture):
                    return name
        return None

    def add(self, picture: Fingerprint, name: str) -> None:
        """Keeps a picture under a name."""
        for table, key in zip(self._kept, self._keys(picture.hash)):
            table[key].append((picture, name))
