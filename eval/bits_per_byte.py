"""Bits per byte of held-out text, beside what xz makes of the same bytes.

The model reads each packed window by itself, so the first token of a window is only read. Bytes are
those of the tokens that are predicted; ends of documents cost bits and have no bytes. xz (LZMA,
preset 9e) compresses the same text by itself, and once after 2 MiB of training text that it does
not pay for.
"""

import functools
import lzma

import jax.numpy as jnp
import numpy as np

from eval import common
from input_pipeline import text

AFTER = 2**21  # bytes of training text that xz has seen


def byte_lengths(tokenizer) -> np.ndarray:
    """Bytes of every id of a byte-level tokenizer; 0 for special tokens."""
    inner, lengths = tokenizer.inner, np.zeros(tokenizer.vocab_size, np.int64)
    special = {i for i, t in inner.get_added_tokens_decoder().items() if t.special}
    for spelling, index in inner.get_vocab(with_added_tokens=True).items():
        # Byte-level spellings have one character for each byte.
        lengths[index] = 0 if index in special else len(spelling)
    return lengths


@functools.lru_cache(maxsize=4)  # a run evaluates the same texts again
def xz_bits(data: bytes, before: bytes = b"") -> int:
    """Bits that xz needs for `data` once it has `before`."""
    size = lambda x: len(lzma.compress(x, preset=9 | lzma.PRESET_EXTREME)) if x else 0  # noqa: E731
    return 8 * (size(before + data) - size(before))


def written(windows, tokenizer, rows: int) -> bytes:
    """The text of the first windows, documents one after the other."""
    texts = (tokenizer.decode(row) for row in windows.tokens[:rows].tolist())
    return "\n".join(texts).encode()


def build(config):
    """Evaluator "bits_per_byte" over the first config.evaluation.windows held-out windows."""
    options = config.evaluation

    def evaluate(model, params, *, step, rng, workdir):
        windows, tokenizer, _ = text.windows(config.data, options.held_out)
        rows = min(options.windows, len(windows.tokens))
        nll = common.need(model, "text_nll")

        def sums(index):
            batch = {k: np.asarray(v[index]) for k, v in windows._asdict().items()}
            found = nll(params, batch)
            return jnp.stack([found["nll"], found["correct"], found["count"]], axis=1)

        total = common.in_batches(sums, rows, options.batch, lambda index: index).sum(0)
        tokens, segments = (np.asarray(x[:rows]) for x in windows[:2])
        target = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        lengths = byte_lengths(tokenizer)
        size = lengths[tokens[:, 1:]][target].sum()
        # Trained tokenizers put a space before every text: it is not the document's.
        space = lengths[tokenizer.encode("a")].sum() - 1
        size -= space * ((tokens[:, :-1] == tokenizer.bos) & target).sum()
        found = written(windows, tokenizer, rows)
        training, _, _ = text.windows(config.data, "train")
        most = AFTER // max(1, len(found) // rows)
        before = written(training, tokenizer, most)[:AFTER]
        bits = float(total[0]) / np.log(2)
        return {
            "bits_per_byte": bits / size,
            "bits_per_byte_xz": xz_bits(found) / len(found),
            "bits_per_byte_xz_trained": xz_bits(found, before) / len(found),
            "loss": float(total[0] / total[2]),
            "accuracy": float(total[1] / total[2]),
            "bytes_per_token": float(size / total[2]),
            "windows": float(rows),
        }

    return evaluate
