"""tokenizer.json, the file that `tokenizers` and `transformers` load: written and read.

model BPE with vocabulary and merges; pre-tokenizer: one isolating split for each regex, then the
byte map (after the splits: the other order changes digits and letters outside ASCII silently);
decoder: the byte map. A tokenizer that was begun from another has the normaliser and the decoder
of that one.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import pre_tokenizers

from input_pipeline.superbpe.bpe import Bpe, read_alphabet, read_merges, symbol_bytes
from input_pipeline.superbpe.rules import PRESETS

# Marks that configs of this repository look for (PAD, EOS, BOS, BOI).
SPECIALS = ("<pad>", "<eos>", "<bos>", "<unused0>")


class Loaded(NamedTuple):
    """A tokenizer.json taken apart; dicts are its JSON."""

    bpe: Bpe  # without the added tokens
    added: tuple[dict, ...] = ()  # marks, and others that are found before text is cut
    normalizer: dict | None = None
    decoder: dict | None = None
    post_processor: dict | None = None
    ignore_merges: bool = False  # a piece that is a token is taken whole, whatever merges say

    @property
    def free(self) -> int:
        """The first id behind all others."""
        ids = *self.bpe.vocab.values(), *(token["id"] for token in self.added)
        return max(ids, default=-1) + 1


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
    specials: Sequence[str] = (),
    *,
    lines: bool = False,
    like: Loaded | None = None,
) -> tokenizers.Tokenizer:
    """A tokenizer of the `tokenizers` package.

    patterns: regexes that cut text, e.g. preset("repo").encode. specials: marks, which get ids
    after the vocabulary. like: all but model and pre-tokenizer is that one's, unchanged.
    """
    kept = like or Loaded(bpe)
    vocab = {token["content"]: token["id"] for token in kept.added} | bpe.vocab
    free = max(vocab.values(), default=-1) + 1
    new = [name for name in dict.fromkeys(specials) if name not in vocab]
    vocab |= {name: free + i for i, name in enumerate(new)}  # the library would count tokens
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, list(bpe.merges)))
    inner.pre_tokenizer = cutter(patterns, lines)
    inner.decoder = tokenizers.decoders.ByteLevel()
    old = {token["content"] for token in kept.added}
    inner.add_special_tokens([name for name in specials if name not in old])
    if like:
        whole = json.loads(inner.to_str())
        whole["added_tokens"] = sorted([*kept.added, *whole["added_tokens"]], key=lambda t: t["id"])
        whole |= {"normalizer": kept.normalizer, "post_processor": kept.post_processor}
        whole["decoder"] = kept.decoder or whole["decoder"]
        inner = tokenizers.Tokenizer.from_str(json.dumps(whole))
    return inner


def normalised(texts: Iterable[str], normalizer: dict | None) -> Iterable[str]:
    """Texts behind a normaliser, each whole: it may treat where a text begins in its own way."""
    if not normalizer:
        return texts
    whole = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    inner = tokenizers.Tokenizer.from_str(json.dumps(whole | {"normalizer": normalizer}))
    return map(inner.normalizer.normalize_str, texts)


def find(path: str | Path) -> Path:
    """The file, or the one in a folder."""
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{str(path)!r} is not a tokenizer.json or a folder with one")
    return file


def load(path: str | Path) -> Loaded:
    """Takes a byte-level BPE's tokenizer.json, ours or a published one, apart."""
    file = find(path)
    try:
        found = json.loads(file.read_text("utf-8"))
        model, added = found["model"], tuple(found.get("added_tokens") or ())
        vocab, merges = model["vocab"], model["merges"]
        marks = {token["content"] for token in added}
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(file)!r} is no tokenizer.json of a BPE ({error!r})") from None
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ValueError(f"{str(file)!r} is no byte-level BPE: its model has {key}")
    pairs = tuple(tuple(m.split(" ") if isinstance(m, str) else m) for m in merges)
    plain = {t: i for t, i in vocab.items() if t not in marks}
    strange = next((t for t in plain if not symbol_bytes().keys() >= set(t)), None)
    if strange is not None:
        raise ValueError(f"{str(file)!r} is no byte-level BPE: token {strange!r} spells no bytes")
    missing = next((p for p in pairs if not {*p, p[0] + p[1]} <= plain.keys()), None)
    if missing is not None:
        raise ValueError(f"{str(file)!r}: merge {missing} has a token that is not in vocab")
    parts = map(found.get, ("normalizer", "decoder", "post_processor"))
    return Loaded(Bpe(plain, pairs), added, *parts, bool(model.get("ignore_merges")))


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
