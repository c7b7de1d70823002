"""What a byte-level BPE is made of: byte symbols, merges in order, ids.

Ids: the alphabet first, then one for each product in the order of the merges; a product that is
there already keeps its id. Published files with other ids keep theirs (`Bpe.vocab`).
"""

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Pair = tuple[str, str]


@functools.cache
def byte_symbols() -> tuple[str, ...]:
    """The printable character that stands for each of the 256 bytes (GPT-2's map)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(b if b in printable else next(others)) for b in range(256))


@functools.cache
def symbol_bytes() -> Mapping[str, int]:
    """The byte of each symbol."""
    return {symbol: byte for byte, symbol in enumerate(byte_symbols())}


def spell(text: str) -> str:
    """Text in byte spelling: one symbol for each byte of its UTF-8."""
    return "".join(map(byte_symbols().__getitem__, text.encode()))


def unspell(spelling: str) -> bytes:
    """The bytes of a byte spelling."""
    return bytes(map(symbol_bytes().__getitem__, spelling))


@dataclass(frozen=True)
class Bpe:
    """vocab: token -> id; merges: pairs of tokens by rank."""

    vocab: Mapping[str, int]
    merges: tuple[Pair, ...]

    @classmethod
    def of(cls, alphabet: Iterable[str], merges: Sequence[Pair]) -> "Bpe":
        """Ids in canonical order: the alphabet as given, then products."""
        vocab: dict[str, int] = {}
        for symbol in alphabet:
            vocab.setdefault(symbol, len(vocab))
        for left, right in merges:
            vocab.setdefault(left + right, len(vocab))
        return cls(vocab, tuple(merges))

    @property
    def alphabet(self) -> tuple[str, ...]:
        """Byte symbols in the order of their ids."""
        return tuple(
            sorted((s for s in self.vocab if s in symbol_bytes()), key=self.vocab.__getitem__)
        )

    def first(self, merges: int) -> "Bpe":
        """The tokenizer after its first `merges` merges, ids in canonical order."""
        if merges > len(self.merges):
            raise ValueError(f"t={merges} is more than the {len(self.merges)} merges there are")
        return Bpe.of(self.alphabet, self.merges[:merges])

    def sized(self, vocab_size: int) -> "Bpe":
        """The tokenizer when its vocabulary, alphabet included, had reached this size."""
        tokens, count = set(self.alphabet), 0
        for left, right in self.merges:
            if len(tokens) >= vocab_size:
                break
            tokens.add(left + right)
            count += 1
        return self.first(count)


def digest(merges: Sequence[Pair]) -> str:
    """First 16 hex digits of SHA-256 over "left right" lines: tells two lists of merges apart."""
    text = "\n".join(f"{left} {right}" for left, right in merges)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_merges(path: Path, merges: Sequence[Pair]) -> None:
    """merges.txt with the usual first line."""
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def read_merges(path: Path) -> tuple[Pair, ...]:
    """The pairs of a merges.txt, with or without its first line."""
    lines = Path(path).read_text("utf-8").split("\n")
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip()]
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"{path}: merge {number} is {' '.join(pair)!r}, not two tokens")
    return tuple(pairs)


def read_alphabet(path: Path) -> tuple[str, ...]:
    """The symbols of an alphabet file in the order of their ids."""
    symbols = tuple(Path(path).read_text("utf-8").replace("\r", "").replace("\n", ""))
    unknown = [s for s in symbols if s not in symbol_bytes()]
    if unknown or len(set(symbols)) != len(symbols):
        raise ValueError(f"{path} must hold byte symbols, each once; {unknown[:3]} are none")
    return symbols
