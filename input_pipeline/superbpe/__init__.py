"""SuperBPE (arXiv 2503.13423): byte-level BPE whose tokens grow over spaces in a second stage.

from input_pipeline import superbpe

plain = superbpe.train_stage1(texts, vocab_size=16_000)              # ordinary BPE
found = superbpe.train_stage2(texts, plain.first(6_000), 16_000)     # goes on over spaces
rules = superbpe.preset("repo")
inner = superbpe.build(found.bpe, rules.encode, superbpe.SPECIALS)   # tokenizers.Tokenizer
inner.save("tokenizer.json")
superbpe.bytes_per_token(inner, held_out_texts)

start = superbpe.load("tokenizer.json").bpe                          # ours or a published one
start = superbpe.Bpe.of(superbpe.read_alphabet(a), superbpe.read_merges(m))
released = superbpe.from_merges(m, a, "paper")                       # merges.txt and alphabet
"""

from input_pipeline.superbpe.bpe import (
    Bpe,
    digest,
    read_alphabet,
    read_merges,
    spell,
    unspell,
    write_merges,
)
from input_pipeline.superbpe.encode import Encoder
from input_pipeline.superbpe.rules import PRESETS, S1, S2, Rules, Veto, is_superword, preset, words
from input_pipeline.superbpe.stage1 import train as train_stage1
from input_pipeline.superbpe.stage2 import train as train_stage2
from input_pipeline.superbpe.tokenizer_json import (
    SPECIALS,
    build,
    bytes_per_token,
    count_tokens,
    from_merges,
    load,
)

__all__ = [
    "PRESETS", "S1", "S2", "SPECIALS", "Bpe", "Encoder", "Rules", "Veto", "build",
    "bytes_per_token", "count_tokens", "digest", "from_merges", "is_superword", "load", "preset",
    "read_alphabet", "read_merges", "spell", "train_stage1", "train_stage2", "unspell", "words",
    "write_merges",
]  # fmt: skip
