"""Cost of decoding: bytes of the state by context, from models whose costs are known."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs.common import load_config
from eval import EVALUATORS
from models import MODELS, hymba, hymba_build, language, llama


@pytest.mark.parametrize("name", ["llama", "mamba", pytest.param("hymba", marks=pytest.mark.long)])
def test_state_and_step_cost_what_they_should(name, tmp_path):
    """An attention cache grows with the context, a memory does not; rates come from the log."""
    config = load_config(f"configs/{name}.py:debug")
    model = MODELS[name](config)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0))[0])
    rows = [{"step": s, "train/examples_per_s": x} for s, x in ((1, 2.0), (2, 8.0), (3, 4.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = EVALUATORS["speed"](config)
    found = run(model, params, step=3, rng=jax.random.key(0), workdir=tmp_path)
    assert found["train_tokens_per_s"] == 4.0 * 64
    assert found["parameters"] == sum(x.size for x in jax.tree.leaves(params))
    assert found["step_ms_64"] > 0 and found["step_bytes_64"] > found["state_bytes_64"]
    grown = found["state_bytes_128"] - found["state_bytes_64"]
    if name == "llama":
        cfg = dataclasses.replace(llama.SIZES["debug"])
        assert grown == 64 * cfg.layers * cfg.kv_heads * 2 * cfg.head_dim * 4
    if name == "mamba":
        assert grown == 0 and found["step_bytes_128"] == found["step_bytes_64"]
    if name == "hymba":  # its two global layers grow
        cfg = hymba.SIZES["debug"]
        assert grown == 64 * 2 * cfg.kv_heads * (cfg.head_dim + cfg.value_dim) * 4
        assert found["state_bytes_64"] == (
            hymba_build.cache_report(dataclasses.replace(cfg, vocab_size=96), 64, 4)["ours"] + 4
        )


def test_check_8_a_step_of_windows_does_not_know_the_context():
    """All windows, no global layer: one program for 1,000 and 8,000 tokens (hymba.md 9)."""
    cfg = dataclasses.replace(
        hymba.SIZES["debug"], vocab_size=96, global_layers=(), groups=(), layers=2
    )
    net = hymba.Hymba(cfg)
    params = jax.eval_shape(lambda: language.init(net, jax.random.key(0)))
    params = nn.meta.unbox(params)

    def cost(context):
        state = jax.eval_shape(lambda p: hymba.init_state(net, p, 1, context), params)
        token = jax.ShapeDtypeStruct((1,), np.int32)
        step = jax.jit(lambda *x: language.extend(net, *x), donate_argnums=2)
        return step.lower(params, token, state).compile().cost_analysis()["bytes accessed"]

    assert cost(1000) == cost(8000)
