"""Contact sheets: files appear, scripts without a font are escaped or left out, curves."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from eval import EVALUATORS, sheets
from inference import drawing


def test_sheets_and_texts_are_written(config, oracle, params, tmp_path):
    log = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "train/loss": 1 / s, "train/mse": 0.5 / s} for s in range(1, 9)]
    log.write_text("".join(json.dumps(r) + "\n" for r in rows))
    evaluate = EVALUATORS["sheets"](config)
    metrics = evaluate(oracle.model, params, step=3, rng=jax.random.key(0), workdir=tmp_path)
    assert metrics == {}
    folder = tmp_path / "samples"
    for name in ("generated-3.png", "languages-3.png", "understanding-3.png", "curves.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 150
    text = (folder / "understanding-3.txt").read_text()
    captions = [line.split("\t") for line in text.splitlines() if not line.startswith("question")]
    assert {row[0] for row in captions} == {"train", "held_out"} and len(captions) == 2 * 2 * 2
    assert all(said == right for _, _, said, right in captions)
    questions = [line.split("\t") for line in text.splitlines() if line.startswith("question")]
    assert len(questions) == 3 and all(row[2] == row[3] for row in questions)


def test_curves_need_a_log(tmp_path):
    sheets.curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl")
    assert not (tmp_path / "curves.png").exists()


def test_latin_and_cyrillic_can_always_be_drawn():
    # DejaVu Sans comes with matplotlib, whatever fonts the machine has.
    assert drawing.can_draw("größer naïve ação") and drawing.can_draw("снег")


def test_the_extra_fonts_draw_chinese_japanese_and_korean():
    pytest.importorskip("mplfonts")
    assert all(map(drawing.can_draw, ("蜗牛", "カタツムリ", "달팽이")))


def test_a_missing_script_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(drawing, "can_draw", lambda text: False)
    drawing._say_once.cache_clear()
    assert {drawing.label("ja", "カタツムリ") for _ in range(3)} == {
        "ja: (no font for this script)"
    }
    assert capsys.readouterr().out.count("pip install -e '.[fonts]'") == 1


def test_text_without_a_font_is_escaped():
    private = "a \U000f1234"  # a private-use character no font should claim
    assert not drawing.can_draw(private)
    assert drawing._prepare(private, 11)[0] == "a \\U000f1234"


def test_right_to_left_text_needs_shaping(monkeypatch):
    monkeypatch.setattr(drawing.features, "check", lambda name: False)
    drawing._font_path.cache_clear()
    assert not drawing.can_draw("سلام") and drawing.can_draw("snow")
    drawing._font_path.cache_clear()


def test_cells_hold_the_pictures_unchanged(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    cells = [((image, image[::-1]), "a caption that is far too long for its cell " * 5)]
    drawing.picture_grid(tmp_path / "grid.png", "title", [("some", cells)], columns=2, side=16)
    with Image.open(tmp_path / "grid.png") as sheet:
        pixels = np.asarray(sheet)
    found = pixels[58 : 58 + 16 : 2, 8 : 8 + 16 : 2]
    np.testing.assert_array_equal(found, image)


def test_pictures_keep_their_shape():
    assert drawing.upscale(np.zeros((8, 4, 3)), 16).size == (8, 16)  # width, height
    assert drawing.upscale(np.zeros((32, 64, 3)), 16).size == (16, 8)
