"""SuperBPE: acceptance checks 1 to 6 of its specification, by number."""

import random
import re
from pathlib import Path

import pytest
import tokenizers as hf

from input_pipeline.superbpe import counting, encode, pieces, stage1, stage2, tokenizer_json
from input_pipeline.superbpe.bpe import Bpe, byte_symbols, digest, spell, unspell
from input_pipeline.superbpe.facts import facts_of, forbidden, note
from input_pipeline.superbpe.report import broken
from input_pipeline.superbpe.rules import (
    NO_VETO,
    NUMERALS,
    PRESETS,
    S1,
    S2,
    Rules,
    Veto,
    is_superword,
    preset,
    rejected,
    words,
)  # fmt: skip
from tests.input_pipeline import superbpe_reference as reference

ENGINES = [
    pytest.param("numba", marks=pytest.mark.skipif(not stage2.has_numba(), reason="no numba")),
    "python",
]
WORDS = [
    *("the", "of", "and", "a", "cat", "dog", "is", "in", "to", "was:", "12", "345", "x,", "y."),
    *("(z)", "é", "漢字", "don't", "...", "==", "ab", "aa", "aaa"),
]


def story(seed: int, size: int) -> str:
    """Text of any length out of a few words, with runs, blank lines and two kinds of newline."""
    rng = random.Random(seed)
    found = []
    while sum(map(len, found)) < size:
        line = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
        found.append(line + rng.choice(["\n", "\n", "\n\n", "\r\n", "  \n", ""]))
    return "".join(found)


@pytest.fixture(scope="module")
def folder(public_data) -> Path:
    return public_data("superbpe")


@pytest.fixture(scope="module")
def questions(folder) -> str:
    return (folder / "gsm8k_questions_train.txt").read_text("utf-8")


@pytest.fixture(scope="module")
def golden(questions):
    """The specification's text: plain BPE of 4,000 tokens, and SuperBPE from its first 2,000."""
    plain = stage1.train([questions[:400_000]], vocab_size=4000)
    engine = "auto"
    return plain, stage2.train([questions[:400_000]], plain.first(2000), 4000, engine=engine)


def stock(path: Path, vocab_size: int) -> list[tuple[str, str]]:
    """Merges of the stock trainer reading a file."""
    inner = hf.Tokenizer(hf.models.BPE())
    split = hf.pre_tokenizers.Split(hf.Regex(S1), "isolated")
    byte = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = hf.pre_tokenizers.Sequence([split, byte])
    inner.train([str(path)], hf.trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    inner.model.save(str(path.parent))
    lines = (path.parent / "merges.txt").read_text("utf-8").splitlines()[1:]
    return [tuple(line.split(" ")) for line in lines]


@pytest.mark.parametrize("size", [300, 4000])
def test_check_1_stage_1_is_the_stock_trainer(questions, tmp_path, size):
    """400 KB, and a text from elsewhere in the file; from memory and from counts on disk."""
    for text in (questions[:400_000], questions[700_000:760_000]):
        (tmp_path / "text.txt").write_text(text, "utf-8", newline="")
        expected = stock(tmp_path / "text.txt", size)
        assert list(stage1.train([text], vocab_size=size).merges) == expected
    counted = counting.count([text], (S1,), tmp_path / "counts.tsv", memory_mb=0.05)
    rows = counting.read_counts(counted)
    assert list(counting.stage1_from_counts(rows, vocab_size=size).merges) == expected


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(12))
def test_check_1_our_loop_is_the_stock_trainer_on_awkward_texts(engine, seed):
    """Few symbols, long runs, everything merged until no pair is left."""
    rng = random.Random(seed)
    symbols = ["ab", "a", "abc ", "ab\n"][seed % 4]
    texts = ["".join(rng.choices(symbols, k=rng.randint(1, 80))) for _ in range(6)]
    for size in (5, 20, 500):
        expected = stage1.train(texts, vocab_size=size, patterns=())
        start = Bpe.of(expected.alphabet, ())
        found = stage2.train(texts, start, size, Rules((), (), NO_VETO), engine=engine).bpe
        assert found.merges == expected.merges and found.vocab == expected.vocab


def test_check_2_digests(questions, golden):
    plain, found = golden
    assert len(plain.alphabet) == 93 and len(plain.vocab) == len(found.bpe.vocab) == 4000
    assert digest(plain.merges) == "6e194017c5c64479"
    assert digest(found.bpe.merges) == "53d74f27866262fa"


def test_check_2_bytes_per_token(questions, golden):
    text = questions[:400_000]
    for bpe, patterns, expected in (
        (golden[0], (S1,), 3.8208),
        (golden[1].bpe, PRESETS["repo"].encode, 4.6704),
    ):
        inner = tokenizer_json.build(bpe, patterns)
        value = tokenizer_json.bytes_per_token(inner, text.split("\n\n"), len(text.encode()))
        assert abs(value - expected) < 1e-4


def test_check_2_bytes_per_token_of_unseen_questions(public_data, golden):
    """The 1,473 questions of openai/grade-school-math behind the shared 6,000, one "\\n\\n" behind
    each, as published."""
    import json

    path = public_data("superbpe", "gsm8k_train.jsonl")
    rows = [json.loads(line)["question"] for line in path.read_text("utf-8").splitlines()][6000:]
    size = sum(len(row.encode()) + 2 for row in rows)
    for bpe, patterns, expected in (
        (golden[0], (S1,), 3.6371),
        (golden[1].bpe, PRESETS["repo"].encode, 4.3715),
    ):
        inner = tokenizer_json.build(bpe, patterns)
        assert abs(tokenizer_json.bytes_per_token(inner, rows, size) - expected) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("t", [0, 60, 140])
def test_check_2_equals_the_slow_reference_merge_by_merge(questions, engine, t):
    text = questions[900_000:908_000] + "Answer: 5\nSum: a: b: c\nSum: a: b: c\n"
    plain = stage1.train([text], vocab_size=260)
    expected, vocab = reference.train(
        text, S2, plain.merges[:t], 260, max_words=2, colon=True
    )  # fmt: skip
    found = stage2.train([text], plain.first(t), 260, preset("repo", max_words=2), engine=engine)
    assert list(found.bpe.merges) == expected and found.bpe.vocab == vocab


@pytest.mark.parametrize("name", ["repo", "paper", "none", "bpe"])
@pytest.mark.parametrize("seed", [0, 1])
def test_check_2_every_preset_equals_the_reference_on_made_up_text(name, seed):
    """With runs, "\\r\\n", blank lines; merges that stage 2 never sees are skipped."""
    text, rules = story(seed, 2500), PRESETS[name]
    plain = stage1.train([text], vocab_size=120)
    veto = rules.veto
    expected, vocab = reference.train(
        text, "|".join(rules.train), plain.merges[:40], 130,
        max_words=veto.max_words, colon=veto.colon,
    )  # fmt: skip
    for engine in ("auto", "python"):
        found = stage2.train([text], plain.first(40), 130, rules, engine=engine)
        assert list(found.bpe.merges) == expected and found.bpe.vocab == vocab
    assert found.skipped == 40 - found.inherited


def test_check_2_merges_that_never_happen_are_skipped():
    """Stage 1 of another text knows words that this one does not hold; ids close up."""
    start = stage1.train(["zebra zebra zebra the cat"], vocab_size=20)
    found = stage2.train(["the cat the cat the cat\n"] * 3, start, 40)
    assert found.skipped > 0 and found.inherited + found.skipped == len(start.merges)
    assert sorted(found.bpe.vocab.values()) == list(range(len(found.bpe.vocab)))
    assert set(start.alphabet) < set(found.bpe.vocab)  # symbols stay
    kept = stage2.train(["the cat the cat the cat\n"] * 3, start, 40, keep=True).bpe
    assert {t: kept.vocab[t] for t in start.vocab} == dict(start.vocab)


@pytest.mark.skipif(not stage2.has_numba(), reason="no numba: half a minute")
def test_check_3_equals_the_private_code_point_trick(questions):
    """Stage 2 without veto by the stock trainer: ids as characters, pieces as words, 1.4 MB."""
    plain = stage1.train([questions], vocab_size=2500)
    start = plain.first(1500)
    found = stage2.train([questions], start, len(start.vocab) + 700, Rules((S2,), (S2,), NO_VETO))
    base, inherited = found.bpe, found.inherited
    rows = pieces.collect([questions], pieces.with_all_bytes(start), (S2,))
    names = {i: token for token, i in pieces.with_all_bytes(start).vocab.items()}
    code = {token: chr(0x20000 + i) for token, i in base.vocab.items()}
    secret = "".join("\n" if i < 0 else code[names[i]] for i in rows.ids.tolist())
    inner = hf.Tokenizer(hf.models.BPE())
    inner.pre_tokenizer = hf.pre_tokenizers.Split("\n", "removed")
    repeated = _repeated(secret, rows)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=len(set(secret) - {"\n"}) + 700, show_progress=False, limit_alphabet=10**6
    )
    inner.train_from_iterator(repeated, trainer)
    plainly = {v: k for k, v in code.items()}
    import json

    merges = json.loads(inner.to_str())["model"]["merges"]
    expected = [tuple("".join(plainly[c] for c in half) for half in pair) for pair in merges]
    assert list(base.merges[inherited:]) == expected[: len(base.merges) - inherited]
    assert len(base.merges) - inherited >= 690  # a product that stage 1 knew takes no new id


def _repeated(secret: str, rows) -> list[str]:
    """Each piece as often as it occurs."""
    starts = [i for i, c in enumerate(secret) if c == "\n"][:-1]
    return [p for p, at in zip(secret.split("\n")[1:-1], starts) for _ in range(rows.weights[at])]


def _random_text(rng: random.Random) -> str:
    """Any characters that UTF-8 can hold: other scripts, marks, controls, emoji, words, digits."""
    out = []
    for _ in range(rng.randint(0, 12)):
        kind = rng.random()
        if kind < 0.3:
            code = rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
            out.append(chr(code))
        elif kind < 0.7:
            out.append(rng.choice(WORDS))
        else:
            out.append(rng.choice([" ", "  ", "\n", "\r\n", "\t", "\u2028", "\x0b", "12345", ": "]))
    return "".join(out)


def test_check_4_file_loads_in_stock_libraries_and_round_trips(questions, tmp_path):
    """10,000 strings through `tokenizers` and transformers, some thousand through our encoder."""
    transformers = pytest.importorskip("transformers")
    plain = stage1.train([questions[:200_000]], vocab_size=2000, all_bytes=True)
    bpe = stage2.train([questions[:200_000]], plain.first(900), 2000, all_bytes=True).bpe
    rules = PRESETS["repo"]
    path = tmp_path / "tokenizer.json"
    tokenizer_json.build(bpe, rules.encode, tokenizer_json.SPECIALS).save(str(path))
    loaded = hf.Tokenizer.from_file(str(path))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert loaded.token_to_id("<pad>") == len(bpe.vocab) == 2000
    ours = encode.Encoder(bpe, rules.encode)
    rng = random.Random(0)
    texts = [_random_text(rng) for _ in range(10_000)]
    texts[:40] = [questions[i * 2000 : i * 2000 + 900] for i in range(40)]
    encoded = [one.ids for one in loaded.encode_batch(texts, add_special_tokens=False)]
    assert loaded.decode_batch(encoded, skip_special_tokens=False) == texts
    for text, ids in zip(texts[:1500], encoded):
        assert ours.encode(text) == ids and ours.decode(ids) == text
    for text, ids in zip(texts[:300], encoded):
        assert fast(text, add_special_tokens=False)["input_ids"] == ids
        assert fast.decode(ids, clean_up_tokenization_spaces=False) == text
    again = tokenizer_json.load(path)
    assert again.bpe == Bpe(dict(bpe.vocab), bpe.merges)


SENTENCE = "By the way, I am a fan of the Milky Way."


def released(folder, name: str, rules: str) -> hf.Tokenizer:
    return tokenizer_json.from_merges(folder / name, folder / "alphabet.txt", rules)


def test_check_5_released_merges(folder, questions):
    name = "10G_180K_extend_200K_mw4_colon.merges.txt"
    blocks = questions.split("\n\n")
    for merges, rules, count, rate in (
        ("pretok_10G_200K.merges.txt", "bpe", 336_301, 4.2238),
        (name, "paper", 248_091, 5.7255),
        (name, "repo", 252_458, 5.6265),
    ):
        inner = released(folder, merges, rules)
        assert inner.get_vocab_size() == 200_000
        assert tokenizer_json.count_tokens(inner, blocks) == count
        size = len(questions.encode())
        assert abs(tokenizer_json.bytes_per_token(inner, blocks, size) - rate) < 1e-4
        if rules == "paper":
            ids = [189205, 181251, 244, 4332, 180235, 199785, 13]
            assert inner.encode(SENTENCE).ids == ids
            assert inner.encode("1234567 3.14159").tokens == [
                "1", "234", "567", "Ġ", "3", ".", "14", "159",
            ]  # fmt: skip


def test_check_6_constraints_hold(golden):
    new = [left + right for left, right in golden[1].bpe.merges[golden[1].inherited :]]
    assert not any(broken(new).values())
    superwords = [token for token in golden[1].bpe.vocab if is_superword(token)]
    assert len(superwords) > 500
    for token in superwords:
        assert ":Ġ" not in token and words(token) <= 4 and "Ċ" not in token[:-1]
        assert NUMERALS.isdisjoint(token)
    assert sum(broken(["a:Ġb", "aĠbĠcĠdĠe", "Ġ1", "aĊb"]).values()) == 4  # the check can fail


@pytest.mark.parametrize("engine", ENGINES)
def test_check_6_vetoes_hold_without_borders_and_lines(engine):
    """Rules "none": no regex keeps anything apart, the vetoes alone do."""
    text = story(3, 4000)
    for change in (dict(max_words=2), dict(punctuation=True), dict(digits=True), dict(colon=False)):
        rules = preset("none", **change)
        found = stage2.train([text], Bpe.of((), ()), 300, rules, engine=engine)
        new = [left + right for left, right in found.bpe.merges]
        assert new and not any(rejected(product, rules.veto) for product in new)


def test_veto_by_facts_is_the_veto_on_strings():
    """Constant-time facts of two tokens say what the product's string says."""
    rng = random.Random(1)
    parts = ["Ġ", "a", "bc", ":", "Ċ", "1", "23", ",", "Ġthe", "é", "č"]
    tokens = sorted({"".join(rng.choices(parts, k=rng.randint(1, 5))) for _ in range(300)})
    for veto in (
        Veto(), Veto(max_words=1), Veto(punctuation=True), NO_VETO,
        Veto(max_words=0, colon=False, digits=False),
    ):  # fmt: skip
        facts = facts_of(len(tokens), veto)
        for index, token in enumerate(tokens):
            note(facts, index, token)
        for _ in range(3000):
            a, b = rng.randrange(len(tokens)), rng.randrange(len(tokens))
            inherited = rejected(tokens[a], veto) or rejected(tokens[b], veto)
            if not inherited:
                expected = rejected(tokens[a] + tokens[b], veto)
                assert bool(forbidden(a, b, facts, facts.veto)) == expected, (tokens[a], tokens[b])


def test_byte_spelling():
    assert spell(" a\n") == "ĠaĊ" and unspell(spell("漢字 é")) == "漢字 é".encode()
    assert len(set(byte_symbols())) == 256
    assert set(byte_symbols()) == set(hf.pre_tokenizers.ByteLevel.alphabet())
    assert not re.search(r"\s", "".join(byte_symbols()))
