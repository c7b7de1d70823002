"""Check 4 of the ladder's specification: sizes, FLOPs and hyper-parameters of every rung."""

import json

import pytest

from configs import rungs
from configs.common import load_config
from eval.scaling import sizes

TABLE = {  # N, FLOPs per token
    "190m": (190_354_176, 1_903_391_232),
    "370m": (371_262_464, 3_443_922_944),
    "600m": (597_382_464, 5_180_751_744),
    "760m": (758_220_288, 6_373_843_968),
    "1.3b": (1_279_395_840, 10_109_071_360),
    "3b": (3_169_537_280, 22_970_355_200),
    "7b": (6_887_575_552, 49_412_071_424),
    "13b": (13_202_396_160, 91_335_915_520),
}
RECIPES = {  # tokens, sequences, steps, rate to two digits, warm-up
    "190m": (3_807_083_520, 128, 7272, 9.7e-4, 363),
    "370m": (7.43e9, 192, 9452, 7.8e-4, 472),
    "760m": (15.16e9, 320, 11_580, 6.1e-4, 578),
    "1.3b": (25.59e9, 384, 16_279, 5.2e-4, 813),
}


@pytest.mark.parametrize("name", TABLE)
def test_check_4_parameters_and_flops(name):
    """By the formula, and of the model that the config builds (V d more: the input embedding)."""
    rung, (n, flops) = rungs.PUBLISHED[name], TABLE[name]
    assert (rung.n, rung.flops_per_token) == (n, flops)
    config = load_config(f"configs/ladder.py:{name}")
    counted = sizes.count(json.loads(config.to_json_best_effort()))
    assert counted.without_input == n
    assert counted.total == n + rung.vocab_size * rung.width


@pytest.mark.parametrize("name", RECIPES)
def test_check_4_recipes(name):
    tokens, batch, steps, lr, warmup = RECIPES[name]
    config = load_config(f"configs/ladder.py:{name}")
    rung = rungs.PUBLISHED[name]
    found = rungs.recipe(rung.n, rung.length, 1.0)
    assert found.tokens == pytest.approx(tokens, rel=1e-3)
    assert (config.batch_size, config.steps, config.schedule.warmup) == (batch, steps, warmup)
    assert float(f"{config.optimizer.lr:.1e}") == lr
    assert (config.schedule.name, config.schedule.final) == ("cosine", 0.1)
    assert config.data.length == 4096 and config.optimizer.clip == 1.0


@pytest.mark.parametrize("m, steps", [(2, 14_533), (5, 36_318), (10, 72_625)])
def test_longer_budgets_have_the_published_steps(m, steps):
    """Last step of the published logs of the smallest rung."""
    assert load_config(f"configs/ladder.py:190m,multiplier={m}").steps == steps


def test_targets_are_the_papers():
    config = load_config("configs/ladder.py:7b-4t")
    tokens = config.steps * config.batch_size * config.data.length
    assert tokens == pytest.approx(3_945_065_873_408, rel=1e-5)
    assert (config.batch_size, config.optimizer.lr, config.schedule.warmup) == (1024, 3e-4, 2000)
    assert load_config("configs/ladder.py:13b-5t").batch_size == 2048


def test_olmo_2s_switches():
    """Norms behind the blocks, q and k normed whole, an untied head, a padded vocabulary."""
    from models import sized
    from models.llama import SIZES

    config = load_config("configs/ladder.py:190m")
    cfg = sized(SIZES, config.model.llama, "model.llama")
    assert (cfg.pre_norms, cfg.post_norms, cfg.qk_norm, cfg.tie) == (False, True, "all", False)
    assert (cfg.rope_theta, cfg.norm_eps, config.model.vocab_size) == (5e5, 1e-6, 100_352)
    assert cfg.heads == cfg.kv_heads and cfg.head_dim == 64


def test_the_paper_is_one_list_of_sixteen_runs():
    config = load_config("configs/ladder.py:paper")
    assert config.task == "runs" and len(config.runs) == 16 and config.report == "ladder"
    steps = [load_config(spec, *more).steps for _, spec, more in config.runs]
    assert steps[0] == 7272 and steps[3] == 72_625


def test_tiny_rungs_have_their_names_size():
    """With the vocabulary of 512 that their tokenizer has."""
    for name, rung in rungs.TINY.items():
        assert abs(rung.n / 1000 - int(name.removesuffix("k"))) < 0.5
        config = load_config(f"configs/ladder.py:{name}")
        config.model.vocab_size = rung.vocab_size
        assert sizes.count(json.loads(config.to_json_best_effort())).without_input == rung.n
    with pytest.raises(ValueError, match="multiplier=0.0 must be > 0"):
        load_config("configs/ladder.py:190m,multiplier=0")
