"""Embedded captions: equal to the encoder run on each alone, ragged, made once per weights."""

import json

import jax
import numpy as np
import pytest
import tokenizers

from export import weights
from input_pipeline import DATASETS, scenes, text_embeddings
from models import t5
from models.t5 import T5Config

CFG = T5Config(16, 2, 24, 2, head_dim=8, vocab_size=300, buckets=8, max_distance=16)


def save_encoder(folder, texts, seed=0, eos="</s>"):
    """A tiny random encoder as it would be published."""
    folder.mkdir(exist_ok=True)
    boxed = jax.jit(lambda key: t5.init(key, CFG))(jax.random.key(seed))
    flat = {k: np.asarray(v) for k, v in weights.flatten(boxed).items()}
    tensors = weights.to_published(weights.unflatten(flat), t5.weight_map(CFG))
    weights.save_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(t5.to_json(CFG)))
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(
        vocab_size=CFG.vocab_size, special_tokens=["<pad>", eos, "<unk>"], show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    inner.enable_truncation(3)  # published files may cut and pad by themselves
    inner.enable_padding(length=7)
    inner.save(str(folder / "tokenizer.json"))


@pytest.fixture
def config(make_config, tmp_path):
    config = make_config(8, source="scenes", text_embeddings=str(tmp_path / "encoder"))
    texts = [e.captions["en"] for e in scenes.load(config.data, "train", 32).items]
    save_encoder(tmp_path / "encoder", texts)
    return config


def build(config):
    return DATASETS["image_text"](config, split="train", seed=0, process_index=0, process_count=1)


def test_batches_hold_what_the_encoder_says_of_each_caption(config, take, tmp_path):
    """float16 of the float32 embedding of the caption alone, without padding; EOS is the last."""
    pipeline = build(config)
    encoder = text_embeddings.Encoder(tmp_path / "encoder")
    for batch in take(pipeline, 1):
        assert batch["gen_text"].shape == (4, config.data.prompt_length, 16)
        assert batch["gen_text"].dtype == np.float16
        for row, tokens, length in zip(
            batch["gen_text"], batch["gen_tokens"], batch["gen_text_length"]
        ):
            (ids,) = encoder.tokens([pipeline.tokenizer.decode(tokens)], 512)
            assert len(ids) == length and ids[-1] == 1 and 2 not in ids
            want = t5.encode(encoder.params, CFG, np.array([ids]), np.array([length]))[0]
            np.testing.assert_allclose(row[:length], want, atol=2e-3 * np.abs(want).max())
            assert not row[length:].any()


def test_long_captions_are_cut_before_their_eos(tmp_path):
    save_encoder(tmp_path / "encoder", ["one two three four five six"])
    encoder = text_embeddings.Encoder(tmp_path / "encoder")
    texts = ["one two three four five six", "two", "six </s> one"]
    assert [len(x) for x in encoder.tokens(texts, 512)] == [7, 2, 6]
    long, short, marked = encoder.tokens(texts, 4)
    assert len(long) == 4 and long[-1] == short[-1] == encoder.eos
    assert marked.count(encoder.eos) == 1
    encoder.write(texts, 4, tmp_path / "out")
    rows = text_embeddings.Rows(tmp_path / "out")
    assert len(rows) == 3 and [len(rows[i]) for i in range(3)] == [4, 2, 4]
    values, lengths = rows.gather([1, 0, 1], 5)
    np.testing.assert_array_equal(lengths, [2, 4, 2])
    np.testing.assert_array_equal(values[0], values[2])
    np.testing.assert_array_equal(values[1, :4], rows[0])


def test_embeddings_are_made_once_per_weights_and_captions(config, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIFLUD_CACHE", str(tmp_path / "cache"))
    folder, found = tmp_path / "encoder", scenes.load(config.data, "train", 32)
    first = text_embeddings.captions(config, found)
    with monkeypatch.context() as patch:
        patch.setattr(text_embeddings, "Encoder", lambda *a: pytest.fail("made again"))
        again = text_embeddings.captions(config, found)
        np.testing.assert_array_equal(first.rows.values, again.rows.values)
    save_encoder(folder, ["snail"], seed=1)
    text_embeddings.captions(config, found)
    config.data.prompt_length = 9
    shorter = text_embeddings.captions(config, found)
    assert np.diff(shorter.rows.starts).max() <= 9
    assert len(list((tmp_path / "cache" / "text_embeddings").iterdir())) == 6  # three, with locks


def test_edits_have_embeddings_of_their_instructions(config, take, tmp_path):
    config.data.edit = True
    pipeline, encoder = build(config), text_embeddings.Encoder(tmp_path / "encoder")
    (batch,) = take(pipeline, 1)
    assert batch["gen_text"].shape == (4, config.data.prompt_length, 16)
    asked = [pipeline.tokenizer.decode(tokens) for tokens in batch["gen_tokens"]]
    assert list(map(len, encoder.tokens(asked, 512))) == batch["gen_text_length"].tolist()


def test_unusable_folders_are_explained(config, tmp_path):
    folder = tmp_path / "encoder"
    save_encoder(folder, ["snail"], eos="<end>")
    with pytest.raises(ValueError, match="config.data.text_embeddings=.*has no '</s>'"):
        build(config)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="config.data.text_embeddings=.*tokenizer.json"):
        build(config)
    save_encoder(folder, ["snail"])
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.data.text_embeddings=.*Expecting"):
        build(config)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.data.text_embeddings=.*config.json"):
        build(config)
    config.data.text_embeddings = "nowhere"
    with pytest.raises(FileNotFoundError, match="text_embeddings='nowhere' does not exist"):
        build(config)
