"""The committed xLSTM runs hold what docs/results/xlstm.md says."""

import json
import math
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "xlstm"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_run_beats_xz(seed):
    found = json.loads((RESULTS / f"default-seed{seed}.json").read_text())
    lines = (RESULTS / f"default-seed{seed}.metrics.jsonl").read_text().splitlines()
    losses = [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]
    assert found["step"] == 600
    assert (
        found["bits_per_byte/bits_per_byte"] < 0.8 * found["bits_per_byte/bits_per_byte_xz_trained"]
    )
    assert abs(losses[0] - math.log(4096)) < 0.3 and losses[-1] < 0.5 * losses[0]


def test_check_14_the_ablations_show_what_the_page_says():
    """Signs of the specification with three seeds: (a), in whole runs, and (b) hold, (c) and (d) do
    not."""

    def mean(variant, group, metric):
        found = json.loads((RESULTS / f"{variant}.json").read_text())["groups"][group][metric]
        assert found["n"] == 3
        return found["mean"]

    bits = "bits_per_byte/bits_per_byte"
    for bias in (-10, -5, -2):
        assert mean("eps", f"eps=0.01 bias={bias}", bits) < mean(
            "eps", f"eps=1e-06 bias={bias}", bits
        )
    spikes, spread = "gradient_norms/spikes_per_1000", "gradient_norms/log_std"
    assert mean("bias", "bias=-10", spikes) < 0.25 * mean("bias", "bias=0", spikes)
    assert mean("caps", "cap a million", spread) < mean("caps", "capped", spread)
    assert mean("norm", "eps=0.01", bits) > mean("norm", "eps=1e-06", bits) + 0.04
    right = "losses/held_out_accuracy"
    for gate in ("learnt", "fixed at -10", "fixed at 0"):
        assert mean("recall", gate, right) > 0.99
        assert 0.6 < mean("more", gate, right) < 0.7
