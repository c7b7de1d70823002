"""Contact sheets: pictures with captions in whatever scripts the machine's fonts can draw."""

import functools
import importlib.util
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

INK, GREY, GOOD, BAD = (20, 20, 20), (120, 120, 120), (0, 110, 40), (180, 20, 20)
MARGIN = 8


class Line(NamedTuple):
    """One line of text below or beside pictures."""

    text: str
    colour: tuple[int, int, int] = INK


@functools.cache
def _fonts() -> tuple[tuple[str, frozenset[int]], ...]:
    """(path, code points) of every font to choose from, the first that fits is taken.

    DejaVu Sans, which matplotlib brings along, Noto Sans CJK of the extra "fonts", system fonts.
    """
    from matplotlib import font_manager, ft2font, get_data_path

    found = [Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"]
    if extra := importlib.util.find_spec("mplfonts"):
        folder = Path(next(iter(extra.submodule_search_locations)))
        found += sorted(folder.glob("fonts/NotoSansCJK*"))
    fonts = []
    for path in [*map(str, found), *sorted(font_manager.findSystemFonts())]:
        try:
            fonts.append((path, frozenset(ft2font.FT2Font(path).get_charmap())))
        except (RuntimeError, OSError):  # bitmap fonts and the like
            continue
    return tuple(fonts)


@functools.lru_cache(maxsize=4096)
def _font_path(text: str) -> str | None:
    """The first font that has every character of the text, or None."""
    needed = {ord(c) for c in text if not c.isspace()}
    joined = any(unicodedata.bidirectional(c) in ("R", "AL") for c in text)
    if joined and not features.check("raqm"):  # letters would stand apart and the wrong way round
        return None
    return next((path for path, have in _fonts() if needed <= have), None)


def can_draw(text: str) -> bool:
    """Whether some font here has every character, and right-to-left text would be joined."""
    return _font_path(text) is not None


def label(lang: str, text: str) -> str:
    """A caption with its language; a note where no font here has its script."""
    if not can_draw(text):
        _say_once("pictures: no font here for some scripts; pip install -e '.[fonts]'")
        text = "(no font for this script)"
    return f"{lang}: {text}"


@functools.cache
def _say_once(note: str) -> None:
    print(note, flush=True)


def _prepare(text: str, size: int):
    """(drawable text, font): what no font can draw is written as escapes."""
    path = _font_path(text)
    if path is None:
        text = text.encode("ascii", "backslashreplace").decode()
        path = _font_path(text)
    return text, ImageFont.truetype(path, size)


def _write(draw, xy, line: Line, size: int, width: int, most: int) -> None:
    """Text broken into at most `most` lines of `width` pixels."""
    text, font = _prepare(" ".join(line.text.split()), size)
    letters = max(4, int(width / max(font.getlength(text) / max(len(text), 1), 1)))
    lines = textwrap.wrap(text, letters)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][: letters - 1] + "…"]
    for i, part in enumerate(lines):
        draw.text((xy[0], xy[1] + i * (size + 4)), part, fill=line.colour, font=font)


def upscale(image: np.ndarray, side: int) -> Image.Image:
    """uint8 [h, w, 3] with `side` pixels along its longer side: nearest for small ones, Lanczos
    down."""
    picture = Image.fromarray(np.asarray(image, np.uint8))
    longest = max(picture.size)
    method = Image.Resampling.NEAREST if side >= longest else Image.Resampling.LANCZOS
    return picture.resize([max(1, round(n * side / longest)) for n in picture.size], method)


def picture_grid(path, title: str, sections: Sequence, *, columns: int, side: int = 96) -> None:
    """PNG of sections [(heading, [(pictures side by side, caption)])]; pictures uint8 [h, w, 3]."""
    most = max(len(pictures) for _, cells in sections for pictures, _ in cells)
    cell_w, cell_h = most * (side + 2) + MARGIN, side + 42
    rows = [-(-len(cells) // columns) for _, cells in sections]
    width = columns * cell_w + MARGIN
    height = 34 + sum(26 + r * cell_h for r in rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, (MARGIN, 8), Line(title), 14, width - 2 * MARGIN, 1)
    top = 34
    for (heading, cells), r in zip(sections, rows):
        _write(draw, (MARGIN, top), Line(heading, GREY), 13, width - 2 * MARGIN, 1)
        for i, (pictures, caption) in enumerate(cells):
            x, y = MARGIN + i % columns * cell_w, top + 24 + i // columns * cell_h
            for j, picture in enumerate(pictures):
                sheet.paste(upscale(picture, side), (x + j * (side + 2), y))
            _write(draw, (x, y + side + 3), Line(caption), 11, cell_w - MARGIN, 2)
        top += 26 + r * cell_h
    _save(sheet, path)


def text_rows(path, title: str, rows: Sequence, *, columns: int = 2, side: int = 112) -> None:
    """PNG of rows [(picture, [Line, ...])]: each picture with lines of text to its right."""
    text_w, line_h = 300, 16
    cell_w = side + text_w + 3 * MARGIN
    cell_h = max(side, line_h * max(len(lines) for _, lines in rows)) + MARGIN
    height = 34 + -(-len(rows) // columns) * cell_h
    sheet = Image.new("RGB", (columns * cell_w + MARGIN, height), "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, (MARGIN, 8), Line(title), 14, sheet.width - 2 * MARGIN, 1)
    for i, (picture, lines) in enumerate(rows):
        x, y = MARGIN + i % columns * cell_w, 34 + i // columns * cell_h
        sheet.paste(upscale(picture, side), (x, y))
        for j, line in enumerate(lines):
            at = (x + side + MARGIN, y + j * line_h)
            _write(draw, at, line, 11, text_w, 1)
    _save(sheet, path)


def _save(sheet: Image.Image, path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
