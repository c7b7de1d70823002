"""Multiple-choice items: read from a file, or made of the held-out texts of the data set.

File: one JSON object a line with "prompt", "options" and "answer" (index of the right option), and
perhaps "task". Made: `definition` (GCIDE: which of these definitions is the word's) and
`continuation` (how does this text go on), with options of other documents; `order` (in which order
were these words written), which a model of a few thousand parameters begins to know.
"""

import functools
import itertools
import json
import re
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from configs.loading import unknown
from input_pipeline import documents

HEAD = re.compile(r"(.{1,60}? \([^()]{1,24}\)) (\S.*)")  # "Snail (n.) A slow-going animal"
PROMPT, TEXT = 96, 80  # characters of a prompt and of an option, cut between words


def load(config) -> tuple[tuple, ...]:
    """(task, prompt, options, answer) of every item of config.evaluation.ranked."""
    options, split = config.evaluation.ranked, config.evaluation.held_out
    if options.source:
        return read(options.source)
    data = config.data.to_json_best_effort()
    return _made(data, split, options.tasks, options.count, options.choices, config.evaluation.seed)


def read(path) -> tuple[tuple, ...]:
    """Items of a file of JSON lines."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config.evaluation.ranked.source={str(path)!r}: no such file")
    items = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            choices = tuple(map(str, row["options"]))
            item = (str(row.get("task", path.stem)), str(row["prompt"]), choices, row["answer"])
            if not 0 <= item[3] < len(choices):
                raise ValueError("answer is the index of an option")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"config.evaluation.ranked.source={str(path)!r}, line {number}: needs prompt, "
                f"options and answer ({error!r})"
            ) from None
        items.append(item)
    if not items:
        raise ValueError(f"config.evaluation.ranked.source={str(path)!r} has no item")
    return tuple(items)


@functools.lru_cache(maxsize=4)
def _made(data: str, split: str, tasks, count: int, choices: int, seed: int) -> tuple[tuple, ...]:
    texts, _ = documents.load(ConfigDict(json.loads(data)), split)
    texts = list(dict.fromkeys(texts))
    items = []
    for task in tasks:
        if task not in TASKS:
            raise ValueError(unknown("config.evaluation.ranked.tasks", task, TASKS))
        pairs = [pair for pair in map(TASKS[task], texts) if pair]
        if len(pairs) > choices:
            make = _shuffled if task == "order" else _choose
            rng = np.random.default_rng(seed)
            items += [(task, *item) for item in make(pairs, count, choices, rng)]
    if not items:
        raise ValueError(
            f"config.evaluation.ranked.source='': the split {split!r} has too few texts to make "
            "items of; name a file of items"
        )
    return tuple(items)


def _definition(text: str) -> tuple[str, str] | None:
    """(word with its part of speech, first definition) of a dictionary entry."""
    found = HEAD.fullmatch(text.strip().split("\n")[0])
    return (found[1], _clip(found[2])) if found else None


def _continuation(text: str) -> tuple[str, str] | None:
    """(beginning, what follows it) of a longer text."""
    text = " ".join(text.split())
    prompt = _clip(text, PROMPT)
    return (prompt, _clip(text[len(prompt) + 1 :])) if len(text) > PROMPT + TEXT else None


def _order(text: str) -> tuple[str, str] | None:
    """(beginning, what follows it) of a text, in pieces that can be told apart when shuffled."""
    found = _definition(text) or _continuation(text)
    return found if found and len(set(found[1].split())) >= 5 else None


TASKS = {"definition": _definition, "continuation": _continuation, "order": _order}


def _clip(text: str, most: int = TEXT) -> str:
    """The first words that fit into `most` characters."""
    return text if len(text) <= most else text[: most + 1].rpartition(" ")[0] or text[:most]


def _choose(pairs, count, choices, rng) -> list[tuple]:
    """(prompt, options, answer) of random pairs, the other options from other pairs."""
    items = []
    for right in rng.permutation(len(pairs))[:count]:
        prompt, text = pairs[right]
        others = (pairs[i][1] for i in rng.permutation(len(pairs)) if i != right)
        wrong = list(itertools.islice((o for o in others if o != text), choices - 1))
        items.append((prompt, *_hide(text, wrong, rng)))
    return items


def _shuffled(pairs, count, choices, rng) -> list[tuple]:
    """(prompt, options, answer) of random pairs, the other options their words in other orders."""
    items = []
    for right in rng.permutation(len(pairs))[:count]:
        prompt, text = pairs[right]
        wrong: dict[str, None] = {}
        while len(wrong) < choices - 1:
            other = " ".join(rng.permutation(text.split()))
            if other != text:
                wrong[other] = None
        items.append((prompt, *_hide(text, list(wrong), rng)))
    return items


def _hide(text: str, wrong: list[str], rng) -> tuple[tuple[str, ...], int]:
    """The right option at a random place among the wrong ones."""
    answer = int(rng.integers(len(wrong) + 1))
    return (*wrong[:answer], text, *wrong[answer:]), answer
