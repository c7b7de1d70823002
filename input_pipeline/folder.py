"""The user's own pictures: a folder of jpg, png or webp files with captions beside them.

Captions come from `captions.jsonl` in the folder (one object per line: file, caption, and if
wanted questions and split) or from a `.txt` beside each picture. A folder that curation wrote is
read as it is.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from input_pipeline import examples, openmoji, records, store, transforms
from input_pipeline.examples import Examples
from input_pipeline.records import Question, Skipped

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
TRANSLATION = re.compile(r"^([a-z]{2})(?:_[A-Z]{2})?\.utf8=(.*)$")  # as in Tux Paint's stamps


class Entry(NamedTuple):
    """A picture file with its texts, before it is opened."""

    file: str  # relative to the folder
    captions: Mapping[str, str]
    questions: tuple[Question, ...]
    split: str


def root(data) -> Path:
    """config.data.path as a folder that exists."""
    path = Path(data.path).expanduser()
    if not data.path or not path.is_dir():
        raise FileNotFoundError(
            f"config.data.path={data.path!r} is not a folder; source='folder' reads pictures there"
        )
    return path


def _captions(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        value = {"en": value}
    return {lang: text.strip() for lang, text in value.items() if text.strip()}


def parse_txt(text: str) -> dict[str, str]:
    """Captions of a `.txt`: English, then possibly lines like `de.utf8=Eine Schnecke`."""
    english, out = [], {}
    for line in text.splitlines():
        if found := TRANSLATION.match(line):
            out.setdefault(found[1], found[2].strip())
        elif line.strip():
            english.append(line.strip())
    return _captions({"en": " ".join(english)} | out)


def _from_jsonl(folder: Path) -> Iterator[Entry]:
    listing = folder / "captions.jsonl"
    for number, line in enumerate(listing.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            questions = tuple(
                Question(q.get("kind", "free"), q["question"], q["answer"])
                for q in row.get("questions", ())
            )
            file = row["file"]
            split = row.get("split") or openmoji.split_of(file)
            entry = Entry(file, _captions(row.get("caption", {})), questions, split)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"config.data.path: line {number} of {listing} is not an object with file and "
                f"caption ({type(error).__name__}: {error})"
            ) from None
        store.check_split(entry.split)
        yield entry


def _from_files(folder: Path) -> Iterator[Entry]:
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES):
        file = path.relative_to(folder).as_posix()
        text = path.with_suffix(".txt")
        captions = {}
        if text.is_file():
            captions = parse_txt(text.read_text("utf-8", errors="replace"))
        yield Entry(file, captions, (), openmoji.split_of(file))


def scan(folder: Path) -> list[Entry]:
    """Every picture of the folder with its texts, none opened yet."""
    found = _from_jsonl if (folder / "captions.jsonl").is_file() else _from_files
    entries = list(found(folder))
    if not entries:
        raise ValueError(
            f"config.data.path={str(folder)!r} holds no picture ({', '.join(sorted(PICTURES))})"
        )
    return entries


class Folder(records.ImageTextBuilder):
    """Pictures and captions of a folder, each cropped to the nearest of some shapes."""

    name = "folder"

    def __init__(self, *, folder: Path, entries: list[Entry], shapes, skipped: Skipped, **kw):
        self._folder, self._entries, self._shapes, self._skipped = folder, entries, shapes, skipped
        super().__init__(**kw)

    def examples(self, split: str) -> Iterator[records.Example]:
        """Yields the readable pictures of a split."""
        for entry in self._entries:
            if entry.split != split:
                continue
            try:
                encoded = (self._folder / entry.file).read_bytes()
                image = transforms.decode(encoded, *self._shapes)
            except transforms.UNREADABLE as error:
                self._skipped.add(entry.file, error)
                continue
            yield records.Example(entry.file, image, entry.captions, entry.questions)


def _fingerprint(folder: Path, entries: list[Entry]) -> str:
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for entry in entries:
        file = folder / entry.file
        stat = file.stat() if file.exists() else None
        digest.update(repr((entry, stat and (stat.st_size, stat.st_mtime_ns))).encode())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=4)
def _scanned(folder: Path) -> tuple[list[Entry], str]:
    entries = scan(folder)  # once per process: a large folder takes seconds
    return entries, _fingerprint(folder, entries)


def prepare(data, size: transforms.Size) -> Path:
    """Folder of the stored set, of squares or of all config.data.shapes; made again when a file or
    a caption changes."""
    folder = root(data)
    if (folder / "dataset_info.json").is_file():
        return folder
    entries, fingerprint = _scanned(folder)
    square = isinstance(size, int)
    shapes = (size,) if square else tuple(data.shapes)
    named = size if square else hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]

    def make(path: Path) -> None:
        skipped = Skipped(data.max_unreadable)
        records.write(path, Folder, folder=folder, entries=entries, shapes=shapes, skipped=skipped)
        records.note_skipped(path, skipped)

    return store.prepare_once(data, f"folder-{fingerprint}-{named}px", make)


def load(data, split: str, size: transforms.Size) -> Examples:
    """The readable pictures of one split, where `size` is one of config.data.shapes those nearest
    to it; files skipped on preparation stay counted."""
    return examples.load(data, prepare(data, size), split, size)
