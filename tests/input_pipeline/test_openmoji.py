"""OpenMoji: counts, names, split, groups and the exact rendering."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from configs.data import LANGUAGES, data_config
from input_pipeline import openmoji

# Of uint8 [3953, 64, 64, 3] in file-name order on white.
SHA256 = "3bc6d1fce696b2ce4fe2a80bfad1e559bd97d10033a41ff6633fbae29880a3d7"


@pytest.fixture(scope="module")
def glyphs():
    return openmoji.all_glyphs()


def test_names_in_14_languages(glyphs):
    assert len(glyphs) == 3953
    assert all(tuple(g.names) == LANGUAGES for g in glyphs)
    assert sum(len(g.names) for g in glyphs) == 55_342
    english = [g.names["en"] for g in glyphs]
    assert len(set(english)) == 3953
    assert not any(
        ":" in n and n.startswith(":") or "_" in n for g in glyphs for n in g.names.values()
    )


def test_split_by_base_glyph(glyphs):
    assert Counter(g.split for g in glyphs) == {"train": 3583, "validation": 155, "test": 215}
    of_base: dict[str, set] = {}
    for g in glyphs:
        base = openmoji.base_glyph(openmoji.characters(g.id))
        of_base.setdefault(base, set()).add(g.split)
    assert all(len(splits) == 1 for splits in of_base.values())


def test_categories_and_flags(glyphs):
    counts = Counter(g.category for g in glyphs)
    assert counts["people"] == 2160 and counts["food"] == 130 and counts["nature"] == 214
    assert counts["flags"] == 270 and counts["other"] == 3953 - 3790
    named = {g.names["en"]: g for g in glyphs}
    assert "flag of Kuwait" in named and "snail" in named and "Kuwait" not in named
    assert sum(n.startswith("flag of") for n in named) >= 258


def test_pixels_are_the_recorded_ones():
    found = openmoji.load_glyphs(data_config(), "all", 64)
    order = np.argsort(np.array(found.ids))
    assert found.images.shape == (3953, 64, 64, 3)
    files = [g.path.name for g in openmoji.all_glyphs()]
    by_file = {name: i for i, name in enumerate(found.ids)}
    order = [by_file[name.removesuffix(".svg")] for name in files]
    assert hashlib.sha256(found.images[order].tobytes()).hexdigest() == SHA256


def test_equal_pictures_share_a_group():
    found = openmoji.load_glyphs(data_config(), "all", 64)
    sizes = Counter(found.group.tolist())
    assert len(sizes) == 3731 and sum(n > 1 for n in sizes.values()) == 182
    row = {name["en"]: i for i, name in enumerate(found.names)}
    assert found.group[row["farmer"]] == found.group[row["man farmer"]]
    groups = {
        split: openmoji.load_glyphs(data_config(), split, 64).group.tolist()
        for split in ("train", "validation", "test")
    }
    seen = {k: sum(g in set(groups["train"]) for g in v) for k, v in groups.items()}
    assert seen == {"train": 3583, "validation": 0, "test": 30}  # docs/data.md says so
    by_pixels: dict[bytes, set] = {}
    for image, group in zip(found.images, found.group):
        by_pixels.setdefault(image.tobytes(), set()).add(int(group))
    assert all(len(groups) == 1 for groups in by_pixels.values())


def test_config_chooses_categories_and_skin_tones():
    data = data_config(categories=("food", "people"), skin_tones=False)
    found = openmoji.load_glyphs(data, "train", 64)
    assert set(found.category) == {"food", "people"}
    assert not any(openmoji.has_tone(i) for i in found.ids)
    everything = openmoji.load_glyphs(data_config(), "all", 64)
    assert sum(map(openmoji.has_tone, everything.ids)) == 2035
    with pytest.raises(
        ValueError, match=r"config.data.categories=.*'fod' is none of all, activity"
    ):
        openmoji.load_glyphs(data_config(categories=("fod",)), "train", 64)
