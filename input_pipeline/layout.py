"""The token layouts of prompts and questions: what training batches and evaluators share.

prompt:   BOS caption                          (PAD to the right)
question: BOS question "\\n" | answer EOS       (the prefix ends before the bar)

Several questions about one picture may share a row, one after the other (`pack`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from input_pipeline.tokenizers import TextTokenizer


class Prompt(NamedTuple):
    """Right-padded ids and how many of them count."""

    tokens: np.ndarray  # int32 [length]
    length: int
    truncated: bool


class Answered(NamedTuple):
    """Right-padded ids of question and answer; `prefix` of them are the question."""

    tokens: np.ndarray  # int32 [length]
    prefix: int
    length: int
    truncated: bool


class Packed(NamedTuple):
    """Questions with their answers in one row of right-padded ids, int32 [length] each."""

    tokens: np.ndarray
    segments: np.ndarray  # 1, 2, ... of each question with its answer; 0 for padding
    prefix: np.ndarray  # tokens of the own segment that are its question; 0 for padding


def caption_question(lang: str) -> str:
    """The question that asks for a caption in a language."""
    return f"caption {lang}"


def _padded(ids: Sequence[int], length: int, pad: int) -> np.ndarray:
    out = np.full(length, pad, np.int32)
    out[: len(ids)] = ids
    return out


def encode_prompt(tokenizer: TextTokenizer, caption: str, length: int) -> Prompt:
    """BOS + caption, cut to `length`. The empty caption is BOS alone: the null prompt."""
    ids = [tokenizer.bos, *tokenizer.encode(caption)]
    cut = ids[:length]
    return Prompt(_padded(cut, length, tokenizer.pad), len(cut), len(ids) > length)


def encode_question(tokenizer: TextTokenizer, question: str, length: int) -> Prompt:
    """BOS + question + newline, cut to `length` before the newline: what generation starts from."""
    room = length - 1 - len(tokenizer.newline)
    ids = tokenizer.encode(question)
    cut = [tokenizer.bos, *ids[:room], *tokenizer.newline]
    return Prompt(_padded(cut, length, tokenizer.pad), len(cut), len(ids) > room)


def encode_answered(tokenizer: TextTokenizer, question: str, answer: str, length: int) -> Answered:
    """BOS + question + newline + answer + EOS, cut to `length`.

    A question that leaves the answer no room is cut to half of it; an answer that does not fit is
    cut and has no EOS, since it does not end there.
    """
    target = [*tokenizer.encode(answer), tokenizer.eos]
    asked = encode_question(tokenizer, question, length)
    if asked.length + len(target) > length and asked.length > length // 2:
        asked = encode_question(tokenizer, question, max(length // 2, length - len(target)))
    prefix = asked.tokens[: asked.length].tolist()
    ids = [*prefix, *target]
    truncated = asked.truncated or len(ids) > length
    cut = ids[:length]
    return Answered(_padded(cut, length, tokenizer.pad), asked.length, len(cut), truncated)


def pack(rows: Sequence[Answered], length: int, pad: int) -> Packed:
    """The first row, and those after it that still fit whole, in order."""
    tokens = np.full(length, pad, np.int32)
    segments, prefix = np.zeros(length, np.int32), np.zeros(length, np.int32)
    start = count = 0
    for row in rows:
        end = start + row.length
        if end <= length:
            count += 1
            tokens[start:end] = row.tokens[: row.length]
            segments[start:end], prefix[start:end] = count, row.prefix
            start = end
    return Packed(tokens, segments, prefix)
