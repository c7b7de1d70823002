"""Bits of each scale over batches of several shapes."""

from types import SimpleNamespace

import numpy as np
import pytest

from configs.loading import load_config
from eval import EVALUATORS, data
from models.infinity_build import layout, read_config


def test_means_are_over_the_tokens_of_all_shapes(monkeypatch):
    """A wide picture's scales hold other numbers of tokens than a square one's."""
    config = load_config("configs/infinity.py:debug", "model.vocab_size=16")
    cfg = read_config(config)[0]
    shapes = ((32, 32), (24, 40))
    batches = [{"gen_image": np.zeros((2, *s, 3), np.uint8)} for s in shapes]
    monkeypatch.setattr(data, "loss_batches", lambda *args, **kwargs: batches)

    def layout_of(aspect):  # 8 x 8 or 6 x 10 latents of 4 pixels
        return layout(cfg, {1.0: (8, 8), 0.6: (6, 10)}[round(aspect, 3)])

    def scores(params, batch, key, flipped):
        wide = batch["gen_image"].shape[2] == 40
        value = np.array([0.0, 0.0, 0.0, 1.0 if wide else 0.5])
        return {n: value - flipped for n in ("nll", "accuracy", "kept_nll", "kept_accuracy")}

    model = SimpleNamespace(predict={"layout": layout_of, "bit_scores": scores})
    params = {"transformer": {"head_kernel": np.zeros((3, 4)), "head_bias": np.zeros(4)}}
    run = EVALUATORS["bits"](config)
    got = run(model, params, step=1, rng=None, workdir=None)
    sizes = [[h * w for h, w in layout_of(a).tokens] for a in (1.0, 0.6)]
    last = (0.5 * sizes[0][-1] + 1.0 * sizes[1][-1]) / (sizes[0][-1] + sizes[1][-1])
    assert sizes[0] != sizes[1]
    assert got["train_accuracy_scale4"] == pytest.approx(last)
    every = (0.5 * sizes[0][-1] + 1.0 * sizes[1][-1]) / np.sum(sizes)
    assert got["train_accuracy"] == pytest.approx(every)
    assert got["train_corrupted_accuracy"] == pytest.approx(every - 0.2)
    assert got["head_bytes"] == 16 * 8
