"""Ranked classification: multiple-choice items scored as continuations, without letters.

Of an item's right answer of b UTF-8 bytes and summed log-likelihood l (nats): bpb = -l / (b ln 2),
averaged over items (arXiv 2412.04403). The bytes are those of the text, so tokenizers compare.
Accuracy: the option of the highest l per character (len_norm), or of the highest l (acc).
"""

from typing import NamedTuple

import numpy as np

from eval import common, ranked_items
from input_pipeline import tokenizers

SPACES = ("counted", "scored", "none")
MULTIPLE = 32  # row lengths, so that few shapes are compiled


class Item(NamedTuple):
    """A question, its options as texts, the index of the right one."""

    task: str
    prompt: str
    options: tuple[str, ...]
    answer: int


class Row(NamedTuple):
    """Tokens of prompt and option; those from `begin` on are scored."""

    tokens: list[int]
    begin: int


def continuation(option: str, space: str) -> tuple[str, int]:
    """(text that follows the prompt, bytes that bits are divided by).

    space: "counted": one in front that costs bits and is a byte (the published convention);
    "scored": costs bits, is no byte; "none": the option follows the prompt as it is.
    """
    if space not in SPACES:
        raise ValueError(
            f"config.evaluation.ranked.space={space!r}: allowed are {', '.join(SPACES)}"
        )
    text = option if space == "none" else " " + option
    return text, len((option if space == "scored" else text).encode())


def bits_per_byte(log_likelihood, size) -> np.ndarray:
    """-l / (b ln 2) of log-likelihoods in nats and sizes in bytes."""
    return -np.asarray(log_likelihood, np.float64) / (np.asarray(size) * np.log(2))


def encode_row(tokenizer, prompt: str, text: str, length: int) -> Row:
    """BOS, prompt and text as one spelling, the prompt cut on its left where it is too long.

    A token that reaches over the border counts as the text's.
    """
    before, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    begin = 0
    while begin < min(len(before), len(whole)) and before[begin] == whole[begin]:
        begin += 1
    if begin == len(whole):
        raise ValueError(f"ranked classification: the option {text!r} has no token of its own")
    if len(whole) - begin >= length:
        raise ValueError(
            f"ranked classification: the option {text[:40]!r} has {len(whole) - begin} tokens, "
            f"config.data.length={length} has no room for it"
        )
    cut = max(0, len(whole) + 1 - length)
    return Row([tokenizer.bos, *whole[cut:]], 1 + begin - cut)


def to_batch(rows: list[Row], length: int) -> dict[str, np.ndarray]:
    """Rows padded to `length`, as the language models' text_nll takes them, int32 [n, length]."""
    batch = {
        key: np.zeros((len(rows), length), np.int32)
        for key in ("tokens", "segment_ids", "positions", "scored")
    }
    batch["positions"][:] = np.arange(length)
    for i, row in enumerate(rows):
        size = len(row.tokens)
        batch["tokens"][i, :size] = row.tokens
        batch["segment_ids"][i, :size] = 1
        batch["scored"][i, row.begin - 1 : size - 1] = 1  # a position's target is the next token
    return batch


def log_likelihoods(nll, params, rows: list[Row], batch: int) -> np.ndarray:
    """Summed log-likelihood (nats) of the scored tokens of each row, [n]."""
    longest = max(len(row.tokens) for row in rows)
    arrays = to_batch(rows, -(-longest // MULTIPLE) * MULTIPLE)

    def score(index):
        return nll(params, {key: value[index] for key, value in arrays.items()})["nll"]

    return -common.in_batches(score, len(rows), batch, lambda index: index).astype(np.float64)


def summarise(items: list[Item], scores: list[np.ndarray], space: str) -> dict[str, float]:
    """Metrics of the items of one task from the log-likelihoods of their options."""
    right = [s[item.answer] for item, s in zip(items, scores)]
    sizes = [continuation(item.options[item.answer], space)[1] for item in items]
    normed = [s / [len(o) for o in item.options] for item, s in zip(items, scores)]
    answers = np.array([item.answer for item in items])
    chance = float(np.mean([1 / len(item.options) for item in items]))
    return {
        "bpb": float(np.mean(bits_per_byte(right, sizes))),
        "len_norm": float(np.mean([s.argmax() for s in normed] == answers)),
        "len_norm_chance": chance,
        "acc": float(np.mean([s.argmax() for s in scores] == answers)),
        "acc_chance": chance,
        "items": float(len(items)),
    }


def build(config):
    """Evaluator "ranked" over config.evaluation.ranked: files of items, or some made of texts."""
    options = config.evaluation.ranked

    def evaluate(model, params, *, step, rng, workdir):
        tokenizer = tokenizers.load(config.data)
        items = [Item(*row) for row in ranked_items.load(config)]
        rows = [
            encode_row(
                tokenizer, i.prompt, continuation(o, options.space)[0], config.data.length
            )
            for i in items
            for o in i.options
        ]  # fmt: skip
        nll = common.need(model, "text_nll")
        found = log_likelihoods(nll, params, rows, config.evaluation.batch)
        ends = np.cumsum([len(item.options) for item in items])[:-1]
        scores = np.split(found, ends)
        metrics = {}
        for task in dict.fromkeys(item.task for item in items):
            of = [i for i, item in enumerate(items) if item.task == task]
            each = summarise([items[i] for i in of], [scores[i] for i in of], options.space)
            metrics |= {f"{task}_{name}": value for name, value in each.items()}
        return metrics

    return evaluate
