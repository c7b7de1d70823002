"""Data set "image_text": the flagship's mixed batches, generation and understanding rows apart.

Generation rows: gen_tokens int32 [Bg, P], gen_length int32 [Bg] and gen_image uint8 [Bg, H, W, 3]
or gen_moments float32 [Bg, h, w, 2z]; with config.data.text_embeddings also gen_text float16
[Bg, P, D] and gen_text_length int32 [Bg], the caption as an encoder sees it. Understanding rows:
und_image uint8 [Bu, S, S, 3], und_tokens int32 [Bu, T], und_prefix and und_length int32 [Bu];
caption rows come before question rows. With config.data.edit the prompt is an instruction, and
gen_source_image uint8 [Bg, S, S, 3] (and gen_source_moments beside gen_moments) is the picture to
change.

With config.data.shapes (pictures of an own folder, each in the nearest (h, w)) a batch's pictures
to generate have one shape; shapes take turns, each as often as it has pictures.

With config.data.questions > 1 a row holds as many questions with their answers about its picture
as fit, at most that many: captions in several languages, or a scene's questions and its caption.
und_segments and und_prefix are then int32 [Bu, T] (input_pipeline/layout.py), without und_length.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from input_pipeline import (
    Pipeline,
    batching,
    edits,
    latents,
    layout,
    openmoji,
    sources,
    store,
    text_embeddings,
    tokenizers,
)
from input_pipeline.examples import Examples
from input_pipeline.layout import encode_answered, encode_prompt, encode_question

__all__ = ["build", "encode_answered", "encode_prompt", "encode_question", "rows"]


class Rows(NamedTuple):
    """How many rows of the global batch each task has."""

    t2i: int
    caption: int
    vqa: int


def rows(config) -> Rows:
    """config.batch_size split by config.data.mix: generation rounded first, then captions."""
    mix = config.data.mix
    weights = (mix.t2i, mix.caption, mix.vqa)
    if min(weights) < 0 or not sum(weights):
        raise ValueError(f"config.data.mix={weights}: weights are >= 0 and not all 0")
    t2i = round(config.batch_size * mix.t2i / sum(weights))
    und = config.batch_size - t2i
    caption = round(und * mix.caption / (mix.caption + mix.vqa)) if und else 0
    return Rows(t2i, caption, und - caption)


class _Texts:
    """Token rows by text, each encoded once; counts the texts that had to be cut."""

    def __init__(self, tokenizer, data, counts: dict[str, int]):
        self._tokenizer, self._data, self.counts = tokenizer, data, counts
        self._prompts: dict[str, layout.Prompt] = {}
        self._answered: dict[tuple[str, str], layout.Answered] = {}

    def _count(self, row) -> None:
        if row.truncated:
            self.counts["truncated"] = self.counts.get("truncated", 0) + 1

    def prompt(self, caption: str) -> layout.Prompt:
        if (row := self._prompts.get(caption)) is None:
            row = encode_prompt(self._tokenizer, caption, self._data.prompt_length)
            self._prompts[caption] = row
            self._count(row)
        return row

    def answered(self, question: str, answer: str) -> layout.Answered:
        if (row := self._answered.get((question, answer))) is None:
            row = encode_answered(self._tokenizer, question, answer, self._data.text_length)
            self._answered[question, answer] = row
            self._count(row)
        return row

    def packed(self, asked: list[tuple[str, str]], rng: np.random.Generator) -> layout.Packed:
        """Up to data.questions of the (question, answer) pairs, in random order, in one row."""
        chosen = [asked[i] for i in rng.permutation(len(asked))[: self._data.questions]]
        rows = [self.answered(*pair) for pair in chosen]
        return layout.pack(rows, self._data.text_length, self._tokenizer.pad)


def _pick(choices, u: float):
    return choices[int(u * len(choices))]


def _pick_caption(pairs, u: float, data) -> tuple[str, str]:
    """One of the (lang, caption) pairs: langs[0] with probability first_lang, else any."""
    if u < data.first_lang and pairs[0][0] == data.langs[0]:
        return pairs[0]
    first = data.first_lang
    return _pick(pairs, u / first if u < first else (u - first) / (1.0 - first))


def _stack(found, *names: str) -> list[np.ndarray]:
    return [np.array([getattr(row, n) for row in found], np.int32) for n in names]


class _Captioned:
    """The pictures of `found` with a caption in data.langs, to be chosen one by one.

    With data.families the variants of an OpenMoji drawing by skin tone are one choice: there are
    6 or 26 of each person, and without it they are half of all pictures.
    """

    def __init__(self, found: Examples, data):
        self.pairs = [
            [(k, e.captions[k]) for k in data.langs if k in e.captions] for e in found.items
        ]
        families: dict = {}
        for row, item in enumerate(found.items):
            if self.pairs[row]:
                joined = data.families and item.group >= 0
                key = openmoji.base_glyph(openmoji.characters(item.id)) if joined else row
                families.setdefault(key, []).append(row)
        self._choices = list(families.values())

    def __len__(self) -> int:
        return len(self._choices)

    def rows(self, chosen: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rows of `found`, what is left of the uniform numbers `u`) of these choices."""
        among = np.array([len(self._choices[i]) for i in chosen])
        member, rest = np.divmod(u * among, 1.0)
        rows = [self._choices[i][int(m)] for i, m in zip(chosen, member)]
        return np.array(rows, np.int64), rest


def _need(count: int, batch: int, key: str, what: str, data, split: str) -> None:
    if batch and not count:
        raise ValueError(
            f"config.data.mix.{key}={data.mix[key]} but source {data.source!r} has no {what} in "
            f"split {split!r}; set it to 0 or add a source"
        )


def _generation(config, split: str, texts: _Texts, shape=None) -> tuple[int, Callable]:
    """(count, make(indices, u)) of plain text-to-image rows; shape: (h, w), one of data.shapes."""
    data = config.data
    found = sources.load(data, split, shape or data.image_size, data.captioned)
    texts.counts.update(found.counts)
    captioned = _Captioned(found, data)
    moments = latents.moments(config, found, split) if data.latents else None
    embedded = text_embeddings.captions(config, found) if data.text_embeddings else None

    def make(chosen: np.ndarray, u: np.ndarray) -> dict[str, np.ndarray]:
        rows, u = captioned.rows(chosen, u)
        pairs = [_pick_caption(captioned.pairs[i], x, data) for i, x in zip(rows, u)]
        got = [texts.prompt(caption) for _, caption in pairs]
        tokens, length = _stack(got, "tokens", "length")
        out = {"gen_tokens": tokens, "gen_length": length}
        out |= embedded.batch([caption for _, caption in pairs]) if embedded else {}
        if moments is None:
            return out | {"gen_image": found.pictures.gather(rows)}
        return out | {"gen_moments": moments[rows]}

    return len(captioned), make


def _shaped(config, split: str, texts: _Texts) -> list[tuple[int, Callable]]:
    """`_generation` of every shape of config.data.shapes that has pictures."""
    data = config.data
    if data.latents or data.edit:
        raise ValueError("config.data.shapes: not with latents or edit")
    each = [_generation(config, split, texts, tuple(shape)) for shape in data.shapes]
    return [(count, make) for count, make in each if count] or each[:1]


def _understanding(data, split: str, texts: _Texts, counts: dict[str, int]):
    """(captions, questions, make(caption indices, question indices, u)) of understanding rows."""
    size = data.und_size or data.image_size
    found = sources.load(data, split, size)
    counts.update(found.counts)
    named = sources.load(data, split, size, data.captioned) if data.captioned else found
    captioned = _Captioned(named, data)
    pairs = captioned.pairs
    asked = np.array([i for i, e in enumerate(found.items) if e.questions], np.int64)

    def one_each(captions: np.ndarray, questions: np.ndarray, u: np.ndarray):
        got = []
        for i, x in zip(captions, u):
            lang, caption = _pick_caption(pairs[i], x, data)
            got.append(texts.answered(layout.caption_question(lang), caption))
        for i, x in zip(questions, u[len(captions) :]):
            chosen = _pick(found.items[asked[i]].questions, x)
            got.append(texts.answered(chosen.question, chosen.answer))
        return zip(("tokens", "prefix", "length"), _stack(got, "tokens", "prefix", "length"))

    def several(captions: np.ndarray, questions: np.ndarray, u: np.ndarray):
        got = []
        for i, x in zip(captions, u):
            rng = np.random.default_rng(int(x * 2**53))
            known = [(layout.caption_question(lang), text) for lang, text in pairs[i]]
            if rng.random() < data.first_lang and pairs[i][0][0] == data.langs[0]:
                known = known[:1] + [known[1:][k] for k in rng.permutation(len(known) - 1)]
                known = known[: data.questions]
            got.append(texts.packed(known, rng))
        for i, x in zip(questions, u[len(captions) :]):
            item = found.items[asked[i]]
            known = [(q.question, q.answer) for q in item.questions]
            known += [(layout.caption_question(lang), c) for lang, c in item.captions.items()]
            got.append(texts.packed(known, np.random.default_rng(int(x * 2**53))))
        return zip(("tokens", "prefix", "segments"), _stack(got, "tokens", "prefix", "segments"))

    def make(captions: np.ndarray, questions: np.ndarray, u: np.ndarray) -> dict[str, np.ndarray]:
        captions, rest = captioned.rows(captions, u[: len(captions)])
        u = np.concatenate([rest, u[len(captions) :]])
        text = (several if data.questions > 1 else one_each)(captions, questions, u)
        wanted = ((named, captions), (found, asked[questions]))
        images = np.concatenate([s.pictures.gather(i) for s, i in wanted if len(i)])
        return {"und_image": images} | {f"und_{name}": array for name, array in text}

    return len(captioned), len(asked), make


def build(config, *, split: str, seed: int, process_index: int, process_count: int) -> Pipeline:
    """Endless mixed batches of one split; the same global batch at any number of processes."""
    store.check_split(split)
    data, sizes = config.data, rows(config)
    counts: dict[str, int] = {}
    tokenizer = tokenizers.load(data)
    texts = _Texts(tokenizer, data, counts)
    if data.shapes:
        generators = _shaped(config, split, texts)
    else:
        generators = [(edits.generation if data.edit else _generation)(config, split, texts)]
    pictures = sum(count for count, _ in generators)
    captions = questions = 0
    und_rows = sizes.caption + sizes.vqa
    if und_rows:
        captions, questions, make_und = _understanding(data, split, texts, counts)
    _need(pictures, sizes.t2i, "t2i", "captioned picture", data, split)
    _need(captions, sizes.caption, "caption", "captioned picture", data, split)
    _need(questions, sizes.vqa, "vqa", "question", data, split)
    gen = batching.share(sizes.t2i, process_index, process_count, "config.data.mix.t2i")
    und = batching.share(und_rows, process_index, process_count, "config.data.mix")

    def make(got: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        u_gen, u_und = rng.random(sizes.t2i), rng.random(und_rows)
        out = {}
        if sizes.t2i:
            bucket, chosen = got["t2i"]
            out = generators[bucket][1](chosen[gen], u_gen[gen])
        if und_rows:
            none = np.zeros(0, np.int64)
            cut = sizes.caption  # question rows follow caption rows in the global batch
            captions_here = got.get("caption", none)[und.start : min(und.stop, cut)]
            vqa_here = got.get("vqa", none)[max(und.start - cut, 0) : max(und.stop - cut, 0)]
            out |= make_und(captions_here, vqa_here, u_und[und])
        return out

    available = {"t2i": pictures, "caption": captions, "vqa": questions}
    parts = {
        name: batching.index_batches(available[name], size, seed + i)
        for i, (name, size) in enumerate(sizes._asdict().items())
        if size
    }
    if sizes.t2i:  # one shape a batch, all pictures once in a round
        each = [batching.index_batches(n, sizes.t2i, seed) for n, _ in generators]
        shares = [-(-n // sizes.t2i) for n, _ in generators]
        parts["t2i"] = batching.Bucketed(each, shares, seed)
    dataset = batching.assemble(parts, make, seed=seed, prefetch=data.prefetch)
    return Pipeline(dataset, tokenizer, tokenizer.vocab_size, counts=counts, on_close=dataset.close)
