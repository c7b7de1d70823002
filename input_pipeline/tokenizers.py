"""Text tokenizers: byte-level BPE trained on the captions, and published tokenizer.json files.

Both are Hugging Face `tokenizers` objects behind one small class. Special ids of a trained
tokenizer are Gemma's: PAD 0, EOS 1, BOS 2, and BOI 3 (in Gemma itself an `<unused>` row).
"""

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from absl import logging

from input_pipeline import corpus, store

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unused0>")
# What published files call the four marks, by preference.
ALIASES = {
    "pad": ("<pad>", "<|endoftext|>"),
    "eos": ("<eos>", "</s>", "<|endoftext|>"),
    "bos": ("<bos>", "<s>", "<|endoftext|>"),
    "boi": ("<unused0>", "<start_of_image>", "<boi>", "<|endoftext|>"),
}
BYTE_NEWLINE = "Ċ"  # how byte-level BPE spells "\n"


class TextTokenizer:
    """encode and decode, without special tokens, and the ids of the special tokens."""

    def __init__(self, inner: tokenizers.Tokenizer, name: str = "tokenizer"):
        inner.encode_special_tokens = True  # "<eos>" in a user's text is text, not the mark
        self.inner = inner
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.pad, self.eos, self.bos, self.boi = (self._special(n, name) for n in ALIASES)
        newline = inner.token_to_id(BYTE_NEWLINE)
        self.newline = self.encode("\n") if newline is None else [newline]

    def _special(self, which: str, name: str) -> int:
        for alias in ALIASES[which]:
            if (found := self.inner.token_to_id(alias)) is not None:
                return found
        raise ValueError(
            f"config.data.tokenizer={name!r} has no {which} token; it must hold one of "
            f"{', '.join(ALIASES[which])}"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of the text, no BOS or EOS."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts; several times faster than one by one."""
        encoded = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [e.ids for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens are left out, split characters are put together."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields text as soon as its characters are complete (a character may take 4 tokens)."""
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        for i in ids:
            if piece := stream.step(self.inner, int(i)):
                yield piece

    def save(self, path: Path) -> None:
        """Writes a tokenizer.json that Hugging Face libraries read."""
        self.inner.save(str(path))


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE: any text has a spelling, nothing is unknown.

    Every text gets one space in front, taken off again when decoding, so that a word has one
    spelling wherever it stands; decoding the encoded text gives it back exactly.
    """
    if vocab_size < len(SPECIALS) + 256:
        raise ValueError(f"config.data.vocab_size={vocab_size}; at least {len(SPECIALS) + 256}")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.normalizer = tokenizers.normalizers.Prepend(" ")
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteLevel(), tokenizers.decoders.Strip(" ", 1, 0)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return inner


@functools.lru_cache(maxsize=8)
def load_file(path: str) -> TextTokenizer:
    """A published or trained tokenizer.json."""
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"config.data.tokenizer={path!r} is not a file or folder of one")
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"config.data.tokenizer={path!r} is no tokenizer.json: {error}") from None
    return TextTokenizer(inner, path)


def load(data) -> TextTokenizer:
    """The tokenizer that the config names, trained and kept beside the data when it names none."""
    if data.tokenizer:
        return load_file(data.tokenizer)
    key = f"tokenizer-{data.vocab_size}-{corpus.fingerprint(data)}.json"

    def make(path: Path) -> None:
        train_bpe(corpus.texts(data), data.vocab_size).save(str(path))

    return load_file(str(store.prepare_once(data, key, make)))


def run(config, workdir) -> dict[str, float]:
    """Task "tokenizer": trains on the texts of config.data, writes tokenizer.json and a report."""
    if "superbpe" in config.data:
        from input_pipeline.superbpe import task

        return task.run(config, workdir)
    by_language = corpus.by_language(config.data)
    out = Path(workdir)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = TextTokenizer(train_bpe(corpus.texts(config.data), config.data.vocab_size))
    tokenizer.save(out / "tokenizer.json")
    report = {"vocab_size": tokenizer.vocab_size, "texts": sum(map(len, by_language.values()))}
    report |= {
        f"bytes_per_token/{lang}": _bytes_per_token(tokenizer, some)
        for lang, some in by_language.items()
    }
    (out / "tokenizer.report.json").write_text(json.dumps(report, indent=1) + "\n")
    logging.info("wrote %s: %s", out / "tokenizer.json", report)
    return report


def _bytes_per_token(tokenizer: TextTokenizer, texts: Sequence[str]) -> float:
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return sum(len(t.encode()) for t in texts) / max(tokens, 1)
