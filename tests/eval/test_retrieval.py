"""Generation retrieval: ranks, distractors, a perfect and a constant model."""

import jax
import numpy as np
import pytest

from eval import EVALUATORS, generation, retrieval


def measure(config, oracle, params, tmp_path, step=1):
    evaluate = EVALUATORS["retrieval"](config)
    return evaluate(oracle.model, params, step=step, rng=jax.random.key(0), workdir=tmp_path)


def test_a_perfect_painter_finds_every_glyph(config, oracle, params, tmp_path):
    metrics = measure(config, oracle, params, tmp_path)
    for split in ("train", "held_out"):
        assert metrics[f"{split}_top1_latent"] == metrics[f"{split}_top5_latent"] == 1.0
        assert metrics[f"{split}_top1_latent_chance"] == 1 / 16
        assert metrics[f"{split}_top5_latent_chance"] == 5 / 16
        assert metrics[f"{split}_pictures"] == 10
    assert oracle.drawn_with[0] == {"guidance": 2.0, "steps": 3}  # of config.sample, what it knows


def test_one_picture_for_everything_is_at_chance(config, oracle, params, tmp_path):
    oracle.perfect = False
    metrics = measure(config, oracle, params, tmp_path)
    assert metrics["train_top1_latent"] <= 0.2 and metrics["held_out_top1_latent"] <= 0.2


def test_ranks_count_ties_and_nan_against_the_model():
    gallery = np.array([[0.0], [1.0], [2.0], [5.0]])
    queries, own = np.array([[0.0], [1.4], [np.nan]]), np.array([[0.0], [2.0], [5.0]])
    candidates = np.array([[1, 2, 3], [0, 1, 3], [0, 1, 2]])
    np.testing.assert_array_equal(retrieval.ranks(queries, own, gallery, candidates), [0, 1, 3])
    tie = retrieval.ranks(np.array([[0.5]]), np.array([[0.0]]), gallery, np.array([[1, 2, 3]]))
    assert tie[0] == 1


def test_distractors_are_fixed_and_never_the_own_group():
    groups = np.array([1, 1, 2, 3, 4, 5, 6, 7])
    own = np.array([1, 5])
    sets = retrieval.candidate_sets(own, groups, 5, seed=3)
    np.testing.assert_array_equal(sets, retrieval.candidate_sets(own, groups, 5, seed=3))
    assert sets.shape == (2, 5) and all(len(set(s)) == 5 for s in sets)
    assert not (groups[sets] == own[:, None]).any()
    assert (sets != retrieval.candidate_sets(own, groups, 5, seed=4)).any()


def test_pictures_are_drawn_once_and_shared(config, oracle, params, tmp_path):
    arguments = dict(step=1, rng=jax.random.key(0), workdir=tmp_path)
    first = generation.drawn(config, oracle.model, params, **arguments)
    calls = len(oracle.calls)
    again = generation.drawn(config, oracle.model, params, **arguments)
    assert len(oracle.calls) == calls == 3  # 10 + 10 + 2 x 2 captions, 8 per call
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.images, first.real)
    generation.drawn(config, oracle.model, params | {"nats": params["nats"] + 1}, **arguments)
    assert len(oracle.calls) == 2 * calls  # other parameters are other pictures
    path = tmp_path / "eval" / "drawn.npz"
    path.write_bytes(path.read_bytes()[:50])
    generation.drawn(config, oracle.model, params, **arguments)
    assert len(oracle.calls) == 3 * calls  # a file cut short is drawn again


def test_held_out_split_is_checked(config, oracle, params, tmp_path):
    config.evaluation.held_out = "train"
    with pytest.raises(ValueError, match="config.evaluation.held_out='train'"):
        measure(config, oracle, params, tmp_path)
