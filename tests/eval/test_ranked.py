"""Check 6 of the ladder's specification: bits per byte of ranked classification, byte for byte."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import base
from eval import ranked, ranked_items
from input_pipeline import tokenizers
from models import MODELS

TEXTS = ("the snail", "Häuschen かたつむり 🐌", "a", "carries its house on its back")


class Toy:
    """Cuts UTF-8 into pieces of up to `size` bytes; ids are where a piece first came up."""

    bos = 0

    def __init__(self, size):
        self.size, self.pieces = size, [b""]

    def encode(self, text):
        data, ids = text.encode(), []
        for i in range(0, len(data), self.size):
            piece = data[i : i + self.size]
            if piece not in self.pieces:
                self.pieces.append(piece)
            ids.append(self.pieces.index(piece))
        return ids

    def byte_nll(self, params, batch):
        """Each byte costs ln 256, whatever the pieces are."""
        lengths = jnp.asarray([len(p) for p in self.pieces])
        cost = lengths[batch["tokens"][:, 1:]] * np.log(256.0)
        return {"nll": (cost * batch["scored"][:, :-1]).sum(1)}


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_check_6_uniform_bytes_cost_eight_bits_in_any_tokenizer(size):
    """Pieces that cut characters in the middle and reach over the border count too."""
    toy, prompt = Toy(size), "x" * 42  # a border that every size divides
    rows = [
        ranked.encode_row(toy, prompt, ranked.continuation(t, "counted")[0], 256) for t in TEXTS
    ]
    found = ranked.log_likelihoods(toy.byte_nll, None, rows, 3)
    sizes = [ranked.continuation(t, "counted")[1] for t in TEXTS]
    assert sizes == [len(t.encode()) + 1 for t in TEXTS]
    np.testing.assert_allclose(ranked.bits_per_byte(found, sizes), 8.0, rtol=1e-6)


def test_the_space_in_front_is_a_choice():
    assert ranked.continuation("ö", "counted") == (" ö", 3)
    assert ranked.continuation("ö", "scored") == (" ö", 2)
    assert ranked.continuation("ö", "none") == ("ö", 2)
    with pytest.raises(ValueError, match="config.evaluation.ranked.space='x': allowed are counted"):
        ranked.continuation("ö", "x")


def test_long_prompts_are_cut_on_the_left_and_borders_kept():
    toy = Toy(1)
    row = ranked.encode_row(toy, "abcdefgh", " xy", 8)
    assert row.tokens[0] == toy.bos and len(row.tokens) == 8 and row.begin == 5
    said = b"".join(toy.pieces[i] for i in row.tokens)
    assert said == b"efgh xy"
    over = ranked.encode_row(Toy(3), "ab", "cde", 8)  # "abc" reaches over the border
    assert over.begin == 1
    with pytest.raises(ValueError, match="config.data.length=3 has no room"):
        ranked.encode_row(toy, "a", "bcde", 3)


@pytest.fixture
def config(text_config):
    with text_config.unlocked():
        text_config.model = dict(name="llama", vocab_size=400, llama=dict(size="debug"))
        text_config.data.length = 96
        text_config.evaluation.ranked.update(count=6, tasks=("continuation", "order"))
    return text_config


def test_check_6_a_tiny_language_model_by_hand(config, tmp_path):
    """Sum of log-softmax over the continuation's tokens / bytes / ln 2; both accuracies."""
    model = MODELS["llama"](config)
    params, _ = model.init(jax.random.key(0))
    params = jax.tree.map(lambda x: 8.0 * x, params)  # so that options differ
    items = [
        dict(prompt="the snail carries", options=["its house", "Häuschen かたつむり"], answer=0),
        dict(prompt="that is", options=["a 🐌", "a small animal", "the"], answer=2),
    ]
    file = tmp_path / "quiz.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    config.evaluation.ranked.source = str(file)
    found = ranked.build(config)(model, params, step=0, rng=None, workdir=tmp_path)
    tokenizer, bits, normed, plain = tokenizers.load(config.data), [], [], []
    for item in items:
        before, likely = tokenizer.encode(item["prompt"]), []
        for option in item["options"]:
            whole = tokenizer.encode(item["prompt"] + " " + option)
            assert whole[: len(before)] == before
            ids = np.array([[tokenizer.bos, *whole]])
            segments = np.ones_like(ids)
            batch = dict(tokens=ids, segment_ids=segments, positions=np.arange(ids.size)[None])
            logits = np.asarray(model.predict["logits"](params, batch), np.float64)[0]
            log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            begin = 1 + len(before)
            likely.append(sum(log_p[i - 1, ids[0, i]] for i in range(begin, ids.size)))
        right = item["options"][item["answer"]]
        bits.append(-likely[item["answer"]] / (len((" " + right).encode()) * np.log(2)))
        plain.append(np.argmax(likely) == item["answer"])
        normed.append(
            np.argmax([x / len(o) for x, o in zip(likely, item["options"])]) == item["answer"]
        )
    assert found["quiz_bpb"] == pytest.approx(np.mean(bits), rel=1e-4)
    assert found["quiz_acc"] == np.mean(plain) and found["quiz_len_norm"] == np.mean(normed)
    assert found["quiz_len_norm_chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_items_are_made_of_held_out_texts(config, tmp_path):
    items = ranked_items.load(config)
    assert items == ranked_items.load(config)
    for task, prompt, options, answer in items:
        assert task in ("continuation", "order") and prompt and len(set(options)) == 4
        if task == "order":
            assert all(sorted(o.split()) == sorted(options[answer].split()) for o in options)
    uniform = SimpleNamespace(
        predict={"text_nll": lambda p, b: {"nll": b["scored"].sum(1) * jnp.log(400.0)}}
    )
    found = ranked.build(config)(uniform, {}, step=0, rng=None, workdir=tmp_path)
    assert 0 < found["order_bpb"] < 9 and found["order_items"] == 6


def test_mistakes_are_named(config, tmp_path):
    config.evaluation.ranked.source = "absent.jsonl"
    with pytest.raises(FileNotFoundError, match="config.evaluation.ranked.source='absent.jsonl'"):
        ranked_items.load(config)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "options": ["a"], "answer": 1}\n')
    with pytest.raises(ValueError, match="line 1: needs prompt, options and answer"):
        ranked_items.read(tmp_path / "bad.jsonl")
    config.evaluation.ranked.update(source="", tasks=("ordr",))
    with pytest.raises(ValueError, match="ranked.tasks 'ordr'. Did you mean 'order'"):
        ranked_items.load(config)


def test_defaults_are_in_every_config():
    assert base().evaluation.ranked.space == "counted"
