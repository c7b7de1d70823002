"""Tokenizers: exact round trips in every script, special ids, published files, the task."""

import json

import pytest
import tokenizers as hf

from configs.common import load_config
from input_pipeline import layout, openmoji, tokenizers

HARD = [
    "",
    " leading space",
    "  two, and\n new lines\n\n",
    "ひらがな 漢字 カナ",
    "달팽이와 거북이",
    "科威特的旗帜",
    "علم الكويت",
    "حلزون پرچم",
    "улитка",
    "👩🏽‍🚒 emoji \u200d joined",
    "tab\tand \x00 control",
    "caption en",
]


@pytest.fixture
def tokenizer(make_config):
    return tokenizers.load(make_config(vocab_size=1024).data)


def test_special_ids_are_gemmas(tokenizer):
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos, tokenizer.boi) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 1024 and len(tokenizer.newline) == 1


@pytest.mark.parametrize("text", HARD)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, 0, 0]) == text
    assert min(ids, default=4) >= 4
    assert "".join(tokenizer.stream(ids)).strip() == text.strip()


def test_round_trip_of_every_caption(tokenizer):
    texts = [t for g in openmoji.all_glyphs()[::40] for t in g.names.values()]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert encoded[7] == tokenizer.encode(texts[7])


def test_stream_never_gives_half_a_character(tokenizer):
    text = "漢字 علم 🐌"
    pieces = list(tokenizer.stream(tokenizer.encode(text)))
    assert all("\ufffd" not in piece for piece in pieces) and len(pieces) > 3


def test_marks_in_a_text_are_only_text(tokenizer):
    ids = tokenizer.encode("a <eos> b")
    assert min(ids) >= 4 and tokenizer.decode(ids) == "a <eos> b"


def test_a_word_has_one_spelling_everywhere(tokenizer):
    alone, within = tokenizer.encode("snail"), tokenizer.encode("3 snail on pink")
    starts = range(1, len(within) - len(alone))
    assert any(within[i : i + len(alone)] == alone for i in starts)


def test_training_is_deterministic():
    texts = ["red apple", "green apple", "blue whale", "a whale"] * 5
    first, second = (tokenizers.train_bpe(texts, 300).to_str() for _ in range(2))
    assert first == second
    with pytest.raises(ValueError, match="config.data.vocab_size=100; at least 260"):
        tokenizers.train_bpe(texts, 100)


def _gemma_like(path, marks=("<pad>", "<eos>", "<bos>", "<unk>", "<unused0>")):
    """A file of Gemma's layout: BPE with byte fallback, spaces as U+2581."""
    vocab = {m: i for i, m in enumerate(marks)}
    for i in range(256):
        vocab[f"<0x{i:02X}>"] = len(vocab)
    for piece in ("▁", "a", "b", "ab", "\n"):
        vocab[piece] = len(vocab)
    inner = hf.Tokenizer(hf.models.BPE(vocab, [("a", "b")], byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = hf.normalizers.Replace(" ", "▁")
    inner.decoder = hf.decoders.Sequence(
        [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    )
    inner.add_special_tokens([m for m in marks if m != "<unk>"])
    inner.save(str(path))


def test_published_layout(make_config, tmp_path):
    _gemma_like(tmp_path / "tokenizer.json")
    data = make_config(tokenizer=str(tmp_path)).data
    found = tokenizers.load(data)
    assert (found.pad, found.eos, found.bos, found.boi) == (0, 1, 2, 4)
    assert found.vocab_size == 266
    assert found.decode(found.encode("ab a 漢")) == "ab a 漢"
    asked = layout.encode_question(found, "ab", 8)
    assert asked.tokens.tolist() == [2, *found.encode("ab"), *found.encode("\n"), 0, 0, 0, 0, 0]


def test_unusable_files_are_explained(make_config, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.data.tokenizer='nowhere.json'"):
        tokenizers.load(make_config(tokenizer="nowhere.json").data)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer.json"):
        tokenizers.load(make_config(tokenizer=str(tmp_path / "x.json")).data)
    _gemma_like(tmp_path / "y.json", marks=("<pad>", "<eos>", "<unk>", "<unused0>"))
    with pytest.raises(ValueError, match="has no bos token; it must hold one of <bos>"):
        tokenizers.load(make_config(tokenizer=str(tmp_path / "y.json")).data)


def test_task_writes_file_and_report(tmp_path):
    config = load_config("configs/tokenizer.py:debug")
    report = tokenizers.run(config, tmp_path)
    assert json.loads((tmp_path / "tokenizer.report.json").read_text()) == report
    assert report["vocab_size"] == 512 and report["bytes_per_token/en"] > 1.5
    assert tokenizers.load_file(str(tmp_path)).decode([4]) is not None
