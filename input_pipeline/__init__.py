"""Data sets. DATASETS maps a name to a builder that takes the whole config."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Pipeline:
    """One split of one data set, ready to be iterated by the loop.

    dataset:    grain IterDataset of dicts of numpy arrays, this process's share of each global
                batch. Infinite; the iterator state is a few bytes and does not depend on the
                number of processes.
    tokenizer:  encode / decode and the special ids, or None where there is no text.
    vocab_size: of the tokenizer, 0 without one.
    classes:    number of labels a classifier must tell apart, 0 where there are none.
    counts:     what was skipped or cut so far ("unreadable", "truncated").
    """

    dataset: Any
    tokenizer: Any = None
    vocab_size: int = 0
    classes: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    on_close: Callable[[], None] = lambda: None

    def close(self) -> None:
        """Stops the prefetch threads of every iterator that was taken from `dataset`."""
        self.on_close()


def _image_text(config, **kwargs):
    from input_pipeline import image_text

    return image_text.build(config, **kwargs)


def _images(config, **kwargs):
    from input_pipeline import images

    return images.build(config, **kwargs)


def _text(config, **kwargs):
    from input_pipeline import text

    return text.build(config, **kwargs)


def _recall(config, **kwargs):
    from input_pipeline import recall

    return recall.build(config, **kwargs)


# Each builder: (config, *, split, seed, process_index, process_count) -> Pipeline. Builders
# import lazily, so that a run pays only for the data it reads.
DATASETS: dict[str, Callable[..., Pipeline]] = {
    "image_text": _image_text,
    "images": _images,
    "text": _text,
    "recall": _recall,
    "needle": _recall,
}
