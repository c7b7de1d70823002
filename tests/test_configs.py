"""Every variant of every config loads; overrides, arguments and defaults behave as documented."""

import ast
import importlib
import math
import re

import jax
import pytest
from ml_collections import ConfigDict

from configs import common, loading
from configs.common import base, load_config, parse_arg
from models import MODELS
from training import loop, metrics
from training.optimizer import decay_mask
from training.tree import flat

CONFIGS = [p.stem for p in loading.list_configs()]
TOP = set(base())


def variants(name: str) -> list[str]:
    """The variants a config itself lists when it is given a wrong one."""
    with pytest.raises(ValueError) as wrong:
        importlib.import_module(f"configs.{name}").get_config("?")
    allowed = re.search(r"unknown variant '\?'\. Allowed: (.*)$", str(wrong.value))
    return ["", *allowed.group(1).split(", ")]


EVERY = [(name, v) for name in CONFIGS for v in variants(name)]


@pytest.mark.parametrize("name, variant", EVERY, ids=lambda v: v or "default")
def test_every_variant_loads(name, variant):
    """Locked, with every top-level key, and with values that flags can override."""
    config = load_config(f"configs/{name}.py" + (f":{variant}" if variant else ""))
    assert config.is_locked and set(config) >= TOP
    for key, value in common.flatten(config).items():
        assert not isinstance(value, list), f"config.{key} is a list; flags need tuples"
    again = load_config(f"{name}:{variant}" if variant else name, "steps=7", seed=3)
    assert again.steps == 7 and again.seed == 3
    for _, spec, overrides in config.runs:
        load_config(spec, *overrides)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_says_what_it_is(name):
    """Docstring: one line, the command; and a :debug variant."""
    doc = ast.get_docstring(ast.parse((loading.ROOT / "configs" / f"{name}.py").read_text()))
    alias = re.search(r"the same configs as (configs/\w+\.py)", doc)
    assert doc.splitlines()[0]
    assert "python main.py --config=configs/" in doc or (loading.ROOT / alias.group(1)).is_file()
    assert "debug" in variants(name)


TRAINED = [
    # tests/models and tests/training train these as well.
    pytest.param(name, marks=pytest.mark.long)
    if name in ("bsq_vae", "vqgan", "kl_vae", "llama")
    else name
    for name in CONFIGS
    # tests/test_flagship.py and tests/test_notebook.py run these whole.
    if name not in ("uniflud", "unifluid", "infinity")
    and load_config(f"{name}:debug").task == "train"
]


@pytest.mark.parametrize("name", TRAINED)
def test_every_debug_variant_trains_two_steps(name, tmp_path):
    config = load_config(f"{name}:debug", steps=2, log_every=1, evals=())
    config.sample.prompts = ()
    loop.train(config, tmp_path)
    rows = metrics.read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["train/loss"]) for row in rows)


def test_overrides_keep_their_types():
    config = load_config(
        "configs/uniflud.py:debug",
        "optimizer.lr=1",
        "profile=10,5",
        "evals=kid,sheets",
        "sample.prompts=('a red, round apple',)",
        **{"ema.warmup": False, "schedule.boundaries": (1, 2)},
    )
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)
    assert config.profile == (10, 5) and config.evals == ("kid", "sheets")
    again = ('evals=("kid",)', "steps=1", "evals=sheets", "steps=2")
    twice = load_config("configs/uniflud.py", *again)
    assert twice.evals == ("sheets",) and twice.steps == 2  # the last counts, of tuples too
    assert config.sample.prompts == ("a red, round apple",)
    assert config.ema.warmup is False and config.schedule.boundaries == (1, 2)


def test_unknown_keys_are_named():
    with pytest.raises(ValueError, match="config key 'optimizer.wd'.*Allowed: optimizer.b1, "):
        base(optimizer=dict(wd=1))
    with pytest.raises(ValueError, match="unknown config key 'stepz'. Did you mean 'steps'"):
        base(stepz=1)
    with pytest.raises(ValueError, match="unknown config key 'stepz'. Did you mean 'steps'"):
        load_config("configs/uniflud.py", stepz=1)
    assert base(model=dict(name="x", anything=1)).model.anything == 1


def test_base_merges_and_shares_nothing():
    a = base(optimizer=dict(lr=0.5))
    b = base()
    assert a.optimizer.lr == 0.5 and a.optimizer.b1 == b.optimizer.b1 and b.optimizer.lr != 0.5
    a.sample.new = 1
    assert "new" not in base().sample and isinstance(a, ConfigDict)


def test_arguments():
    a = parse_arg("2b,seq=512,fast=true,lr=1,name=x", ("debug", "2b"), seq=8, fast=False, lr=0.1,
                  name="")  # fmt: skip
    assert vars(a) == dict(variant="2b", seq=512, fast=True, lr=1.0, name="x")
    assert parse_arg("", ("debug",)).variant == parse_arg(None).variant == ""
    assert parse_arg("seq=3", ("debug",), seq=8).seq == 3
    for wrong, message in [
        ("debug,2b", "unknown variant '2b'"),
        ("seq=a", "config argument seq='a' must be a int"),
        ("seq=1.5", "must be a int"),
        ("sq=1", "unknown config argument 'sq=1'. Allowed: seq; any config key is set with"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            parse_arg(wrong, ("debug", "2b"), seq=8)


def test_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("uniflud").steps == load_config("configs/uniflud.py").steps
    (tmp_path / "own.py").write_text(
        "from configs.common import base\ndef get_config(arg=''):\n    return base(steps=17)\n"
    )
    assert load_config("own.py").steps == 17
    with pytest.raises(FileNotFoundError, match="unknown config 'onw.py'"):
        load_config("onw.py")


@pytest.mark.parametrize("variant", ["recall", "text", "meta", "state"])
def test_every_step_of_hymbas_roadmap_has_the_parameters_that_its_optimiser_names(variant):
    """Meta tokens do not decay, and half of the steps have none."""
    listed = load_config(f"configs/hymba_ablations.py:{variant}").runs
    for _, spec, overrides in listed[::3]:  # one seed
        config = load_config(spec, *overrides, "model.vocab_size=64")
        boxed = jax.eval_shape(lambda c=config: MODELS["hymba"](c).init(jax.random.key(0))[0])
        mask = flat(decay_mask(boxed, config.optimizer.undecayed))
        assert ("meta" in mask) == bool(config.model.hymba.meta)


@pytest.mark.parametrize(
    "spec, vocabulary, apart",
    [
        ("configs/hymba.py:compare", 4096, 1.02),
        ("configs/infinity_ablations.py:index", 2048, 1.06),
        ("configs/infinity_ablations.py:systems", 4096, 1.03),
    ],
)
def test_models_that_are_compared_have_equally_many_parameters(spec, vocabulary, apart):
    """What does not train aside; and every leaf that an optimiser's list names is there."""
    found = {}
    for name, each, overrides in load_config(spec).runs:
        if not name.endswith("/seed0"):
            continue
        config = load_config(each, *overrides, f"model.vocab_size={vocabulary}")
        model = MODELS[config.model.name]
        boxed = jax.eval_shape(lambda c=config, m=model: m(c).init(jax.random.key(0))[0])
        decay_mask(boxed, config.optimizer.undecayed)
        for idle in ("vae", "vit", "vit_proj"):
            boxed.pop(idle, None)
        found[name] = sum(math.prod(x.shape) for x in jax.tree.leaves(boxed))
    assert len(found) > 2 and max(found.values()) / min(found.values()) < apart, found
