"""The record that every image-text set is stored as: written by TFDS, read without TensorFlow.

One record is a picture with captions by language, questions with answers, a category, a group
(pictures that are equal share it) and `spec`, what a scene is made of.
"""

import contextlib
import functools
import io
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from input_pipeline import store

tfds.disable_progress_bar()
UNREADABLE = "unreadable.json"


class Question(NamedTuple):
    """A question about a picture; kind is count, colour, position, presence or free."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Example:
    """One picture with its texts; `image` is uint8 [h, w, 3] or already encoded bytes."""

    id: str
    image: Any
    captions: Mapping[str, str]
    questions: Sequence[Question] = ()
    category: str = ""
    group: int = -1
    spec: Mapping[str, Any] = field(default_factory=dict)


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of uint8 [h, w, 3]; level 1, because preparation time matters more than disk."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _features() -> tfds.features.FeaturesDict:
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "id": text(),
            "category": text(),
            "group": tfds.features.Scalar(np.int64),
            "texts": text(),  # JSON: nested features take five times as long to read
        }
    )


def _to_record(example: Example) -> dict[str, Any]:
    image = example.image
    encoded = image if isinstance(image, bytes) else encode_png(image)
    return {
        "image": io.BytesIO(encoded),  # TFDS would need TensorFlow to encode an array
        "id": example.id,
        "category": example.category,
        "group": example.group,
        "texts": json.dumps([example.captions, example.questions, example.spec]),
    }


class ImageTextBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of one set; a subclass per source gives `examples(split)` in stored order."""

    # Stored sets are found by it: a subclass raises its own when what it stores changes.
    VERSION = tfds.core.Version("1.0.0")

    def examples(self, split: str) -> Iterator[Example]:
        """Yields the examples of one split."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=_features(), disable_shuffling=True, description=type(self).__doc__
        )

    def _split_generators(self, dl_manager) -> dict[str, Any]:
        splits = {}
        for split in store.SPLITS:
            found = self.examples(split)
            if (first := next(found, None)) is not None:  # TFDS cannot write an empty split
                splits[split] = self._generate_examples(itertools.chain([first], found))
        if not splits:
            raise ValueError(f"{self.name}: there is no example to store")
        return splits

    def _generate_examples(self, found: Iterator[Example]) -> Iterator[tuple[int, dict]]:
        for index, example in enumerate(found):
            yield index, _to_record(example)


def write(path: Path, builder: Callable[..., ImageTextBuilder], **options) -> None:
    """Prepares `builder(**options)` as an ArrayRecord set whose files lie directly in `path`."""
    scratch = path.with_suffix(".tfds")
    built = builder(data_dir=str(scratch), file_format="array_record", **options)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself on stdout
        built.download_and_prepare()
    shutil.move(str(built.data_path), path)
    shutil.rmtree(scratch, ignore_errors=True)


class Unreadable(ValueError):
    """More records or files could not be read than the config allows."""


class Skipped:
    """Counts what could not be read and raises past the limit."""

    def __init__(self, limit: int, counts: dict[str, int] | None = None):
        self.limit = limit
        self.counts = {} if counts is None else counts
        self.names: list[str] = []

    def add(self, name: str, error: BaseException) -> None:
        """Notes one unreadable thing by name."""
        self.names.append(name)
        self.counts["unreadable"] = self.counts.get("unreadable", 0) + 1
        logging.warning("skipped unreadable %s: %s", name, error)
        if len(self.names) > self.limit:
            raise Unreadable(
                f"config.data.max_unreadable={self.limit} is passed: {len(self.names)} are "
                f"unreadable, the first is {self.names[0]}"
            )


def note_skipped(path: Path, skipped: Skipped) -> None:
    """Keeps the names of the files that preparation skipped beside the set."""
    (path / UNREADABLE).write_text(json.dumps(skipped.names))


def noted_skips(path: Path) -> dict[str, int]:
    """{"unreadable": n} of the files that preparation skipped, {} for none."""
    noted = path / UNREADABLE
    names = json.loads(noted.read_text()) if noted.is_file() else []
    return {"unreadable": len(names)} if names else {}


class Source:
    """One split of a stored set, by index, without decoding: a grain random-access source."""

    def __init__(self, path: Path, split: str):
        self._builder = tfds.builder_from_directory(str(path))
        self._name = f"{path.name}/{split}"
        skip = {"image": tfds.decode.SkipDecoding()}
        empty = split not in self._builder.info.splits
        self._data = () if empty else self._builder.as_data_source(split=split, decoders=skip)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        record = self._data[index]
        if record["texts"] is None:  # a file that was cut short reads as empty records
            raise ValueError("the record is empty")
        captions, questions, spec = json.loads(record["texts"])
        return Example(
            id=record["id"].decode(),
            image=record["image"],
            captions=captions,
            questions=tuple(Question(*q) for q in questions),
            category=record["category"].decode(),
            group=int(record["group"]),
            spec=spec,
        )

    def readable(
        self, skipped: Skipped, rows: Iterable[int] | None = None
    ) -> Iterator[tuple[int, Example]]:
        """Yields (index, example) of every record, or of those of `rows`, that can be read."""
        for index in range(len(self)) if rows is None else rows:
            try:
                yield index, self[index]
            except (RuntimeError, ValueError, OSError) as error:
                skipped.add(f"record {index} of {self._name}", error)

    def __repr__(self) -> str:
        return f"Source({self._name})"


@functools.cache
def open_source(path: Path, split: str) -> Source:
    """Source of a stored set, opened once per process."""
    return Source(path, split)
