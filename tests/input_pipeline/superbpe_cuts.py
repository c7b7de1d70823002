"""Cutting of text for the reference, by the stock library's splits alone."""

import functools

import tokenizers
from tokenizers import pre_tokenizers


@functools.cache
def _cutter(pattern: str):
    steps = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")] if pattern else []
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, byte])


def cut(line: str, pattern: str) -> list[str]:
    """Pieces of one line in byte spelling; the pattern's matches are isolated."""
    return [piece for piece, _ in _cutter(pattern).pre_tokenize_str(line)]
