"""Scenes and edits: deterministic, exactly described, combinations held out."""

from collections import Counter

import numpy as np
import pytest

from configs.data import data_config
from input_pipeline import canvas, edits, scenes


@pytest.fixture(scope="module")
def names():
    return scenes.vocabulary(data_config())


def _scenes(names, split="train", count=300, size=32):
    return [scenes.make_scene(names, seed=0, index=i, size=size, split=split) for i in range(count)]


def _centre(item):
    return item.x + item.side / 2, item.y + item.side / 2


def test_same_index_same_scene(names):
    a, b = _scenes(names, count=5), _scenes(names, count=5)
    for x, y in zip(a, b):
        assert x.caption == y.caption and x.questions == y.questions
        np.testing.assert_array_equal(x.image, y.image)
    other = scenes.make_scene(names, seed=1, index=0, size=32, split="train")
    assert other.caption != a[0].caption
    large = _scenes(names, count=5, size=64)
    assert [s.items for s in large] == [s.items for s in a]  # the layout is free of pixels
    assert scenes.describe(names, seed=0, index=3, split="train") == a[3].caption


def test_every_answer_follows_from_the_items(names):
    kinds = Counter()
    for scene in _scenes(names):
        shown = Counter(names[i.glyph] for i in scene.items)
        for kind, question, answer in scene.questions:
            kinds[kind] += 1
            if question == "how many things are there?":
                assert answer == str(len(scene.items))
            elif kind == "count":
                assert answer == str(shown[question.removeprefix("how many ").rstrip("?")])
            elif kind == "colour":
                assert answer == scene.colour
            elif kind == "presence":
                name = question.removeprefix("is there ").rstrip("?")
                assert answer == ("yes" if name in shown else "no")
            else:
                _check_position(scene, names, question, answer)
    assert set(kinds) == {"count", "colour", "position", "presence"}
    assert min(kinds.values()) > 100


def _check_position(scene, names, question, answer):
    place = {names[i.glyph]: _centre(i) for i in scene.items}
    if question.startswith("where is "):
        name = question.removeprefix("where is ").rstrip("?")
        x, y = place[name]
        seen = {"left": x < 0.5, "right": x > 0.5, "top": y < 0.5, "bottom": y > 0.5}
        assert seen[answer]
    else:
        for relation, axis in (("above", 1), ("left of", 0)):
            if question.startswith(f"what is {relation} "):
                other = question.removeprefix(f"what is {relation} ").rstrip("?")
                assert place[answer][axis] + 0.3 < place[other][axis]


def test_caption_counts_and_colour(names):
    for scene in _scenes(names, count=100):
        caption, colour = scene.caption.rsplit(" on ", 1)
        assert colour == scene.colour
        np.testing.assert_array_equal(scene.image[0, 0], canvas.COLOURS[colour])
        shown = Counter(names[i.glyph] for i in scene.items)
        if scene.kind == "pair":
            assert all(name in caption for name in shown)
        else:
            for name, n in shown.items():
                assert (f"{n} {name}" in caption) or (n == 1 and caption == name)


def test_items_stay_on_the_canvas_and_apart(names):
    for scene in _scenes(names):
        for item in scene.items:
            assert 0 <= item.x <= 1 - item.side and 0 <= item.y <= 1 - item.side
        for i, a in enumerate(scene.items):
            for b in scene.items[i + 1 :]:
                (ax, ay), (bx, by) = _centre(a), _centre(b)
                assert max(abs(ax - bx), abs(ay - by)) > 0.4


def _combinations(found):
    out = set()
    for scene in found:
        glyphs = sorted({i.glyph for i in scene.items})
        out.add((*glyphs, len(scene.items) if len(glyphs) == 1 else 0))
    return out


def test_combinations_of_test_scenes_are_never_trained(names):
    train = _combinations(_scenes(names, count=2000))
    for split in ("validation", "test"):
        held = _combinations(_scenes(names, split, count=300))
        assert len(held) > 30 and not held & train


def test_colours_are_told_apart():
    values = np.array(list(canvas.COLOURS.values()), float)
    distance = np.linalg.norm(values[:, None] - values[None], axis=-1)
    assert distance[~np.eye(len(values), dtype=bool)].min() > 60


def test_edits_change_what_they_say(names):
    seen = Counter()
    for i in range(200):
        edit = edits.make_edit(names, seed=0, index=i, size=64, split="train")
        seen[edit.operation] += 1
        changed = (edit.source != edit.target).any(axis=-1)
        assert changed.any()
        np.testing.assert_array_equal(edit.target, canvas.draw(edit.colour, edit.items, 64))
        shown = {names[g.glyph] for g in edit.items}
        match edit.operation:
            case "recolour":
                assert edit.instruction == f"make the background {edit.colour}"
                np.testing.assert_array_equal(edit.target[0, 0], canvas.COLOURS[edit.colour])
            case "remove":
                assert edit.instruction.removeprefix("remove the ") not in shown and shown
            case "replace":
                old, new = edit.instruction.removeprefix("replace the ").split(" with ")
                assert new in shown and old not in shown
            case "add":
                assert edit.instruction.removeprefix("add ") in shown
        if edit.operation != "recolour":  # the background stays
            background = np.array(canvas.COLOURS[edit.colour])
            assert (edit.source[0, 0] == background).all()
    assert min(seen.values()) > 10 and len(seen) == 4


def test_too_few_glyphs_is_explained():
    with pytest.raises(ValueError, match="config.data.categories=.*at least 4"):
        scenes.vocabulary(data_config(scene_glyphs=3))
