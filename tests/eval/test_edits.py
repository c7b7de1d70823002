"""Editing scores on pixels: the right result, a copy of the source, a half-done change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import EVALUATORS, edits
from input_pipeline import canvas
from input_pipeline.edits import Edit

SNAIL = np.array([10, 10, 10], np.uint8)


def scene(colour, item=True, size=8):
    image = np.empty((size, size, 3), np.uint8)
    image[:] = canvas.COLOURS[colour]
    if item:
        image[1:4, 1:4] = SNAIL
    return image


RECOLOUR = Edit(scene("red"), "make the background blue", scene("blue"), "recolour", "blue", ())
REMOVE = Edit(scene("pink"), "remove the snail", scene("pink", False), "remove", "pink", ())


@pytest.mark.parametrize("edit", [RECOLOUR, REMOVE])
def test_the_right_result_scores_one_and_the_source_zero(edit):
    right = edits.score([edit], [edit.target])
    copied = edits.score([edit], [edit.source])
    name = edit.operation
    assert right == {f"{name}_accuracy": 1.0, f"{name}_kept_psnr": 60.0}
    assert copied == {f"{name}_accuracy": 0.0, f"{name}_kept_psnr": 60.0}


def test_background_is_judged_by_its_median_among_all_colours():
    noisy = RECOLOUR.target.astype(int) + np.random.default_rng(0).integers(-30, 31, (8, 8, 3))
    noisy = np.clip(noisy, 0, 255).astype(np.uint8)
    assert edits.right_background(noisy, RECOLOUR.target, "blue")
    assert not edits.right_background(scene("purple"), RECOLOUR.target, "blue")


def test_half_a_change_is_no_change():
    half = REMOVE.source.copy()
    half[1, 1:4] = REMOVE.target[1, 1:4]
    assert edits.share_changed(half, REMOVE.source, REMOVE.target) == pytest.approx(1 / 3)
    assert edits.score([REMOVE], [half])["remove_accuracy"] == 0.0


def test_damage_elsewhere_shows_in_kept_psnr():
    damaged = REMOVE.target.copy()
    damaged[6:, 6:] = 0
    metrics = edits.score([REMOVE], [damaged])
    assert metrics["remove_accuracy"] == 1.0 and metrics["remove_kept_psnr"] < 20


def test_evaluator_draws_each_operation(config, oracle, params, tmp_path, monkeypatch):
    config.evaluation.edits = 3
    config.data.image_size = config.data.und_size = 16
    asked = []

    def perfect(config, model, params, captions, rng, *, source):
        asked.extend(captions)
        assert source[0].shape == (12, 16, 16, 3) and source[1].shape == (12, 256, 3)
        return np.stack([made.target for made, _ in edits.held_out_edits(config)])

    monkeypatch.setattr(edits.generation, "draw", perfect)
    oracle.model.predict["decode_latents"] = lambda p, t: jnp.reshape(t, (-1, 16, 16, 3))
    evaluate = EVALUATORS["edits"](config)
    metrics = evaluate(oracle.model, params, step=4, rng=jax.random.key(0), workdir=tmp_path)
    for operation in ("recolour", "remove", "replace", "add"):
        assert metrics[f"{operation}_accuracy"] == 1.0
        assert metrics[f"{operation}_accuracy_tokenizer"] == 1.0
    assert metrics["recolour_accuracy_chance"] == pytest.approx(1 / len(canvas.COLOURS))
    assert sum(a.startswith("make the background") for a in asked) == 3
    assert (tmp_path / "samples" / "edits-4.png").stat().st_size > 1000
