"""Drawing scenes: colours, places on a unit canvas, and blending of cached glyphs."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from input_pipeline import openmoji

# Distinct from each other and from OpenMoji's black outlines.
COLOURS = {
    "white": (255, 255, 255),
    "grey": (160, 160, 160),
    "red": (225, 60, 50),
    "orange": (250, 150, 50),
    "yellow": (250, 225, 80),
    "green": (70, 165, 80),
    "light blue": (150, 215, 250),
    "blue": (60, 100, 220),
    "purple": (150, 90, 190),
    "pink": (250, 160, 200),
    "brown": (140, 95, 60),
}
ALONE, CROWD = 0.75, 0.46  # side of a glyph that stands alone, or among others


class Item(NamedTuple):
    """A glyph with its upper left corner and side, as fractions of the canvas."""

    glyph: str
    x: float
    y: float
    side: float


def _spot(column: float, row: float, side: float, rng: np.random.Generator) -> tuple[float, float]:
    """A place near a cell's middle, on a grid of 1/100 so that it is stored exactly."""
    jitter = rng.uniform(-0.03, 0.03, 2)
    x, y = np.clip(np.array([column, row]) - side / 2 + jitter, 0, 1 - side)
    return round(float(x), 2), round(float(y), 2)


def cell_place(cell: int, rng: np.random.Generator) -> tuple[float, float]:
    """A place in cell 0..3 (row by row) of the 2 x 2 grid."""
    return _spot(0.26 + 0.48 * (cell % 2), 0.26 + 0.48 * (cell // 2), CROWD, rng)


def place_grid(glyphs: Sequence[str], rng: np.random.Generator) -> tuple[Item, ...]:
    """One glyph in the middle, or two to four in the cells of a 2 x 2 grid."""
    if len(glyphs) == 1:
        return (Item(glyphs[0], *_spot(0.5, 0.5, ALONE, rng), ALONE),)
    cells = rng.permutation(4)[: len(glyphs)]
    return tuple(Item(g, *cell_place(int(c), rng), CROWD) for g, c in zip(glyphs, cells))


def place_pair(
    first: str, second: str, relation: str, rng: np.random.Generator
) -> tuple[Item, ...]:
    """`first` above or left of `second`; the other coordinate is free but shared."""
    free = float(rng.uniform(0.3, 0.7))
    near = (free, 0.26) if relation == "above" else (0.26, free)
    far = (free, 0.74) if relation == "above" else (0.74, free)
    return (
        Item(first, *_spot(*near, CROWD, rng), CROWD),
        Item(second, *_spot(*far, CROWD, rng), CROWD),
    )


@functools.cache
def _paths() -> dict[str, str]:
    return {g.id: g.path for g in openmoji.all_glyphs()}


@functools.lru_cache(maxsize=4096)
def _glyph(glyph: str, pixels: int) -> np.ndarray:
    return openmoji.render(_paths()[glyph], pixels, background=None).astype(np.uint16)


def draw(colour: str, items: Sequence[Item], size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the items blended onto the colour, in order."""
    out = np.empty((size, size, 3), np.uint16)
    out[:] = COLOURS[colour]
    for item in items:
        pixels = max(round(item.side * size), 1)
        top = min(round(item.y * size), size - pixels)
        left = min(round(item.x * size), size - pixels)
        glyph = _glyph(item.glyph, pixels)
        alpha = glyph[..., 3:]
        region = out[top : top + pixels, left : left + pixels]
        region[:] = (glyph[..., :3] * alpha + region * (255 - alpha) + 127) // 255
    return out.astype(np.uint8)
