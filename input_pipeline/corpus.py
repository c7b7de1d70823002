"""The texts that a tokenizer is trained on, from the sources the config names."""

import functools
from collections import defaultdict

from input_pipeline import folder, openmoji, scenes, sources

ENGLISH = 8  # scenes, questions and answers are English: about that much more of it is read


def tokenizer_texts(data) -> tuple[str, ...]:
    """Texts of all sources of the config, in a fixed order.

    OpenMoji gives its names in all 14 languages whatever config.data.langs and categories are:
    a checkpoint trained on a part can go on with another part.
    """
    if data.name == "text" and data.text != "captions":
        from input_pipeline import text

        return text.documents(data, "train")
    return tuple(t for texts in by_language(data).values() for t in texts)


def by_language(data) -> dict[str, list[str]]:
    """The texts by language; questions, answers and scenes are English."""
    if data.name == "text" and data.text != "captions":
        return {"text": list(tokenizer_texts(data))}
    names = sources.names(data)
    out: dict[str, list[str]] = defaultdict(list)
    if "openmoji" in names or "scenes" in names:
        for lang, texts in _openmoji().items():
            out[lang] += texts * (ENGLISH if lang == "en" else 1)
        out["en"] += scenes.phrases()
    if "folder" in names:
        for example in folder.load(data, "train", data.image_size).items:
            for lang, caption in example.captions.items():
                out[lang].append(caption)
            for q in example.questions:
                out["en"] += [q.question, q.answer]
    return dict(out)


@functools.cache
def _openmoji() -> dict[str, list[str]]:
    out = defaultdict(list)
    toned = 0
    for glyph in openmoji.all_glyphs():
        if not openmoji.TONES.isdisjoint(int(c, 16) for c in glyph.id.split("-")):
            toned += 1
            if toned % 10:  # six twins say the same words; a tenth of them teaches these
                continue
        for lang, name in glyph.names.items():
            out[lang].append(name)
    return dict(out)
