"""Task "curate": a folder of pictures and captions, made clean and stored as an ArrayRecord set.

Dropped, by the first reason that holds: unreadable, too small or too oblong, no caption of a
fitting length, exact duplicate (same pixels), near duplicate (difference hash, then thumbnails).
Every decision is one line of `curation.jsonl`; `curation.json` holds the counts; `dataset/` is
what config.data.source="folder" reads with config.data.path pointing there.
"""

import hashlib
import io
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from absl import logging
from PIL import Image

from input_pipeline import folder, openmoji, records, sources, store, transforms
from input_pipeline.duplicates import Fingerprint, NearDuplicates, fingerprint
from input_pipeline.records import Example

CHUNK = 256  # pictures opened ahead


class Candidate(NamedTuple):
    """A picture that may be kept: a file of the folder, or bytes that are already at hand."""

    example: Example  # its texts, and its split in `spec`
    file: Path | None

    def read(self) -> bytes:
        """The encoded picture."""
        return self.file.read_bytes() if self.file else self.example.image


class Looked(NamedTuple):
    """What opening a picture told; `reason` is set when it cannot be kept for its own sake."""

    candidate: Candidate
    reason: str = ""
    pixels: bytes = b""  # SHA-256 of the decoded picture
    print: Fingerprint | None = None  # for near duplicates


class Decision(NamedTuple):
    """`reason` is empty for what is kept; `of` is what a duplicate duplicates."""

    candidate: Candidate
    reason: str
    of: str


def candidates(data) -> Iterator[Candidate]:
    """Everything that config.data.source names, in order, not opened."""
    for name in sources.names(data):
        match name:
            case "folder":
                root = folder.root(data)
                for e in folder.scan(root):
                    spec = {"split": e.split}
                    example = Example(e.file, b"", e.captions, e.questions, spec=spec)
                    yield Candidate(example, root / e.file)
            case "openmoji":
                path = openmoji.prepare(data, data.image_size)
                skipped = records.Skipped(data.max_unreadable)
                for split in store.SPLITS:
                    for _, e in records.open_source(path, split).readable(skipped):
                        yield Candidate(e, None)
            case _:
                raise ValueError(
                    f"config.data.source={data.source!r}: curate reads folder, openmoji"
                )


def fitting(captions: Mapping[str, str], options) -> dict[str, str]:
    """The captions of allowed length."""
    low, high = options.min_chars, options.max_chars
    return {k: v for k, v in captions.items() if low <= len(v) <= high}


def look(options, candidate: Candidate) -> Looked:
    """Opens one picture; options is config.data.curate."""
    try:
        with Image.open(io.BytesIO(candidate.read())) as opened:
            image = transforms.on_white(opened)
    except transforms.UNREADABLE as error:
        logging.warning("unreadable: %s (%s)", candidate.example.id, error)
        return Looked(candidate, "unreadable")
    if min(image.size) < options.min_size:
        return Looked(candidate, "too small")
    if max(image.size) > options.max_aspect * min(image.size):
        return Looked(candidate, "too oblong")
    if not fitting(candidate.example.captions, options):
        return Looked(candidate, "no fitting caption")
    pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
    return Looked(candidate, "", pixels, fingerprint(image))


def _looked_at(data) -> Iterator[Looked]:
    waiting = candidates(data)
    with ThreadPoolExecutor() as pool:
        while chunk := list(itertools.islice(waiting, CHUNK)):
            yield from pool.map(lambda c: look(data.curate, c), chunk)


def decide(data) -> Iterator[Decision]:
    """Keep or drop, for every candidate in order."""
    exact: dict[bytes, str] = {}
    near = NearDuplicates(data.curate.near, data.curate.near_levels)
    for candidate, reason, pixels, picture in _looked_at(data):
        of = ""
        if not reason and pixels in exact:
            reason, of = "exact duplicate", exact[pixels]
        elif not reason and (found := near.find(picture)) is not None:
            reason, of = "near duplicate", found
        if not reason:
            exact[pixels] = candidate.example.id
            near.add(picture, candidate.example.id)
        yield Decision(candidate, reason, of)


class Curated(records.ImageTextBuilder):
    """Pictures and captions that passed curation."""

    name = "curated"

    def __init__(self, *, kept: list[Candidate], options, **kwargs):
        self._kept, self._options = kept, options
        super().__init__(**kwargs)

    def examples(self, split: str) -> Iterator[Example]:
        """Yields what is kept of a split, large pictures cropped and shrunk."""
        size = self._options.size
        for candidate in self._kept:
            example = candidate.example
            if example.spec["split"] != split:
                continue
            encoded = candidate.read()
            with Image.open(io.BytesIO(encoded)) as image:
                if size and min(image.size) > size:
                    encoded = records.encode_png(transforms.centre_crop(image, size))
            captions = fitting(example.captions, self._options)
            yield Example(**{**vars(example), "captions": captions, "image": encoded})


def run(config, workdir) -> dict[str, int]:
    """Curates config.data into workdir/dataset and returns the counts by reason."""
    workdir, data = Path(workdir), config.data
    workdir.mkdir(parents=True, exist_ok=True)
    final, scratch = workdir / "dataset", workdir / ".dataset.part"
    for left in (scratch, scratch.with_suffix(".tfds")):
        shutil.rmtree(left, ignore_errors=True)
    kept, counts = [], Counter()
    with open(workdir / "curation.jsonl", "w", encoding="utf-8") as report:
        for candidate, reason, of in decide(data):
            counts[reason or "kept"] += 1
            row = {"id": candidate.example.id, "kept": not reason, "reason": reason, "of": of}
            row = {k: v for k, v in row.items() if v != ""}
            report.write(json.dumps(row, ensure_ascii=False) + "\n")
            if not reason:
                kept.append(candidate)
    if not kept:
        raise ValueError(f"config.data.curate keeps none of {counts.total()} pictures: {counts}")
    records.write(scratch, Curated, kept=kept, options=data.curate)
    shutil.rmtree(final, ignore_errors=True)
    scratch.rename(final)
    (workdir / "curation.json").write_text(json.dumps(counts, indent=1, sort_keys=True) + "\n")
    logging.info("%s: %s", final, dict(counts))
    return dict(counts)
