"""Where text is cut and which merges are forbidden: the choices of SuperBPE (arXiv 2503.13423).

A pretokeniser is a tuple of regexes, each applied to what the one before left; what matches and
what lies between are pieces of their own ("isolated"). Stage 1 and plain BPE use S1, stage 2 a
preset's `train`; the finished tokenizer cuts text with `encode`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# Words with the one character before them, digits by three, punctuation, newlines, spaces.
S1 = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Only digits by three, two or more marks of punctuation, and runs of spaces stay by themselves.
S2 = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]{2,}[\r\n/]*| +(?!\S)"
DIGITS = r"\p{N}{1,3}"
DIGITS_FROM_RIGHT = (r"\p{N}+", r"(?=(\d{3})+(?!\d))")  # 1234567 -> 1|234|567
SPACE, NEWLINE = "Ġ", "Ċ"  # how byte-level BPE spells " " and "\n"
NUMERALS = frozenset("0123456789")
MARKS = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


@dataclass(frozen=True)
class Veto:
    """Which products stage 2 rejects; all of them concern new merges only.

    max_words:   most words of a token, pieces between spaces; 0: any number
    colon:       no token holds ": " (prompts such as "Answer: A" keep their border)
    newlines:    a newline is the last byte of its token
    digits:      ASCII digits join digits only, at most three
    punctuation: no ASCII punctuation in a token of two or more words (not a rule of the paper)
    """

    max_words: int = 4
    colon: bool = True
    newlines: bool = True
    digits: bool = True
    punctuation: bool = False


NO_VETO = Veto(max_words=0, colon=False, newlines=False, digits=False)


@dataclass(frozen=True)
class Rules:
    """How stage 2 cuts its text, what it may not merge, how the tokenizer cuts text."""

    train: tuple[str, ...]
    encode: tuple[str, ...]
    veto: Veto = Veto()


PRESETS: Mapping[str, Rules] = {
    "repo": Rules((S2,), (S2,)),  # the authors' present script
    # The released 200K tokenizers: digits are the only border. Of a digits' veto nothing is known,
    # and nothing is needed.
    "paper": Rules((DIGITS,), DIGITS_FROM_RIGHT),
    "none": Rules((), (), dataclasses.replace(Veto(), digits=False)),  # no border at all
    "bpe": Rules((S1,), (S1,), NO_VETO),  # plain BPE
}


def preset(name: str, **changes) -> Rules:
    """Rules by name; changes are fields of their Veto."""
    if name not in PRESETS:
        raise ValueError(f"config.data.superbpe.rules={name!r} is none of {', '.join(PRESETS)}")
    rules = PRESETS[name]
    return dataclasses.replace(rules, veto=dataclasses.replace(rules.veto, **changes))


def words(token: str) -> int:
    """Words of a token in byte spelling: its pieces between spaces."""
    return sum(1 for piece in token.split(SPACE) if piece)


def is_superword(token: str) -> bool:
    """Whether a token reaches over a space: two or more words."""
    return words(token) > 1


def rejected(product: str, veto: Veto) -> bool:
    """Whether the veto forbids this product; the definition, read by no fast path."""
    some = NUMERALS.intersection(product)
    count = words(product)
    return (
        (veto.max_words > 0 and count > veto.max_words)
        or (veto.colon and ":" + SPACE in product)
        or (veto.newlines and NEWLINE in product[:-1])
        or (veto.digits and bool(some) and (not NUMERALS.issuperset(product) or len(product) > 3))
        or (veto.punctuation and count > 1 and not MARKS.isdisjoint(product))
    )
