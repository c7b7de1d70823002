"""Edits of scenes: a source picture, an instruction in words, and the picture it asks for."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from input_pipeline import canvas, examples, latents, records, scenes, store, text_embeddings
from input_pipeline.canvas import COLOURS, CROWD, Item
from input_pipeline.scenes import Plan

OPERATIONS = ("recolour", "remove", "replace", "add")


class Edit(NamedTuple):
    """Pictures before and after, uint8 [size, size, 3], and the instruction between them."""

    source: np.ndarray
    instruction: str
    target: np.ndarray
    operation: str
    colour: str  # of the target
    items: tuple[Item, ...]  # of the target


def _free_cells(items: tuple[Item, ...]) -> list[int]:
    taken = {int(i.x + i.side / 2 > 0.5) + 2 * int(i.y + i.side / 2 > 0.5) for i in items}
    return [c for c in range(4) if c not in taken]


def _edit(
    before: Plan, names: dict[str, str], operation: str, rng: np.random.Generator
) -> tuple[str, str, tuple[Item, ...]] | None:
    """(instruction, colour, items) after the operation, or None where it cannot be done."""
    shown = list(dict.fromkeys(i.glyph for i in before.items))
    chosen = shown[rng.integers(len(shown))]
    others = [g for g in names if g not in shown]
    other = others[rng.integers(len(others))]
    match operation:
        case "recolour":
            colours = [c for c in COLOURS if c != before.colour]
            colour = colours[rng.integers(len(colours))]
            return f"make the background {colour}", colour, before.items
        case "remove":
            left = tuple(i for i in before.items if i.glyph != chosen)
            return (f"remove the {names[chosen]}", before.colour, left) if left else None
        case "replace":
            items = tuple(i._replace(glyph=other) if i.glyph == chosen else i for i in before.items)
            return f"replace the {names[chosen]} with {names[other]}", before.colour, items
        case "add":
            cells = _free_cells(before.items)
            if before.kind == "pair" or len(before.items) == 1 or not cells:
                return None  # there is no free place of the usual size
            cell = cells[rng.integers(len(cells))]
            place = canvas.cell_place(cell, rng)
            return f"add {names[other]}", before.colour, (*before.items, Item(other, *place, CROWD))
    raise ValueError(f"operation {operation!r} is none of {', '.join(OPERATIONS)}")


def make_edit(names: dict[str, str], *, seed: int, index: int, size: int, split: str) -> Edit:
    """The edit of (seed, index) in a split; its source is a scene of that split."""
    rng = np.random.default_rng([seed, scenes.KIND_SALT[split], index, 1])
    while True:
        before = scenes.plan(names, rng, split)
        operation = OPERATIONS[rng.integers(len(OPERATIONS))]
        if after := _edit(before, names, operation, rng):
            break
    instruction, colour, items = after
    source = canvas.draw(before.colour, before.items, size)
    return Edit(source, instruction, canvas.draw(colour, items, size), operation, colour, items)


class Edits(records.ImageTextBuilder):
    """Edits of OpenMoji scenes: records 2i and 2i + 1 are before and after, CC BY-SA 4.0."""

    name = "edits"

    def __init__(self, *, names: dict[str, str], counts: dict[str, int], size: int, **kwargs):
        self._names, self._counts, self._size = names, counts, size
        super().__init__(**kwargs)

    def examples(self, split: str) -> Iterator[records.Example]:
        """Yields source and target of each edit by index."""
        for index in range(self._counts[split]):
            edit = make_edit(
                self._names, seed=scenes.SEED, index=index, size=self._size, split=split
            )
            captions = {"en": edit.instruction}
            category = edit.operation
            yield records.Example(f"{split}-{index}-before", edit.source, {}, (), category)
            yield records.Example(f"{split}-{index}-after", edit.target, captions, (), category)


def prepare(data, size: int) -> Path:
    """Folder of the stored edits, made on first use; as many as config.data.scenes."""
    names = scenes.vocabulary(data)
    few = max(data.scenes // 10, 1)
    counts = {"train": data.scenes, "validation": few, "test": few}
    digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:8]
    key = f"edits-{Edits.VERSION}-{size}px-{data.scenes}-{digest}"
    return store.prepare_once(
        data, key, lambda path: records.write(path, Edits, names=names, counts=counts, size=size)
    )


def load(data, split: str, size: int) -> examples.Examples:
    """The stored edits of one split, before and after in turn."""
    return examples.load(data, prepare(data, size), split, size)


def generation(config, split: str, texts) -> tuple[int, Callable]:
    """(count, make(indices, u)) of generation rows that edit a source picture."""
    data = config.data
    found = load(data, split, data.image_size)
    seen = load(data, split, data.und_size or data.image_size)
    moments = latents.moments(config, found, split) if data.latents else None
    embedded = text_embeddings.captions(config, found) if data.text_embeddings else None

    def make(chosen: np.ndarray, u: np.ndarray) -> dict[str, np.ndarray]:
        before, after = 2 * chosen, 2 * chosen + 1
        captions = [found.items[i].captions["en"] for i in after]
        got = [texts.prompt(caption) for caption in captions]
        out = {
            "gen_tokens": np.array([row.tokens for row in got], np.int32),
            "gen_length": np.array([row.length for row in got], np.int32),
            "gen_source_image": seen.pictures.gather(before),
        }
        out |= embedded.batch(captions) if embedded else {}
        if moments is None:
            return out | {"gen_image": found.pictures.gather(after)}
        return out | {"gen_moments": moments[after], "gen_source_moments": moments[before]}

    return len(found) // 2, make
