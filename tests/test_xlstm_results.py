"""The committed xLSTM run holds what docs/results/xlstm.md says."""

import json
import math
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "xlstm"


def test_the_default_run_beats_xz():
    found = json.loads((RESULTS / "default-seed0.json").read_text())
    lines = (RESULTS / "default-seed0.metrics.jsonl").read_text().splitlines()
    losses = [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]
    assert found["step"] == 600
    assert (
        found["bits_per_byte/bits_per_byte"] < 0.8 * found["bits_per_byte/bits_per_byte_xz_trained"]
    )
    assert abs(losses[0] - math.log(4096)) < 0.3 and losses[-1] < 0.5 * losses[0]
