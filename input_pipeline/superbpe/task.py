"""Task "tokenizer" with config.data.superbpe: texts in, tokenizer.json, report and plots out.

Each step leaves a file in the workdir that begins with what it depends on; the same command again
reads it instead of doing the step again. Inside stage 2 the merges so far are written every few
seconds, and training goes on from them as if it had never stopped.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers
from absl import logging

from input_pipeline.superbpe import counting, reading, report, stage1, stage2, sweep, tokenizer_json
from input_pipeline.superbpe.bpe import Bpe, read_alphabet, read_merges, write_merges
from input_pipeline.superbpe.progress import Bar
from input_pipeline.superbpe.rules import PRESETS, S1, Veto, preset

SIZES = (1000, 2000, 4000, 8000, 16_000, 50_000, 100_000)  # of the vocabulary, for the curve


class Corpus(NamedTuple):
    """What is trained on and what is measured on; `counts` instead of `texts` on disk.

    measured: held-out documents, or some of the training text where none are held out.
    """

    texts: list[tuple[str, str]]
    measured: list[tuple[str, str]]
    measured_on: str
    counts: dict[tuple[str, ...], list[Path]]
    key: str  # changes with the training text


def _atomic(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text, "utf-8")
    os.replace(scratch, path)


def _kept(path: Path, key: str) -> dict | None:
    """What a step left, if it depended on the same."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("key") == key else None


def _hash(*parts) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else repr(part).encode())
        found.update(b"\0")
    return found.hexdigest()[:16]


def corpus(config, workdir: Path) -> Corpus:
    """Reads the inputs once: a sample in memory, or count files on disk, which take a pass each."""
    data, options = config.data, config.data.superbpe
    training, testing = (
        reading.Sample(int(mb * 2**20), config.seed)
        for mb in (options.sample_mb, options.held_out_mb)
    )
    for d in reading.stream(data):
        if d.held_out:
            testing.add(d.domain, d.text)
        elif options.count == "memory":
            training.add(d.domain, d.text)
    held = testing.texts()
    if options.count == "memory":
        texts = training.texts()
        if not texts:
            raise ValueError("config.data.superbpe.inputs hold no text to train on")
        key = _hash(*(part.encode() for row in texts for part in row))
        return Corpus(texts, held or texts, _name(held), {}, key)
    if options.count not in ("disk", "beam"):
        raise ValueError(
            f"config.data.superbpe.count={options.count!r}: allowed are memory, disk, beam"
        )
    found = {}
    for patterns in dict.fromkeys(((S1,), _rules(options).train)):
        out = workdir / "counts" / f"{_hash(patterns, reading.stamp(data))}.tsv"
        if options.count == "beam":
            found[patterns] = _beam(data, patterns, out)
        else:
            if not out.exists():
                counting.count(_told(_training(data)), patterns, out, options.count_memory_mb)
            found[patterns] = [out]
    sizes = [(p.name, p.stat().st_size) for parts in found.values() for p in parts]
    if not held:
        for d in _training(data):
            testing.add(d.domain, d.text)
    return Corpus([], testing.texts(), _name(held), found, _hash(sizes))


def _training(data) -> Iterator[reading.Document]:
    return (d for d in reading.stream(data) if not d.held_out)


def _told(documents: Iterable[reading.Document]) -> Iterator[str]:
    """The texts, telling how much was read."""
    bar, read = Bar("counting", "characters"), 0
    for d in documents:
        yield d.text
        read += len(d.text)
        bar.tell(read, 0)


def _beam(data, patterns: tuple[str, ...], out: Path) -> list[Path]:
    """Count files of a Beam pipeline, complete or made anew."""
    options, done = data.superbpe, out.with_suffix(".done")
    if options.held_out:
        raise ValueError("config.data.superbpe.count='beam' counts whole files: set held_out=0.0")
    if not done.exists():
        files = reading.input_files(data)
        parts = counting.count_with_beam(files, patterns, out, options.beam)
        _atomic(done, json.dumps([part.name for part in parts]))
    return [out.parent / name for name in json.loads(done.read_text())]


def _name(held: list) -> str:
    return "held-out text" if held else "the training text"


def _rules(options):
    """The preset, with the rules that differ from the usual ones."""
    usual = dataclasses.asdict(Veto())
    return preset(options.rules, **{k: options[k] for k in usual if options[k] != usual[k]})


def _texts(found: Corpus, patterns: tuple[str, ...]) -> Iterable:
    """Texts, or (piece, count) where they were counted."""
    if found.counts:
        yield from counting.read_counts(found.counts[patterns])
        return
    bar, total, read = Bar("reading", "characters"), sum(len(text) for _, text in found.texts), 0
    for _, text in found.texts:
        yield text
        read += len(text)
        bar.tell(read, total)


def first_stage(config, found: Corpus, workdir: Path) -> Bpe:
    """Plain BPE of the whole vocabulary; any t is a prefix of it."""
    options, size = config.data.superbpe, config.data.vocab_size
    key = _hash(found.key, size, options.all_bytes)
    path = workdir / "stage1.json"
    if kept := _kept(path, key):
        return Bpe.of(kept["alphabet"], [tuple(pair) for pair in kept["merges"]])
    begun = time.monotonic()
    if found.counts:
        bar = Bar("stage 1", "merges")
        bpe = counting.stage1_from_counts(
            _texts(found, (S1,)), vocab_size=size, all_bytes=options.all_bytes,
            engine=options.engine, on_progress=lambda p: bar.tell(p.done, p.total),
        )  # fmt: skip
    else:
        bpe = stage1.train(
            _texts(found, ()), vocab_size=size, all_bytes=options.all_bytes, progress=True
        )
    logging.info("stage 1: %d merges in %.1f s", len(bpe.merges), time.monotonic() - begun)
    _atomic(path, json.dumps({"key": key, "alphabet": bpe.alphabet, "merges": bpe.merges}))
    return bpe


def second_stage(
    config, found: Corpus, start: Bpe, workdir: Path, normalizer: dict | None = None
) -> tuple[Bpe, dict]:
    """(the tokenizer, {inherited, skipped, t}); goes on from what a killed process left."""
    options, t = config.data.superbpe, len(start.merges)
    rules = _rules(options)
    key = _hash(found.key, config.data.vocab_size, rules, options.all_bytes, options.keep,
                sorted(start.vocab.items()), start.merges)  # fmt: skip
    path, partial = workdir / f"stage2-t{t}.json", workdir / f"stage2-t{t}.partial.json"
    if kept := _kept(path, key):
        return _bpe(kept), kept["facts"]
    facts, begin = {"t": t}, start
    if kept := _kept(partial, key):
        facts, begin = kept["facts"], _bpe(kept)
        done = len(begin.merges) - facts["inherited"]
        print(f"stage 2 of t={t} goes on after {done} merges of its own", flush=True)
    bar, saved = Bar(f"stage 2, t={t}", "merges"), [time.monotonic()]

    def on_progress(p: stage2.Progress) -> None:
        bar.tell(p.done, p.total)
        if "inherited" not in facts:
            facts.update(inherited=len(p.base.merges), skipped=t - len(p.base.merges))
        if time.monotonic() - saved[0] >= options.save_every and p.done < p.total:
            _save(partial, key, stage2.extended(p.base, p.merges), facts)
            saved[0] = time.monotonic()

    bpe = stage2.train(
        _texts(found, rules.train), begin, config.data.vocab_size, rules,
        counted=bool(found.counts), all_bytes=options.all_bytes,
        keep=options.keep or begin is not start, normalizer=normalizer,
        engine=options.engine, on_progress=on_progress,
    ).bpe  # fmt: skip
    _save(path, key, bpe, facts)
    partial.unlink(missing_ok=True)
    return bpe, facts


def _save(path: Path, key: str, bpe: Bpe, facts: dict) -> None:
    _atomic(
        path,
        json.dumps({"key": key, "facts": facts, "vocab": dict(bpe.vocab), "merges": bpe.merges}),
    )


def _bpe(kept: dict) -> Bpe:
    return Bpe(kept["vocab"], tuple(tuple(pair) for pair in kept["merges"]))


class Reference(NamedTuple):
    """What the result is compared with: plain BPE of the same size, or what it was begun from."""

    bpe: Bpe
    inner: tokenizers.Tokenizer
    patterns: tuple[str, ...] | None  # None: the file's own pre-tokenizer


def _start(options) -> tuple[tokenizer_json.Loaded, Reference] | None:
    """The tokenizer that stage 2 is asked to begin from."""
    if not options.start:
        return None
    if options.start.endswith(".txt"):
        if not options.alphabet:
            raise ValueError("config.data.superbpe.start=merges.txt needs alphabet=FILE beside it")
        bpe = Bpe.of(read_alphabet(Path(options.alphabet)), read_merges(Path(options.start)))
        loaded = tokenizer_json.Loaded(bpe, {}, None, None)
        return loaded, Reference(bpe, tokenizer_json.build(bpe, (S1,)), (S1,))
    loaded = tokenizer_json.load(options.start)
    inner = tokenizer_json.build(loaded.bpe, (), loaded.specials, normalizer=loaded.normalizer)
    if loaded.pre_tokenizer:
        whole = json.loads(inner.to_str()) | {"pre_tokenizer": loaded.pre_tokenizer}
        inner = tokenizers.Tokenizer.from_str(json.dumps(whole))
    return loaded, Reference(loaded.bpe, inner, None)


def _choices(config, source: Bpe, begun: bool) -> list[int]:
    """The values of t to try."""
    options, size = config.data.superbpe, config.data.vocab_size
    if options.sweep:
        return sweep.merges_of(options.sweep, size, len(source.alphabet))
    if options.t >= 0:
        return [options.t]
    return [len(source.merges) if begun else round(options.share * size)]


def run(config, workdir) -> dict:
    """Trains config.data.superbpe; returns the report."""
    workdir, size, options = Path(workdir), config.data.vocab_size, config.data.superbpe
    if options.all_bytes and size <= 256:
        raise ValueError(f"config.data.vocab_size={size}: more than the 256 bytes are needed")
    workdir.mkdir(parents=True, exist_ok=True)
    rules, begun = _rules(options), _start(options)
    found = corpus(config, workdir)
    key = _hash(found.key, size, sorted(options.to_dict().items()), begun and begun[0])
    if told := _kept(workdir / "report.json", key):
        print(f"finished before: {workdir / 'tokenizer.json'}, report.md beside it", flush=True)
        return told
    if begun:
        (loaded, reference), normalizer = begun, begun[0].normalizer
        source = loaded.bpe
    else:
        source, normalizer = first_stage(config, found, workdir), None
        reference = Reference(source, tokenizer_json.build(source, (S1,)), (S1,))
    rows, made = [], {}
    for t in _choices(config, source, bool(begun)):
        start = source if t == len(source.merges) else source.first(min(t, len(source.merges)))
        if len(start.vocab) >= size and options.sweep:  # plain BPE
            bpe, facts, cut = start, {"t": t, "inherited": t, "skipped": 0}, PRESETS["bpe"].encode
        else:
            bpe, facts = second_stage(config, found, start, workdir, normalizer)
            cut = rules.encode
        measured = [text for _, text in found.measured]
        value = tokenizer_json.bytes_per_token(_inner(bpe, cut, normalizer), measured)
        superwords = report.shape(bpe, facts["inherited"])["superwords"]
        plain = cut != rules.encode
        rows.append(dict(t=t, bytes_per_token=value, plain=plain, superwords=superwords))
        made[t] = bpe, facts, cut
    if options.sweep:
        sweep.write(workdir, rows, size, f"Choosing t: {workdir.name}")
        print(sweep.table(rows, size), flush=True)
    bpe, facts, cut = made[sweep.best(rows)["t"]]
    specials = loaded.specials if begun and options.keep else options.specials
    built = tokenizer_json.build(bpe, cut, specials, normalizer=normalizer)
    _atomic(workdir / "tokenizer.json", built.to_str())
    if not begun:
        plain = tokenizer_json.build(source, (S1,), tuple(specials))
        _atomic(workdir / "bpe.json", plain.to_str())
    write_merges(workdir / "merges.txt", bpe.merges)
    _atomic(workdir / "vocab.json", json.dumps(dict(bpe.vocab), ensure_ascii=False, indent=0))
    told = {"key": key, "t": facts["t"]}
    told |= _report(_inner(bpe, cut, normalizer), bpe, cut, reference, facts, found)
    report.write(workdir, told, bpe, f"SuperBPE, {workdir.name}")
    print((workdir / "report.md").read_text("utf-8"), flush=True)
    return told


def _inner(bpe: Bpe, cut: tuple[str, ...], normalizer: dict | None) -> tokenizers.Tokenizer:
    return tokenizer_json.build(bpe, cut, normalizer=normalizer)


def _report(
    inner, bpe: Bpe, cut: tuple[str, ...], reference: Reference, facts: dict, found: Corpus
) -> dict:
    measured = found.measured
    size = len(bpe.vocab)
    sizes = [s for s in SIZES if s < size] + [size]
    old = reference.bpe, reference.patterns
    return {
        "inherited": facts["inherited"],
        "skipped": facts["skipped"],
        "measured_on": found.measured_on,
        "measured_bytes": sum(len(text.encode()) for _, text in measured),
        "training_bytes": sum(len(text.encode()) for _, text in found.texts),
        "bytes_per_token": report.efficiency(inner, measured),
        "bytes_per_token_bpe": report.efficiency(reference.inner, measured),
        "limit": report.limit(measured),
        "difficulty": report.difficulty(inner, measured),
        "difficulty_bpe": report.difficulty(reference.inner, measured),
        "curve": report.curve(bpe, cut, measured, sizes),
        "curve_bpe": report.curve(*old, measured, sizes) if old[1] is not None else {},
        "vocabulary": report.shape(bpe, facts["inherited"]),
    }
