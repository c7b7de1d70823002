"""KID: the shared scale, the real-vs-real level, absence without the extra."""

import jax
import numpy as np
import pytest

from eval import EVALUATORS, kid, metrics


def measure(config, oracle, params, tmp_path):
    evaluate = EVALUATORS["kid"](config)
    return evaluate(oracle.model, params, step=1, rng=jax.random.key(0), workdir=tmp_path)


def test_distances_use_the_scale_of_the_reference_set():
    rng = np.random.default_rng(0)
    generated, real, reference = rng.normal(size=(3, 20, 6)) * 7.0
    got = kid.distances(generated, real, reference)
    scale = reference.std()
    assert got[0] == pytest.approx(metrics.kernel_distance(generated / scale, reference / scale))
    np.testing.assert_allclose(kid.distances(generated * 5, real * 5, reference * 5), got)


def test_perfect_pictures_are_as_far_as_real_ones(config, oracle, params, tmp_path, monkeypatch):
    monkeypatch.setattr(kid, "_network", lambda: lambda x: np.asarray(x).reshape(len(x), -1))
    monkeypatch.setattr(kid.importlib.util, "find_spec", lambda name: True)
    perfect = measure(config, oracle, params, tmp_path)
    assert perfect["kid"] == perfect["kid_real"] and perfect["pictures"] == 20
    oracle.perfect = False
    constant = measure(config, oracle, params, tmp_path / "other")
    assert constant["kid"] > 3 * abs(constant["kid_real"])


def test_reference_pictures_are_no_prompts(config, oracle, params, tmp_path):
    drawn = kid.generation.prompts(config)
    drawn = drawn._replace(images=drawn.real)
    reference = kid._reference(config, drawn)
    # 30 - 10 training pictures are free, of which 10; 12 - 10 held-out ones are all there is.
    assert len(reference) == 12
    prompts = {x.tobytes() for x in drawn.real}
    assert not prompts & {x.tobytes() for x in reference}


def test_without_the_extra_it_says_so(config, oracle, params, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kid.importlib.util, "find_spec", lambda name: None)
    assert measure(config, oracle, params, tmp_path) is None
    assert oracle.calls == [] and "pip install -e '.[eval]'" in capsys.readouterr().out
