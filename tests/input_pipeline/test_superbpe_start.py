"""SuperBPE from a tokenizer.json: exact, whatever marks, normaliser and decoder the file has."""

import json

import pytest
import tokenizers as hf

from input_pipeline import tokenizers
from input_pipeline.superbpe import pieces, stage1, stage2, task, tokenizer_json
from input_pipeline.superbpe.bpe import read_merges
from input_pipeline.superbpe.rules import S1, S2
from tests.input_pipeline.superbpe_texts import TEXT, config

STRINGS = ["snail whale", " snail", "  a  b    c ", "", "\n", "漢字 é <eos> <|end|>", TEXT[:300]]


def token(content: str, index: int, special: bool = True) -> dict:
    """An entry of added_tokens."""
    sides = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"id": index, "content": content, **sides, "normalized": not special, "special": special}


def template(name: str, index: int) -> dict:
    """A post-processor that sets a mark in front."""
    made = hf.processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, index)])
    return json.loads(made.__getstate__())


def layout(name: str) -> dict:
    """A file as others lay it out, 300 tokens and marks."""
    bpe = stage1.train([TEXT], vocab_size=300, all_bytes=True)
    found = json.loads(tokenizer_json.build(bpe, (S1,)).to_str())
    vocab = found["model"]["vocab"]
    match name:
        case "ours":
            return json.loads(tokenizer_json.build(bpe, (S1,), ("<eos>", "<pad>")).to_str())
        case "gpt2":  # the mark is the last entry of the vocabulary
            vocab["<|end|>"] = 300
            found["added_tokens"] = [token("<|end|>", 300)]
        case "llama3":  # marks behind the vocabulary and not in it, one set in front of texts
            found["added_tokens"] = [token("<|begin|>", 300), token("<|end|>", 301)]
            found["post_processor"] = template("<|begin|>", 300)
        case "neox":  # marks first, runs of spaces behind
            vocab = {"<|end|>": 0} | {t: i + 1 for t, i in vocab.items()}
            found["model"]["vocab"] = vocab
            spaces = [token(" " * n, 305 - n, False) for n in (4, 3, 2)]
            found["added_tokens"] = [token("<|end|>", 0), *spaces]
    return found


def run(tmp_path, found: dict, size: int, **fields) -> hf.Tokenizer:
    """The task from such a file; what the library reads afterwards."""
    (tmp_path / "start.json").write_text(json.dumps(found))
    (tmp_path / "in.txt").write_text(TEXT, newline="")
    over = config(
        tmp_path / "in.txt", f"data.vocab_size={size}", start=str(tmp_path / "start.json"), **fields
    )
    task.run(over, tmp_path / "out")
    return hf.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))


@pytest.mark.parametrize("name", ["ours", "gpt2", "llama3", "neox"])
def test_an_extended_tokenizer_keeps_its_ids_and_marks(tmp_path, name):
    """No id twice, none changed; added tokens and post-processor as they were."""
    found = layout(name)
    old = hf.Tokenizer.from_str(json.dumps(found))
    made = run(tmp_path, found, 360, keep=True)
    assert old.get_vocab().items() < made.get_vocab().items()
    assert len(set(made.get_vocab().values())) == len(made.get_vocab())
    whole = json.loads(made.to_str())
    for key in ("added_tokens", "post_processor", "normalizer", "decoder"):
        assert whole[key] == json.loads(old.to_str())[key], key
    for text in STRINGS:
        ids = made.encode(text, add_special_tokens=False).ids
        assert made.decode(ids, skip_special_tokens=False) == text
    assert made.encode("a", add_special_tokens=True).ids[0] == old.encode("a").ids[0]
    again = tokenizer_json.load(tmp_path / "out")
    assert again.free == max(made.get_vocab().values()) + 1 and again.added


@pytest.mark.parametrize("name", ["ours", "llama3"])
def test_without_keep_it_is_a_new_tokenizer(tmp_path, name):
    """Canonical ids, then the marks of the config."""
    made = run(tmp_path, layout(name), 340)
    assert made.token_to_id("<pad>") == 340 and made.token_to_id("<|end|>") is None
    assert made.decode(made.encode(TEXT).ids) == TEXT


def test_extending_goes_on_from_what_was_saved(tmp_path):
    """Stopped anywhere and continued, new tokens keep out of the marks' ids."""
    (tmp_path / "start.json").write_text(json.dumps(layout("llama3")))
    start = tokenizer_json.load(tmp_path / "start.json")
    more = dict(all_bytes=True, keep=True, first_new=start.free)
    whole = stage2.train([TEXT], start.bpe, 360, **more).bpe
    assert min(i for t, i in whole.vocab.items() if t not in start.bpe.vocab) == 302
    for stop in (45, 70):
        half = stage2.extended(start.bpe, whole.merges[:stop], start.free)
        assert stage2.train([TEXT], half, 360, **more).bpe == whole


@pytest.mark.parametrize("keep", [False, True])
def test_normaliser_and_decoder_stay(tmp_path, keep):
    """configs/tokenizer.py's own file: one space is set in front and taken off again. Counting on
    disk gives the merges of memory."""
    found = json.loads(tokenizers.train_bpe([TEXT], 320).to_str())
    merges = []
    for count in ("memory", "disk"):
        folder = tmp_path / count
        folder.mkdir()
        made = run(folder, found, 380, keep=keep, count=count)
        made.encode_special_tokens = True
        for text in STRINGS:
            assert made.decode(made.encode(text).ids, skip_special_tokens=False) == text
        merges.append(read_merges(folder / "out" / "merges.txt"))
    assert merges[0] == merges[1]


def test_documents_pass_the_normaliser_whole():
    """Longer than what the library is given at a time: still one space in front."""
    text = "ab\n" * 5000
    full = pieces.with_all_bytes(stage1.train([text], merges=0, all_bytes=True))
    prepend = {"type": "Prepend", "prepend": " "}
    assert pieces.collect([text], full, (S2,), normalizer=prepend).tokens == len(text) + 1
    assert list(tokenizer_json.normalised(["A b"], {"type": "Lowercase"})) == ["a b"]


def test_ignore_merges_is_refused_or_left_behind(tmp_path):
    """Where whole tokens go before merges, training by merges cannot keep that promise."""
    found = layout("gpt2")
    found["model"]["ignore_merges"] = True
    with pytest.raises(ValueError, match="takes whole tokens whatever its merges say"):
        run(tmp_path, found, 360, keep=True)
    made = run(tmp_path, found, 360)
    assert not json.loads(made.to_str())["model"]["ignore_merges"]


def test_a_vocabulary_below_the_starts_is_explained(tmp_path):
    """Without `keep`, merges that the text does not use may make room in the same size."""
    for size, fields, message in (
        (299, {}, "vocab_size=299: stage 2 begins with 300 tokens .t=44., so at least 300"),
        (300, dict(keep=True), "so at least 301 are needed"),
        (310, dict(t=60), "t=60: allowed are -1 and 0 to 44, the merges that `start` has"),
        (340, dict(keep=True, t=20), "it needs start=FILE, t=-1 and sweep="),
        (340, dict(keep=True, sweep=(0.0, 1.0)), "it needs start=FILE, t=-1 and sweep="),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, layout("ours"), size, **fields)
    assert run(tmp_path, layout("ours"), 300).get_vocab_size() == 304


def test_stage_2_goes_on_from_any_tokenizer_exactly(tmp_path):
    """Saved, read and continued = never stopped; ids of an extended vocabulary stay."""
    plain = stage1.train([TEXT], vocab_size=120)
    whole = stage2.train([TEXT], plain.first(40), 200).bpe
    for stop in (0, 45, 70):
        start = whole.first(stop) if stop else plain.first(40)
        tokenizer_json.build(start, (S2,), ("<eos>",)).save(str(tmp_path / "tokenizer.json"))
        again = tokenizer_json.load(tmp_path)
        assert stage2.train([TEXT], again.bpe, 200).bpe == whole
        assert [mark["content"] for mark in again.added] == ["<eos>"]
    # GPT-2's kind of file: specials first, ids in an order of its own, merges as text.
    trainer = hf.trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"],
                                     initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
                                     show_progress=False)  # fmt: skip
    inner = hf.Tokenizer(hf.models.BPE())
    inner.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.normalizer = hf.normalizers.NFC()
    inner.train_from_iterator([TEXT], trainer)
    inner.save(str(tmp_path / "other.json"))
    over = ("data.vocab_size=380",)
    (tmp_path / "in.txt").write_text(TEXT, newline="")
    fields = dict(start=str(tmp_path / "other.json"), keep=True)
    task.run(config(tmp_path / "in.txt", *over, **fields), tmp_path / "out")
    made = hf.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert inner.get_vocab().items() <= made.get_vocab().items()
    assert made.get_vocab_size() == 382 and "NFC" in made.to_str()
    assert made.decode(made.encode(TEXT).ids) == TEXT


def test_files_that_are_no_byte_level_bpe_are_explained(tmp_path):
    file = tmp_path / "x.json"
    for text, message in (
        ("{}", "no tokenizer.json of a BPE"),
        ('{"model": {"vocab": {"▁a": 0}, "merges": []}}', "token '▁a' spells no bytes"),
        ('{"model": {"vocab": {}, "merges": [], "byte_fallback": true}}', "has byte_fallback"),
        ('{"model": {"vocab": {"a": 0}, "merges": ["a b"]}}', "a token that is not in vocab"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            tokenizer_json.load(file)
