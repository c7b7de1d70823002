"""tokenizer.json, the file that `tokenizers` and `transformers` load: written and read.

model BPE with vocabulary and merges; pre-tokenizer: one isolating split for each regex, then the
byte map (after the splits: the other order changes digits and letters outside ASCII silently);
decoder: the byte map. No normaliser unless the tokenizer that was extended had one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import pre_tokenizers

from input_pipeline.superbpe.bpe import Bpe, read_alphabet, read_merges, symbol_bytes
from input_pipeline.superbpe.rules import PRESETS

# Marks that configs of this repository look for (PAD, EOS, BOS, BOI).
SPECIALS = ("<pad>", "<eos>", "<bos>", "<unused0>")


class Loaded(NamedTuple):
    """A tokenizer.json taken apart."""

    bpe: Bpe
    specials: dict[str, int]  # added tokens, special or not, which text never spells
    normalizer: dict | None  # JSON of the normaliser
    pre_tokenizer: dict | None  # JSON; how it cuts text before any change of rules


def cutter(patterns: Sequence[str], lines: bool = False) -> pre_tokenizers.Sequence:
    """The pre-tokenizer of some regexes; `lines`: also cut behind every newline, as the stock
    trainer does when it reads files."""
    steps: list = []
    if lines:
        steps.append(pre_tokenizers.Split("\n", "merged_with_previous"))
    steps += [pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)


def build(
    bpe: Bpe,
    patterns: Sequence[str],
    specials: Sequence[str] | dict[str, int] = (),
    *,
    lines: bool = False,
    normalizer: dict | None = None,
) -> tokenizers.Tokenizer:
    """A tokenizer of the `tokenizers` package.

    patterns: regexes that cut text, e.g. preset("repo").encode. specials: marks, which get ids
    after the vocabulary, or the ids that they have.
    """
    vocab = dict(bpe.vocab)
    ids = specials if isinstance(specials, dict) else {}
    vocab |= {token: i for token, i in ids.items() if token not in vocab}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, list(bpe.merges)))
    inner.pre_tokenizer = cutter(patterns, lines)
    inner.decoder = tokenizers.decoders.ByteLevel()
    if normalizer:
        text = json.loads(inner.to_str()) | {"normalizer": normalizer}
        inner = tokenizers.Tokenizer.from_str(json.dumps(text))
    inner.add_special_tokens(list(specials))
    return inner


def load(path: str | Path) -> Loaded:
    """Takes a byte-level BPE's tokenizer.json, ours or a published one, apart."""
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{str(path)!r} is not a tokenizer.json or a folder with one")
    try:
        found = json.loads(file.read_text("utf-8"))
        model = found["model"]
        vocab, merges = model["vocab"], model["merges"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(file)!r} is no tokenizer.json of a BPE ({error!r})") from None
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ValueError(f"{str(file)!r} is no byte-level BPE: its model has {key}")
    pairs = tuple(tuple(m.split(" ") if isinstance(m, str) else m) for m in merges)
    added = {t["content"]: t["id"] for t in found.get("added_tokens") or ()}
    plain = {t: i for t, i in vocab.items() if t not in added}
    strange = next((t for t in plain if not symbol_bytes().keys() >= set(t)), None)
    if strange is not None:
        raise ValueError(f"{str(file)!r} is no byte-level BPE: token {strange!r} spells no bytes")
    missing = next((p for p in pairs if not {*p, p[0] + p[1]} <= plain.keys()), None)
    if missing is not None:
        raise ValueError(f"{str(file)!r}: merge {missing} has a token that is not in vocab")
    return Loaded(Bpe(plain, pairs), added, found.get("normalizer"), found.get("pre_tokenizer"))


def from_merges(
    merges: str | Path, alphabet: str | Path, rules: str, specials: Sequence[str] = ()
) -> tokenizers.Tokenizer:
    """A released merges.txt with its alphabet file as a tokenizer; rules: a name in PRESETS."""
    if rules not in PRESETS:
        raise ValueError(f"rules={rules!r} is none of {', '.join(PRESETS)}")
    bpe = Bpe.of(read_alphabet(Path(alphabet)), read_merges(Path(merges)))
    return build(bpe, PRESETS[rules].encode, specials)


def count_tokens(inner: tokenizers.Tokenizer, texts: Sequence[str]) -> int:
    """Tokens of the texts, each encoded by itself."""
    return sum(map(len, inner.encode_batch_fast(list(texts), add_special_tokens=False)))


def bytes_per_token(
    inner: tokenizers.Tokenizer, texts: Sequence[str], total_bytes: int | None = None
) -> float:
    """Bytes of UTF-8 for each token, each text encoded by itself.

    total_bytes: of the file that the texts were cut from, where what separated them counts too.
    """
    size = sum(len(t.encode()) for t in texts) if total_bytes is None else total_bytes
    return size / max(count_tokens(inner, texts), 1)
