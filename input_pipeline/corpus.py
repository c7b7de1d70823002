"""The texts that a tokenizer is trained on, from the sources the config names."""

import functools
import hashlib
from collections import defaultdict

from input_pipeline import documents, folder, openmoji, scenes, sources

ENGLISH = 8  # scenes, questions and answers are English: about that much more of it is read


def _is_text(data) -> bool:
    return data.name == "text" and data.text != "captions"


def _uses_glyphs(data) -> bool:
    return not {"openmoji", "scenes"}.isdisjoint(sources.names(data))


def by_language(data) -> dict[str, list[str]]:
    """Training texts by language; questions, answers and scenes are English.

    OpenMoji gives its names in all 14 languages whatever config.data.langs and categories are:
    a checkpoint trained on a part can go on with another part.
    """
    if _is_text(data):
        return {"text": list(documents.load(data, "train")[0])}
    out: dict[str, list[str]] = defaultdict(list)
    if _uses_glyphs(data):
        for lang, texts in _openmoji().items():
            out[lang] += texts
    if "folder" in sources.names(data):
        for example in folder.load(data, "train", data.image_size).items:
            for lang, caption in example.captions.items():
                out[lang].append(caption)
            for q in example.questions:
                out["en"] += [q.question, q.answer]
    return dict(out)


def texts(data) -> tuple[str, ...]:
    """All training texts in a fixed order."""
    return tuple(t for some in by_language(data).values() for t in some)


def fingerprint(data) -> str:
    """Changes whenever `texts` does; cheaper than reading them."""
    if _is_text(data):
        return documents.prepare(data).name
    parts = []
    if _uses_glyphs(data):
        parts.append(_openmoji_digest())
    if "folder" in sources.names(data):
        parts.append(str(folder.prepare(data, data.image_size).resolve()))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


@functools.cache
def _openmoji() -> dict[str, list[str]]:
    out = defaultdict(list)
    toned = 0
    for glyph in openmoji.all_glyphs():
        if openmoji.has_tone(glyph.id):
            toned += 1
            if toned % 10:  # six twins say the same words; a tenth of them teaches these
                continue
        for lang, name in glyph.names.items():
            out[lang] += [name] * (ENGLISH if lang == "en" else 1)
    out["en"] += scenes.phrases()
    return dict(out)


@functools.cache
def _openmoji_digest() -> str:
    joined = "\0".join(t for some in _openmoji().values() for t in some)
    return hashlib.sha256(joined.encode()).hexdigest()
