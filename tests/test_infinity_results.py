"""The committed default run of Infinity holds what docs/results/infinity.md says."""

import json
import math
from pathlib import Path

from configs.common import load_config

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "infinity"


def test_the_default_run_draws_what_it_was_shown():
    config = load_config("configs/infinity.py")
    found = json.loads((RESULTS / "default-seed0.json").read_text())
    lines = (RESULTS / "default-seed0.metrics.jsonl").read_text().splitlines()
    losses = [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]
    assert found["step"] == config.steps
    assert abs(losses[0] - math.log(2)) < 1e-3  # every bit even at the start
    assert losses[-1] < 0.55 * losses[0]
    for space in ("latent", "classifier"):
        top1 = found[f"retrieval/train_top1_{space}"]
        assert top1 >= 10 * found[f"retrieval/train_top1_{space}_chance"]
    by_scale = [found[f"bits/train_accuracy_scale{k}"] for k in (1, 2, 3, 4)]
    assert by_scale == sorted(by_scale, reverse=True) and by_scale[-1] > 0.6


def test_labels_that_correct_a_wrong_prefix_are_learnt():
    """With 20 % of the prefix's bits flipped, against the labels of the right prefix."""
    found = json.loads((RESULTS / "default-seed0.json").read_text())
    for split in ("train", "held_out"):
        corrected = found[f"bits/{split}_corrupted_accuracy"]
        assert corrected > found[f"bits/{split}_corrupted_kept_accuracy"] + 0.1
