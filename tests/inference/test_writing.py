"""What a language model writes: files, records, streaming, and pictures that it cannot read."""

import json

import flax.linen as nn
import jax
import pytest

from configs.common import load_config
from inference import sample, writing
from models import MODELS


class Letters:
    """A tokenizer of 64 characters."""

    bos = 2

    def encode(self, text):
        return [ord(c) - 33 for c in text]

    def decode(self, ids):
        return "".join(chr(33 + i) for i in ids).removeprefix("!")  # as if it were a space


@pytest.fixture
def run():
    config = load_config("configs/xlstm.py:debug", **{"model.vocab_size": 64, "sample.max_new": 5})
    model = MODELS["xlstm"](config)
    params = jax.jit(lambda key: nn.meta.unbox(model.init(key)[0]))(jax.random.key(0))
    return config, model, params


def test_prompts_become_texts_and_records(run, tmp_path, capsys):
    common = dict(tokenizer=Letters(), step=3, rng=jax.random.key(1), workdir=tmp_path)
    files = sample.respond(*run, prompts=["ABC", "X"], images=[], **common)
    assert [f.name for f in files] == ["sample-3.txt", "sample-3.json"]
    records = json.loads(files[1].read_text())
    texts = [r["prompt"] + r["text"] for r in records]
    assert files[0].read_text() == "\n\n".join(texts) + "\n"
    assert [r["prompt"] for r in records] == ["ABC", "X"] and len(records[0]["text"]) <= 5
    assert "\n\n".join(texts) in capsys.readouterr().out
    with pytest.raises(ValueError, match="reads and writes text only"):
        sample.respond(*run, prompts=[], images=["x.png"], **common)


def test_one_prompt_is_shown_as_it_is_written(run, tmp_path, capsys):
    path = tmp_path / "samples" / "a.txt"
    given = dict(tokenizer=Letters(), prompts=["AB"], rng=jax.random.key(1), path=path)
    writing.write(*run, stream=True, **given)
    assert capsys.readouterr().out.rstrip("\n") == path.read_text().rstrip("\n")


def test_the_loop_writes_the_configs_prompts(run, tmp_path):
    config, model, params = run
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.sample.prompts = ("A", "B")
    common = dict(tokenizer=Letters(), step=7, rng=jax.random.key(1), workdir=tmp_path)
    sample.write(config, model, params, **common)
    assert len(json.loads((tmp_path / "samples" / "prompts-7.json").read_text())) == 2
