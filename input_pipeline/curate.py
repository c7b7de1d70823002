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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from absl import logging
from PIL import Image

from input_pipeline import folder, openmoji, records, sources, store, transforms
from input_pipeline.duplicates import Fingerprint, NearDuplicates, fingerprint
from input_pipeline.records import Example

CHUNK = 256  # pictures opened ahead


class Looked(NamedTuple):
    """What reading a picture told; `reason` is set when it cannot be kept."""

    example: Example  # with encoded bytes and a split in its spec
    reason: str = ""
    pixels: bytes = b""  # SHA-256 of the decoded picture
    print: Fingerprint | None = None  # for near duplicates


def candidates(data) -> Iterator[tuple[str, Example]]:
    """(file or "", example) of everything config.data.source names, pictures not opened."""
    for name in sources.names(data):
        match name:
            case "folder":
                for e in folder.scan(folder.root(data)):
                    spec = {"split": e.split}
                    yield e.file, Example(e.file, b"", e.captions, e.questions, spec=spec)
            case "openmoji":
                path = openmoji.prepare(data, data.image_size)
                skipped = records.Skipped(data.max_unreadable)
                for split in store.SPLITS:
                    for _, e in records.open_source(path, split).readable(skipped):
                        yield "", e
            case _:
                raise ValueError(
                    f"config.data.source={data.source!r}: curate reads folder, openmoji"
                )


def _fitting(captions, options) -> dict[str, str]:
    low, high = options.min_chars, options.max_chars
    return {k: v for k, v in captions.items() if low <= len(v) <= high}


def look(data, file: str, example: Example) -> Looked:
    """Opens one picture and says whether it can be kept for its own sake."""
    options = data.curate
    try:
        encoded = (folder.root(data) / file).read_bytes() if file else example.image
        with Image.open(io.BytesIO(encoded)) as opened:
            image = transforms.on_white(opened)
    except (OSError, ValueError, SyntaxError) as error:
        logging.warning("unreadable: %s (%s)", example.id, error)
        return Looked(example, "unreadable")
    if min(image.size) < options.min_size:
        return Looked(example, "too small")
    if max(image.size) > options.max_aspect * min(image.size):
        return Looked(example, "too oblong")
    captions = _fitting(example.captions, options)
    if not captions:
        return Looked(example, "no fitting caption")
    pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
    if options.size and min(image.size) > options.size:
        encoded = records.encode_png(transforms.centre_crop(image, options.size))
    fields = {**vars(example), "captions": captions, "image": encoded}
    return Looked(Example(**fields), "", pixels, fingerprint(image))


def looked_at(data) -> Iterator[Looked]:
    """Every candidate in order, opened by as many threads as there are cores."""
    waiting = candidates(data)
    with ThreadPoolExecutor() as pool:
        while chunk := list(itertools.islice(waiting, CHUNK)):
            yield from pool.map(lambda pair: look(data, *pair), chunk)


def decide(data) -> Iterator[tuple[Looked, str, str]]:
    """(looked, reason or "", id of what it duplicates or "") of every candidate."""
    exact: dict[bytes, str] = {}
    near = NearDuplicates(data.curate.near, data.curate.near_levels)
    for looked in looked_at(data):
        name, reason, of = looked.example.id, looked.reason, ""
        if not reason and looked.pixels in exact:
            reason, of = "exact duplicate", exact[looked.pixels]
        elif not reason and (found := near.find(looked.print)) is not None:
            reason, of = "near duplicate", found
        if not reason:
            exact[looked.pixels] = name
            near.add(looked.print, name)
        yield looked, reason, of


class Curated(records.ImageTextBuilder):
    """Pictures and captions that passed curation."""

    name = "curated"

    def __init__(self, *, data, report: Path, **kwargs):
        self._data, self._report = data, report
        self.counts: Counter[str] = Counter()
        super().__init__(**kwargs)

    def examples(self, split: str) -> Iterator[Example]:
        """Decides once, on the first split; later splits read what was put aside."""
        if split == store.SPLITS[0]:
            self._rest: dict[str, list[Example]] = {s: [] for s in store.SPLITS}
            yield from self._first(split)
        else:
            yield from self._rest[split]

    def _first(self, split: str) -> Iterator[Example]:
        with open(self._report, "w", encoding="utf-8") as report:
            for looked, reason, of in decide(self._data):
                example = looked.example
                self.counts[reason or "kept"] += 1
                row = {"id": example.id, "kept": not reason}
                row |= {k: v for k, v in (("reason", reason), ("of", of)) if v}
                report.write(json.dumps(row, ensure_ascii=False) + "\n")
                if reason:
                    continue
                if example.spec["split"] == split:
                    yield example
                else:  # a tenth of the pictures: small enough to keep
                    self._rest[example.spec["split"]].append(example)


def run(config, workdir) -> dict[str, int]:
    """Curates config.data into workdir/dataset and returns the counts by reason."""
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    final, scratch = workdir / "dataset", workdir / ".dataset.part"
    report = workdir / "curation.jsonl"
    for left in (scratch, scratch.with_suffix(".tfds")):
        shutil.rmtree(left, ignore_errors=True)
    builders: list[Curated] = []

    def builder(**options):
        builders.append(Curated(data=config.data, report=report, **options))
        return builders[0]

    records.write(scratch, builder)
    counts = dict(builders[0].counts)
    if not counts.get("kept"):
        raise ValueError(f"curation kept none of {sum(counts.values())} pictures: {counts}")
    shutil.rmtree(final, ignore_errors=True)
    scratch.rename(final)
    (workdir / "curation.json").write_text(json.dumps(counts, indent=1, sort_keys=True) + "\n")
    logging.info("curated %s: %s", final, counts)
    print(f"{final}: {counts}")
    return counts
