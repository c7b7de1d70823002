"""What every language model owes models/language.py: states, ragged and packed rows, rounding.

Checks are numbered as in section 9 of hymba.md.
"""

import dataclasses
import functools
import os
import subprocess
import sys
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import load_config
from eval import hlo
from eval.speed import state_bytes
from export.functions import functions, serialise
from export.weights import flatten
from inference.beam import EOS
from inference.text import Sampling, generate
from models import MODELS as MODELS_BY_NAME
from models import hymba, language, llama, mamba, xlstm

V = 96


def _xlstm():
    cfg = dataclasses.replace(
        xlstm.SIZES["debug"], vocab_size=V, input_bias=-1.0, head_norm_eps=1e-3
    )
    return xlstm.XLSTM(cfg), lambda net, params, rows, max_len: xlstm.init_state(
        cfg, rows, apart=net.apart
    )


def _llama():
    cfg = dataclasses.replace(llama.SIZES["debug"], vocab_size=V)
    return llama.Llama(cfg), lambda net, params, rows, max_len: llama.init_state(net, rows, max_len)


def _hymba(layers=3, **more):
    small = dict(vocab_size=V, meta=4, window=8, layers=layers, global_layers=(0,), **more)
    cfg = dataclasses.replace(hymba.SIZES["debug"], **small)
    return hymba.Hymba(cfg), hymba.init_state


def _mamba(size):
    net = mamba.Mamba(dataclasses.replace(mamba.SIZES[size], vocab_size=V))
    return net, lambda net, params, rows, max_len: mamba.init_state(
        net.cfg, rows, net.dtype, apart=net.apart
    )


MODELS = dict(
    xlstm=_xlstm,
    llama=_llama,
    hymba=_hymba,
    mamba=functools.partial(_mamba, "debug"),
    mamba2=functools.partial(_mamba, "debug2"),
    hymba_stacked=functools.partial(_hymba, 5, groups=((1, 2), (3, 4))),
)
NAMES = ("xlstm", "llama", "hymba", "mamba", "mamba2")
STACKED = ("xlstm", "llama", "mamba", "mamba2", "hymba_stacked")


@functools.cache
def case(name):
    """(net, params, init_state); no branch is hidden behind a zero."""
    net, start = MODELS[name]()
    params = nn.meta.unbox(jax.jit(functools.partial(language.init, net))(jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.05 * jnp.asarray(rng.normal(size=x.shape), x.dtype), params
    )
    return net, params, functools.partial(start, net)


def tokens_of(*shape):
    return jnp.asarray(np.random.default_rng(1).integers(4, V, shape), jnp.int32)


def text(net, params, tokens):
    return jax.jit(lambda p, t: net.apply({"params": p}, t, method="text"))(params, tokens)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "hymba"])
def test_prompts_and_steps_equal_one_pass(name):
    """Hymba's prompts are test_hymba.py's check 4."""
    net, params, init_state = case(name)
    tokens = tokens_of(2, 40)
    logits = text(net, params, tokens)
    run = jax.jit(functools.partial(language.prefill, net))
    step = jax.jit(functools.partial(language.extend, net))
    for cut in (1, 3, 29):
        state = init_state(params, 2, 40)
        scores, state = run(params, tokens[:, :29], jnp.full(2, cut), state)  # padded
        for t in range(cut, 40):
            np.testing.assert_allclose(scores, logits[:, t - 1], atol=2e-5)
            scores, state = step(params, tokens[:, t], state)
        np.testing.assert_allclose(scores, logits[:, -1], atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_check_5_ragged_rows_equal_single_ones(name):
    """Prompts of four lengths, padded, then eight tokens each."""
    net, params, init_state = case(name)
    tokens, lengths = tokens_of(4, 20), jnp.array([20, 7, 1, 13])
    run = jax.jit(functools.partial(language.prefill, net))
    step = jax.jit(functools.partial(language.extend, net))
    scores, state = run(params, tokens, lengths, init_state(params, 4, 28))
    alone = []
    for row in range(4):
        alone.append(run(params, tokens[row, None], lengths[row, None], init_state(params, 1, 28)))
    for k in range(8):
        for row, (own, _) in enumerate(alone):
            np.testing.assert_allclose(scores[row], own[0], rtol=0, atol=1e-5)
        more = tokens[:, k]
        scores, state = step(params, more, state)
        alone = [step(params, more[r, None], own) for r, (_, own) in enumerate(alone)]


@pytest.mark.parametrize("name", NAMES)
def test_check_5_packed_documents_equal_separate_rows(name):
    """Every token's loss and all gradients of documents of 1, 9, 1 and 9 tokens in one row; those
    of the same length are rows of one batch."""
    net, params, _ = case(name)
    lengths = (1, 9, 1, 9)
    tokens = tokens_of(1, 20)
    packed = dict(
        tokens=tokens,
        segment_ids=jnp.asarray(np.repeat([1, 2, 3, 4], lengths)[None], jnp.int32),
        positions=jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None], jnp.int32),
    )
    pairs = tokens.reshape(2, 10)
    alone = [
        dict(tokens=rows, segment_ids=jnp.ones(rows.shape, jnp.int32))
        for rows in (pairs[:, :1], pairs[:, 1:])
    ]

    def total(params, batches):
        nll, targets = zip(*(language.token_nll(net, params, b) for b in batches))
        each = jnp.concatenate([n * t for n, t in zip(nll, targets)], 1).reshape(20)
        return each.sum(), each

    graded = jax.jit(jax.value_and_grad(total, has_aux=True))
    ((_, each), got), ((_, own), want) = graded(params, [packed]), graded(params, alone)
    assert (each > 0).sum() == 16  # a document's last token has no target
    np.testing.assert_allclose(each, own, rtol=0, atol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_no_token_sees_a_later_one(name):
    net, params, _ = case(name)
    tokens = tokens_of(1, 20)
    changed = tokens.at[0, 12].set((tokens[0, 12] + 7) % V)
    one, two = text(net, params, tokens), text(net, params, changed)
    np.testing.assert_array_equal(one[:, :12], two[:, :12])
    assert (one[:, 12:] != two[:, 12:]).any(-1).all()


@pytest.mark.parametrize("name", NAMES)
def test_rounded_parameters_give_the_same_scores(name):
    """bfloat16: rounding every matrix once or at every use is the same, bit for bit."""
    net, params, init_state = case(name)
    net = net.clone(dtype=jnp.bfloat16)
    once = language.rounded(net, params)
    assert {x.dtype for x in jax.tree.leaves(once)} == {jnp.float32.dtype, jnp.bfloat16.dtype}
    step = jax.jit(functools.partial(language.extend, net))
    token, state = jnp.array([3, 4]), init_state(params, 2, 4)
    jax.tree.map(
        np.testing.assert_array_equal, step(once, token, state), step(params, token, state)
    )


@pytest.mark.parametrize("name", ["llama", "hymba"])
def test_packed_training_takes_the_attention_of_a_tpu(name):
    """What is traced for a TPU; documents once sent the Llama's to XLA."""
    net, params, _ = case(name)
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    ids = jnp.ones((1, 1024), jnp.int32)
    batch = dict(tokens=ids, segment_ids=ids)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=tpu)):
        traced = jax.make_jaxpr(functools.partial(language.read, net))(params, batch)
    assert "splash" in str(traced)


@pytest.mark.parametrize("name", STACKED)
def test_layers_by_themselves_give_the_same_scores(name):
    """A prompt and a token, as `decoding` takes the parameters apart."""
    net, params, _ = case(name)
    predict = language.predict(net, MODELS[name]()[1])
    apart = predict["decoding"](params)
    assert language.is_apart(apart) and not language.is_apart(params)
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    assert size(apart) == size(params) and len(jax.tree.leaves(apart)) > len(
        jax.tree.leaves(params)
    )

    @jax.jit
    def both(params, state):
        scores, state = predict["prefill"](params, tokens_of(2, 12), jnp.array([12, 7]), state)
        return scores, predict["extend"](params, jnp.array([5, 6]), state)

    want, got = (both(p, predict["init_state"](p, 2, 20)) for p in (params, apart))
    assert size(got) == size(want)
    for a, b in zip((got[0], got[1][0]), (want[0], want[1][0])):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", STACKED)
def test_a_token_moves_weights_and_state_once(name):
    """Bytes of the compiled step: nothing of either is copied, not even to write a key. Memories
    are written whole; a group's second layer reads its keys again."""
    net, params, _ = case(name)
    predict = language.predict(net, MODELS[name]()[1])
    params = predict["decoding"](params)
    state = jax.eval_shape(lambda p: predict["init_state"](p, 2, 2048), params)
    step = jax.jit(predict["extend"], donate_argnums=2)
    step = step.lower(params, jax.ShapeDtypeStruct((2,), jnp.int32), state).compile()
    caches = [x for x in jax.tree.leaves(state) if max(x.shape) >= 2048]
    least = state_bytes((params, state, state)) - state_bytes(caches)
    moved = hlo.analyse(step.as_text(), 1).moved
    assert moved < 1.8 * least, (moved, least)  # of layers in stacks: 2.9 to 3.4 times


@pytest.mark.parametrize("name", NAMES)
def test_it_writes_what_its_scores_say(name):
    """Greedy tokens are the argmax of one pass over prompt and answer."""
    net, params, _ = case(name)
    model = types.SimpleNamespace(predict=language.predict(net, MODELS[name]()[1]))
    prompts = [[1, 5, 9], [1], [1, 4, 4, 8, 90, 30, 7]]
    got = generate(model, params, prompts, jax.random.key(0), Sampling(max_new=8))
    rows = np.zeros((3, 15), np.int32)  # of one length: one program
    for row, prompt, answer in zip(rows, prompts, got):
        row[: len(prompt + answer)] = prompt + answer
    for prompt, answer, best in zip(prompts, got, text(net, params, rows).argmax(-1)):
        ended = [EOS] * (len(answer) < 8)
        assert best[len(prompt) - 1 :].tolist()[: len(answer) + len(ended)] == answer + ended


@pytest.mark.parametrize(
    "name", ["xlstm", "llama", "mamba", pytest.param("hymba", marks=pytest.mark.long)]
)
def test_functions_are_exported(name):
    """For cpu, cuda and tpu: the scores of whole texts, and the same ones token by token."""
    config = load_config(f"configs/{name}.py:debug", **{"data.length": 12, "sample.rows": 2})
    model = MODELS_BY_NAME[name](config)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0))[0])
    flat = flatten(params)
    calls = {}
    for key, function in functions(model, config, params).items():
        data, entry = serialise(function, flat)
        assert entry["platforms"] == ["cpu", "cuda", "tpu"]
        calls[key] = jax.jit(jax.export.deserialize(bytearray(data)).call)
    tokens = tokens_of(2, 12)
    want = jax.jit(model.predict["logits"])(params, {"tokens": tokens})
    got = calls["text_logits"](flat, {"tokens": tokens[:1]})["logits"]
    np.testing.assert_allclose(got, want[:1], atol=1e-5)
    state = calls["decode_start"](flat, {})
    for t in range(12):
        found = calls["decode_step"](flat, dict(state) | {"token": tokens[:, t]})
        state = {k: v for k, v in found.items() if k != "logits"}
        np.testing.assert_allclose(found["logits"], want[:, t], atol=2e-5)


@pytest.mark.parametrize("names, mesh", [("mamba,mamba2,llama", "2,1,2,2"), ("hymba", "1,2,2,2")])
def test_check_9_8_devices_equal_one_device(names, mesh):
    """Packed rows; batch, heads, tokens and, on the second mesh, parameters (fsdp) cut: losses and
    every parameter's gradient to 1e-5."""
    script = Path(__file__).parent / "language_on_mesh.py"
    run = subprocess.run(
        [sys.executable, str(script), names, mesh],
        capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 2 * len(names.split(","))
    for name, mesh, what, value in lines:
        assert float(value) < 1e-5, (name, mesh, what, value)
