"""Embeddings of every caption by a frozen Flan-T5 encoder, made once per data set and weights.

config.data.text_embeddings names the encoder's folder as it is published: config.json, weights,
tokenizer.json. Rows are ragged and kept one after another, float16, memory-mapped: only what a
batch holds is read.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tokenizers
from absl import logging

from input_pipeline import latents, store
from input_pipeline.examples import Examples

BATCH = 64
EOS = "</s>"


class Rows:
    """Embeddings of texts, by index."""

    def __init__(self, folder: Path):
        self.values = np.load(folder / "values.npy", mmap_mode="r")  # float16 [tokens, D]
        self.starts = np.load(folder / "starts.npy")  # int64 [n + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """float16 [length, D], the EOS among them."""
        return self.values[self.starts[index] : self.starts[index + 1]]

    def gather(self, indices: Sequence[int], width: int) -> tuple[np.ndarray, np.ndarray]:
        """(float16 [b, width, D] with zeros behind a row's length, lengths int32 [b])."""
        found = [self[int(i)] for i in indices]
        out = np.zeros((len(found), width, self.values.shape[1]), np.float16)
        for row, value in zip(out, found):
            row[: len(value)] = value
        return out, np.array([len(value) for value in found], np.int32)


class Captions:
    """The embeddings of a data set's captions, by their text."""

    def __init__(self, rows: Rows, texts: Sequence[str], width: int):
        self.rows, self.width = rows, width
        self.index = {text: i for i, text in enumerate(texts)}

    def batch(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """gen_text float16 [b, width, D] and gen_text_length int32 [b]."""
        found, lengths = self.rows.gather([self.index[text] for text in texts], self.width)
        return {"gen_text": found, "gen_text_length": lengths}


class Encoder:
    """A published encoder with its tokenizer."""

    def __init__(self, folder: Path):
        from models import t5

        file = folder / "tokenizer.json"
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file}: {error}") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True  # a mark in a text is text
        self.eos = self.tokenizer.token_to_id(EOS)
        if self.eos is None:
            raise ValueError(f"{file} has no {EOS!r}")
        self.params, self.cfg = t5.load(folder)
        self.run = jax.jit(lambda params, *x: t5.encode(params, self.cfg, *x))

    def tokens(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        """Ids of each text with EOS, which stays where a text is cut to `limit`."""
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[*e.ids[: limit - 1], self.eos] for e in encoded]

    def write(self, texts: Sequence[str], limit: int, out: Path) -> None:
        """values.npy and starts.npy of the texts in a new folder."""
        ids = self.tokens(texts, limit)
        lengths = np.array([len(row) for row in ids], np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        out.mkdir()
        values = np.lib.format.open_memmap(
            out / "values.npy", "w+", np.float16, (int(starts[-1]), self.cfg.width)
        )
        order = np.argsort(lengths, kind="stable")  # rows of a batch are about as long
        for begin in range(0, len(order), BATCH):
            rows = order[begin : begin + BATCH]
            for row, value in zip(rows, self._embed([ids[i] for i in rows], limit)):
                values[starts[row] : starts[row + 1]] = value
        values.flush()
        np.save(out / "starts.npy", starts)

    def _embed(self, ids: Sequence[Sequence[int]], limit: int) -> list[np.ndarray]:
        """Embeddings [length, D] of up to BATCH rows; few shapes, so few compilations."""
        longest = max(map(len, ids))
        width = min(max(16, 1 << (longest - 1).bit_length()), limit)
        tokens, lengths = np.zeros((BATCH, width), np.int32), np.ones(BATCH, np.int32)
        for row, found in enumerate(ids):
            tokens[row, : len(found)], lengths[row] = found, len(found)
        out = np.asarray(self.run(self.params, tokens, lengths), np.float16)
        if not np.isfinite(out).all():
            raise ValueError("an embedding is not finite in float16")
        return [out[row, : len(found)] for row, found in enumerate(ids)]


@functools.lru_cache(maxsize=1)
def _encoder(folder: Path) -> Encoder:
    return Encoder(folder)


def prompts(config, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(float16 [n, width, D] with zeros behind a row's length, lengths int32 [n]) of new texts, in
    the shape of a batch's captions."""
    from models import t5

    limit = min(config.data.prompt_length, t5.MAX_TOKENS)
    encoder = _encoder(latents.weights_path(config.data, "text_embeddings"))
    ids = encoder.tokens(texts, limit)
    out = np.zeros((len(ids), limit, encoder.cfg.width), np.float16)
    for begin in range(0, len(ids), BATCH):
        for row, value in enumerate(encoder._embed(ids[begin : begin + BATCH], limit), begin):
            out[row, : len(value)] = value
    return out, np.array([len(row) for row in ids], np.int32)


def captions(config, found: Examples) -> Captions:
    """Embeddings of every caption of `found` in config.data.langs, from the cache beside the data
    sets; up to config.data.prompt_length tokens each, at most the 512 that T5 was trained on."""
    from models import t5

    data = config.data
    folder = latents.weights_path(data, "text_embeddings")
    limit = min(data.prompt_length, t5.MAX_TOKENS)
    texts = sorted({e.captions[k] for e in found.items for k in data.langs if k in e.captions})

    def make(out: Path) -> None:
        logging.info("embedding %d captions with %s", len(texts), folder)
        try:
            Encoder(folder).write(texts, limit, out)
        except (ValueError, FileNotFoundError) as error:
            kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
            raise kind(f"config.data.text_embeddings={str(folder)!r}: {error}") from None

    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
    key = f"text_embeddings/{latents.weights_digest(folder)}-{digest}-{limit}"
    return Captions(Rows(store.prepare_once(data, key, make)), texts, limit)
