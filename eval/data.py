"""What evaluators ask of the data: captioned pictures of a split, right answers, token batches."""

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax.linen import meta

from eval import common
from export import weights
from input_pipeline import layout, sources, store, text_embeddings, tokenizers
from input_pipeline.examples import Examples, concatenate
from models import glyph_classifier

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "eval/weights/glyph_classifier_{size}.safetensors"
SPLITS = ("train", "held_out")


def split_name(config, name: str) -> str:
    """The stored split behind "train" or "held_out"."""
    if name == "train":
        return name
    if config.evaluation.held_out not in ("test", "validation"):
        raise ValueError(
            f"config.evaluation.held_out={config.evaluation.held_out!r}: allowed are test, "
            "validation"
        )
    return config.evaluation.held_out


def und_size(config) -> int:
    """Side in pixels of the pictures that the model looks at."""
    return config.data.und_size or config.data.image_size


def group_of(examples: Examples, row: int):
    """What equal pictures share; a picture without a group is alone."""
    item = examples.items[row]
    return item.group if item.group >= 0 else -2 - row


def captioned(config, name: str, size: int) -> Examples:
    """Captioned pictures of "train" or "held_out"; composed scenes only where nothing else is.

    A held-out picture that equals a training picture under another name is left out.
    """
    data = config.data
    names = [n for n in sources.names(data) if n != "scenes"] or ["scenes"]
    found = concatenate([sources.LOADERS[n](data, split_name(config, name), size) for n in names])
    found = found.where(lambda e: any(k in e.captions for k in data.langs))
    if name == "held_out":
        seen = {e.group for e in captioned(config, "train", size).items if e.group >= 0}
        found = found.where(lambda e: e.group not in seen)
    return found


def one_per_group(examples: Examples, most: int, seed: int) -> np.ndarray:
    """At most `most` rows with different pictures, in an order fixed by the seed."""
    taken, rows = set(), []
    for row in common.choose(len(examples), len(examples), seed):
        if (group := group_of(examples, row)) not in taken:
            taken.add(group)
            rows.append(row)
        if len(rows) == most:
            break
    return np.array(rows, np.int64)


def loss_batches(config, name: str, *, rows: int, count: int) -> list[dict[str, np.ndarray]]:
    """The first `count` mixed batches of `rows` rows of "train" or "held_out", as training sees
    them and with the example index; the same at every evaluation."""
    from input_pipeline import DATASETS

    small = config.copy_and_resolve_references()
    with small.unlocked():
        small.batch_size = rows
        small.data.prefetch = 0
    pipeline = DATASETS[config.data.name](
        small,
        split=split_name(config, name),
        seed=config.evaluation.seed,
        process_index=0,
        process_count=1,
    )
    try:
        batches = [dict(b) for b, _ in zip(pipeline.dataset, range(count))]
    finally:
        pipeline.close()
    return [
        batch | {"example": np.arange(i * rows, (i + 1) * rows, dtype=np.int32)}
        for i, batch in enumerate(batches)
    ]


def languages(config, wanted: Sequence[str]) -> tuple[str, ...]:
    """Those of `wanted` that the data has, or all of the data's."""
    return tuple(k for k in wanted if k in config.data.langs) or tuple(config.data.langs)


def caption(item, lang: str) -> str:
    """The caption in a language, or in the first language there is."""
    return item.captions.get(lang) or next(iter(item.captions.values()))


def right_names(config) -> dict:
    """{group: {lang: captions}} over every split: all of them are right for the same picture."""
    found: dict = {}
    data = config.data
    for source in sources.names(data):
        for split in store.SPLITS:
            for item in sources.LOADERS[source](data, split, und_size(config)).items:
                if item.group >= 0:
                    names = found.setdefault(item.group, {})
                    for lang, text in item.captions.items():
                        names.setdefault(lang, set()).add(text)
    return found


def tokenizer(config) -> tokenizers.TextTokenizer:
    """The tokenizer of the run's data."""
    return tokenizers.load(config.data)


def prompts(config, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as the training batches hold them: int32 [n, P] right-padded, lengths [n]; vectors
    [n, P, D] in place of tokens with config.data.text_embeddings."""
    if config.data.text_embeddings:
        return text_embeddings.prompts(config, captions)
    tok = tokenizer(config)
    rows = [layout.encode_prompt(tok, c, config.data.prompt_length) for c in captions]
    return np.stack([r.tokens for r in rows]), np.array([r.length for r in rows], np.int32)


def questions(config, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Question prefixes, int32 [n, T] right-padded, lengths [n].

    T is half of text_length unless one is longer, so that all evaluators share one compilation.
    """
    tok = tokenizer(config)
    rows = [layout.encode_question(tok, t, config.data.text_length) for t in texts]
    lengths = np.array([r.length for r in rows], np.int32)
    longest, room = int(lengths.max()), config.data.text_length
    width = room // 2 if longest <= room // 2 else room
    return np.stack([r.tokens for r in rows])[:, :width], lengths


def answered(config, asked: Sequence[str], answers: Sequence[str]) -> dict[str, np.ndarray]:
    """und_tokens [n, T], und_prefix [n], und_length [n] of questions with their answers."""
    tok, length = tokenizer(config), config.data.text_length
    rows = [layout.encode_answered(tok, q, a, length) for q, a in zip(asked, answers)]
    return {
        "und_tokens": np.stack([r.tokens for r in rows]),
        "und_prefix": np.array([r.prefix for r in rows], np.int32),
        "und_length": np.array([r.length for r in rows], np.int32),
    }


def texts_of(config, ids: np.ndarray) -> list[str]:
    """Generated ids [n, m] as text up to EOS."""
    tok = tokenizer(config)
    out = []
    for row in ids:
        end = np.flatnonzero(row == tok.eos)
        out.append(tok.decode(row[: end[0]] if len(end) else row).strip())
    return out


def unigram(config, texts: Sequence[str]) -> np.ndarray:
    """Log-probabilities [V] of answer tokens and EOS in `texts`, add-one smoothed."""
    tok = tokenizer(config)
    counts = np.ones(tok.vocab_size)
    tokens = Counter(i for ids in tok.encode_batch(texts) for i in ids)
    for i, n in tokens.items():
        counts[i] += n
    counts[tok.eos] += len(texts)
    return np.log(counts / counts.sum())


def classifier_features(config):
    """Function of pictures [-1, 1] -> features of the small glyph classifier, or None.

    Without config.evaluation.classifier the shipped weights serve 32 and 64 px; other sizes have
    no classifier.
    """
    size = f"small_{config.data.image_size}"
    path = Path(config.evaluation.classifier or WEIGHTS.format(size=config.data.image_size))
    path = path if path.exists() else ROOT / path
    if size not in glyph_classifier.SIZES or not (config.evaluation.classifier or path.exists()):
        return None
    return _load_features(path, size)


@functools.lru_cache(maxsize=4)
def _load_features(path: Path, size: str):
    cfg = glyph_classifier.SIZES[size]
    abstract = jax.eval_shape(
        lambda: meta.unbox(glyph_classifier.init_body(jax.random.key(0), cfg))
    )
    body = weights.from_published(
        weights.load_safetensors(path), weights.flat_map(abstract), abstract
    )
    return jax.jit(functools.partial(glyph_classifier.features, body, cfg))
