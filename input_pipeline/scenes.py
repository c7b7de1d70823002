"""Scenes composed of OpenMoji glyphs on a coloured canvas, with exact questions and answers.

A scene is drawn from (seed, index) alone. Which glyphs stand together, or how often one is
repeated, is held out by hash: a test scene shows a combination no training scene shows.
"""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from input_pipeline import canvas, examples, openmoji, records, store
from input_pipeline.canvas import COLOURS, Item
from input_pipeline.examples import Examples
from input_pipeline.records import Question

SEED = 0  # stored sets are drawn once from this seed
KINDS = ("count", "pair", "mixed")
SIDES = {"above": ("top", "bottom"), "left of": ("left", "right")}
GRAMMAR = frozenset({"and", "with", "on", "above", "left"})  # names with these would be ambiguous
KIND_SALT = {"train": 0, "validation": 1, "test": 2}


class Scene(NamedTuple):
    """A picture, what it shows in words, and in numbers (`items`: glyph id, x, y, side)."""

    image: np.ndarray  # uint8 [size, size, 3]
    caption: str
    questions: tuple[Question, ...]
    colour: str
    items: tuple[Item, ...]
    kind: str


class Plan(NamedTuple):
    """A scene before it is drawn; `first` and `second` are (name, copies)."""

    kind: str
    colour: str
    relation: str
    items: tuple[Item, ...]
    first: tuple[str, int]
    second: tuple[str, int]


def vocabulary(data) -> dict[str, str]:
    """Glyph id -> English name of what scenes may show: at most config.data.scene_glyphs."""
    if "all" in data.categories:
        allowed = {"food", "nature", "travel", "activity", "objects"}
    else:
        allowed = set(data.categories)
    found = {
        g.id: g.names["en"]
        for g in openmoji.all_glyphs()
        if g.split == "train" and g.category in allowed and _plain(g)
    }
    # By hash, not by code point: neighbours look alike.
    order = sorted(found, key=lambda i: hashlib.sha256(i.encode()).digest())
    kept = order[: data.scene_glyphs] if data.scene_glyphs else order
    if len(kept) < 4:
        raise ValueError(
            f"config.data.categories={tuple(data.categories)} and scene_glyphs="
            f"{data.scene_glyphs} leave {len(kept)} glyphs for scenes; at least 4"
        )
    return {i: found[i] for i in sorted(kept)}


def _plain(glyph: openmoji.Glyph) -> bool:
    english = glyph.names["en"]
    return (
        "-" not in glyph.id.replace("-FE0F", "")
        and len(english) <= 20
        and english.isascii()
        and english.replace(" ", "").isalpha()
        and GRAMMAR.isdisjoint(english.split())
    )


@functools.cache
def held_out(combination: str) -> str:
    """The split that owns a combination of glyphs, or of a glyph and a count."""
    return openmoji.split_of("scene " + combination)


def plan(names: dict[str, str], rng: np.random.Generator, split: str) -> Plan:
    """Draws kind, glyphs, colour and places until the combination belongs to the split."""
    ids = list(names)
    while True:
        kind = KINDS[rng.integers(len(KINDS))]
        i, step = rng.integers(len(ids)), rng.integers(1, len(ids))
        a, b = ids[i], ids[(i + step) % len(ids)]
        if kind == "count":
            n, m = int(rng.integers(1, 5)), 0
            combination = f"{a} {n}"
        else:
            n, m = (1, 1) if kind == "pair" else ((1, 2), (2, 1), (2, 2))[rng.integers(3)]
            combination = " ".join(sorted((a, b)))
        if held_out(combination) == split:
            break
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    relation = ""
    if kind == "pair":
        relation = list(SIDES)[rng.integers(2)]
        items = canvas.place_pair(a, b, relation, rng)
    else:
        items = canvas.place_grid([a] * n + [b] * m, rng)
    return Plan(kind, colour, relation, items, (names[a], n), (names[b] if m else "", m))


def caption(scene: Plan) -> str:
    """The scene in English words: "3 snail on pink", "turtle above heart on white"."""
    (a, n), (b, m) = scene.first, scene.second
    if scene.kind == "pair":
        return f"{a} {scene.relation} {b} on {scene.colour}"
    if m:
        return f"{n} {a} and {m} {b} on {scene.colour}"
    return f"{n} {a} on {scene.colour}" if n > 1 else f"{a} on {scene.colour}"


def questions(scene: Plan, names: dict[str, str], rng: np.random.Generator) -> tuple[Question, ...]:
    """Questions whose answers follow from the plan, at least one per kind that applies."""
    (a, n), (b, m) = scene.first, scene.second
    out = [
        Question("count", f"how many {a}?", str(n)),
        Question("count", "how many things are there?", str(n + m)),
        Question("colour", "what colour is the background?", scene.colour),
    ]
    if scene.kind == "mixed":
        out.append(Question("count", f"how many {b}?", str(m)))
    if scene.kind == "pair":
        near, far = SIDES[scene.relation]
        out.append(Question("position", f"what is {scene.relation} {b}?", a))
        out.append(Question("position", f"where is {a}?", near))
        out.append(Question("position", f"where is {b}?", far))
    absent = [name for name in names.values() if name not in (a, b)]
    out.append(Question("presence", f"is there {a}?", "yes"))
    out.append(Question("presence", f"is there {absent[rng.integers(len(absent))]}?", "no"))
    return tuple(out)


def make_scene(names: dict[str, str], *, seed: int, index: int, size: int, split: str) -> Scene:
    """The scene of (seed, index) in a split, drawn from the glyphs `names` (id -> name)."""
    rng = np.random.default_rng([seed, KIND_SALT[split], index])
    made = plan(names, rng, split)
    asked = questions(made, names, rng)
    image = canvas.draw(made.colour, made.items, size)
    return Scene(image, caption(made), asked, made.colour, made.items, made.kind)


def describe(names: dict[str, str], *, seed: int, index: int, split: str) -> str:
    """The caption of a scene without drawing it."""
    return caption(plan(names, np.random.default_rng([seed, KIND_SALT[split], index]), split))


def phrases() -> list[str]:
    """Texts with every word that captions, questions and instructions of scenes are made of."""
    words = ["how many ?", "how many things are there?", "what colour is the background?"]
    words += ["is there ?", "where is ?", "what is above ?", "what is left of ?", "yes", "no"]
    words += ["top", "bottom", "left", "right", "1 and 2 on", "3 and 4 on", "caption en"]
    words += ["make the background", "remove the", "add", "replace the with", "above on"]
    return (words + [f"on {c}" for c in COLOURS]) * 50  # weight, so that each word is one token


class Scenes(records.ImageTextBuilder):
    """Scenes composed of OpenMoji glyphs, with captions and questions, CC BY-SA 4.0."""

    name = "scenes"

    def __init__(self, *, names: dict[str, str], counts: dict[str, int], size: int, **kwargs):
        self._names, self._counts, self._size = names, counts, size
        super().__init__(**kwargs)

    def examples(self, split: str) -> Iterator[records.Example]:
        """Yields the scenes of a split by index."""
        for index in range(self._counts[split]):
            scene = make_scene(self._names, seed=SEED, index=index, size=self._size, split=split)
            spec = {"colour": scene.colour, "items": scene.items, "kind": scene.kind}
            yield records.Example(
                f"{split}-{index}",
                scene.image,
                {"en": scene.caption},
                scene.questions,
                scene.kind,
                spec=spec,
            )


def prepare(data, size: int) -> Path:
    """Folder of the stored scenes, made on first use."""
    names = vocabulary(data)
    few = max(data.scenes // 10, 1)
    counts = {"train": data.scenes, "validation": few, "test": few}
    digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:8]
    key = f"scenes-{Scenes.VERSION}-{size}px-{data.scenes}-{digest}"
    return store.prepare_once(
        data,
        key,
        lambda path: records.write(path, Scenes, names=names, counts=counts, size=size),
    )


def load(data, split: str, size: int) -> Examples:
    """The stored scenes of one split."""
    return examples.load(data, prepare(data, size), split, size)
