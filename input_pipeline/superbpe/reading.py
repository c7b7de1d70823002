"""Texts for tokenizers, one document at a time: files, folders, stored sets, what is installed.

An input is a name (gcide, stdlib, docs, captions, catalogues) or a path, optionally after
"DOMAIN=": .txt and any other text file, .jsonl with a "text" key, each also .gz, .array_record,
a folder of a TFDS set, a folder of all these. Nothing is held but one document; a `Sample` keeps a
bounded, reproducible part of a stream of any length.
"""

import functools
import gettext
import gzip
import hashlib
import heapq
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from absl import logging

from input_pipeline import documents, openmoji
from input_pipeline.records import Skipped

TEXTS = frozenset({".txt", ".md", ".rst", ".jsonl", ".gz", ".array_record", ".arrayrecord"})
BLOCK = 1 << 16  # characters after which a document without a blank line ends at a newline
LOCALES = (Path("/usr/share/locale"), Path(sys.prefix))  # where gettext catalogues lie


class Document(NamedTuple):
    """One text; held_out: never trained on, for bytes per token."""

    domain: str
    text: str
    held_out: bool


def stream(data) -> Iterator[Document]:
    """Every document of config.data.superbpe.inputs."""
    options = data.superbpe
    skipped = Skipped(data.max_unreadable)
    for item in options.inputs or ((data.path,) if data.text == "folder" else (data.text,)):
        domain, _, where = item.rpartition("=")
        if where in documents.READERS and where != "folder" or where == "catalogues":
            yield from _installed(where, domain, data, skipped)
            continue
        for path in _files(where):
            for text in map(_encodable, read_file(path, skipped)):
                yield Document(domain or path.stem, text, _share(text) < options.held_out)


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


def input_files(data) -> list[Path]:
    """The files behind config.data.superbpe.inputs, for readers on other machines."""
    items = data.superbpe.inputs or (data.path,)
    return [path for item in items for path in _files(item.rpartition("=")[2])]


def stamp(data) -> list[tuple]:
    """What must not change for counts to be used again: names, and sizes and times of files."""
    options = data.superbpe
    found: list[tuple] = [(options.inputs, data.text, data.path, options.held_out)]
    for item in options.inputs or (data.path,):
        where = item.rpartition("=")[2]
        if where and where not in documents.READERS and where != "catalogues":
            found += [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in _files(where)]
    return found


def _files(where: str) -> list[Path]:
    """A file, a TFDS folder, or all texts below a folder."""
    root = Path(where).expanduser()
    if root.is_file() or (root / "dataset_info.json").is_file():
        return [root]
    found = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix.lower() in TEXTS)
    if not where or not found:
        known = ", ".join([*(k for k in documents.READERS if k != "folder"), "catalogues"])
        raise FileNotFoundError(
            f"config.data.superbpe.inputs={where!r} is no text file and no folder with any "
            f"({', '.join(sorted(TEXTS))}); known by name: {known}"
        )
    return found


def read_file(path: Path, skipped: Skipped) -> Iterator[str]:
    """The documents of one file or stored set, read as a stream."""
    name = path.name.removesuffix(".gz").lower()
    try:
        if path.is_dir():
            yield from _tfds(path)
        elif name.endswith((".array_record", ".arrayrecord")):
            yield from _array_record(path)
        else:
            opened = gzip.open if path.suffix.lower() == ".gz" else open
            with opened(path, "rt", encoding="utf-8", newline="\n") as file:
                yield from _rows(file, path, skipped) if name.endswith(".jsonl") else _blocks(file)
    except (OSError, UnicodeDecodeError, EOFError) as error:
        skipped.add(str(path), error)


def _rows(file: Iterable[str], path: Path, skipped: Skipped) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                skipped.add(f"{path}:{number}", error)


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
    if text.lstrip()[:1] == "{":
        try:
            return json.loads(text)["text"]
        except (ValueError, KeyError, TypeError):
            pass
    return text


def _array_record(path: Path) -> Iterator[str]:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    try:
        for index in range(reader.num_records()):
            yield _text_of(reader.read([index])[0])
    finally:
        reader.close()


def _tfds(path: Path) -> Iterator[str]:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(path))
    for split in builder.info.splits:
        source = builder.as_data_source(split=split)
        for index in range(len(source)):
            yield source[index]["text"].decode()


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
