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
from input_pipeline.superbpe.pieces import with_all_bytes
from input_pipeline.superbpe.progress import Bar
from input_pipeline.superbpe.rules import PRESETS, S1, Veto, preset
from input_pipeline.superbpe.tokenizer_json import Loaded

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


def corpus(config, workdir: Path, like: Loaded | None = None) -> Corpus:
    """Reads the inputs once: a sample in memory, or count files on disk, which take a pass each.

    like: what stage 2 begins from, whose normaliser pieces that are counted have passed.
    """
    data, options = config.data, config.data.superbpe
    if options.count not in ("memory", "disk", "beam"):
        raise ValueError(
            f"config.data.superbpe.count={options.count!r}: allowed are memory, disk, beam"
        )
    if options.count == "beam" and options.held_out:
        raise ValueError("config.data.superbpe.count='beam' counts whole files: set held_out=0.0")
    most = [int(mb * 2**20) for mb in (options.sample_mb, options.held_out_mb)]
    # Where pieces are counted, text to train on is only kept to measure on, if none is held out.
    training = reading.Sample(most[options.count != "memory"], config.seed)
    testing = reading.Sample(most[1], config.seed)
    beam = options.count == "beam"  # this machine need not read it all
    for d in reading.beginnings(data, most[1]) if beam else reading.stream(data):
        (testing if d.held_out else training).add(d.domain, d.text)
    held, texts = testing.texts(), training.texts()
    if not texts:
        raise ValueError("config.data.superbpe.inputs hold no text to train on")
    if options.count == "memory":
        key = _hash(*(part.encode() for row in texts for part in row))
        return Corpus(texts, held or texts, _name(held), {}, key)
    found, normalizer = {}, like.normalizer if like else None
    for patterns in dict.fromkeys((*([] if like else [(S1,)]), _rules(options).train)):
        out = workdir / "counts" / f"{_hash(patterns, reading.stamp(data), normalizer)}.tsv"
        if beam:
            found[patterns] = _beam(data, patterns, out, normalizer)
        else:
            if not out.exists():
                told = tokenizer_json.normalised(_told(data), normalizer)
                counting.count(told, patterns, out, options.count_memory_mb)
            found[patterns] = [out]
    sizes = [(p.name, p.stat().st_size) for parts in found.values() for p in parts]
    return Corpus([], held or texts, _name(held), found, _hash(sizes))


def _told(data) -> Iterator[str]:
    """The texts to train on, telling how much was read."""
    bar, read = Bar("counting", "characters"), 0
    for d in reading.stream(data):
        if not d.held_out:
            yield d.text
            read += len(d.text)
            bar.tell(read, 0)


def _beam(data, patterns: tuple[str, ...], out: Path, normalizer: dict | None) -> list[Path]:
    """Count files of a Beam pipeline, complete or made anew."""
    done = out.with_suffix(".done")
    if not done.exists():
        files = [path for _, path in reading.input_files(data)]
        parts = counting.count_with_beam(
            files, patterns, out, data.superbpe.beam,
            max_unreadable=data.max_unreadable, normalizer=normalizer,
        )  # fmt: skip
        _atomic(done, json.dumps([part.name for part in parts]))
    return [out.parent / name for name in json.loads(done.read_text())]


def _name(held: list) -> str:
    return "held-out text" if held else "the training text"


def _rules(options):
    """The preset, with the rules that the config gives."""
    given = {field.name: options[field.name] for field in dataclasses.fields(Veto)}
    return preset(options.rules, **{k: v for k, v in given.items() if v is not None})


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
    config, found: Corpus, start: Bpe, workdir: Path, like: Loaded | None = None
) -> tuple[Bpe, dict]:
    """(the tokenizer, {inherited, skipped, t}); goes on from what a killed process left."""
    options, t = config.data.superbpe, len(start.merges)
    rules, normalizer = _rules(options), like.normalizer if like else None
    first_new = like.free if like and options.keep else 0  # else the old marks' ids are free
    key = _hash(found.key, config.data.vocab_size, rules, options.all_bytes, options.keep,
                sorted(start.vocab.items()), start.merges, normalizer, first_new)  # fmt: skip
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
            _save(partial, key, stage2.extended(p.base, p.merges, first_new), facts)
            saved[0] = time.monotonic()

    bpe = stage2.train(
        _texts(found, rules.train), begin, config.data.vocab_size, rules,
        counted=bool(found.counts), all_bytes=options.all_bytes,
        keep=options.keep or begin is not start, first_new=first_new, normalizer=normalizer,
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


def _start(options) -> tuple[Loaded, Reference] | None:
    """The tokenizer that stage 2 is asked to begin from."""
    if not options.start:
        return None
    if options.start.endswith(".txt"):
        if not options.alphabet:
            raise ValueError("config.data.superbpe.start=merges.txt needs alphabet=FILE beside it")
        bpe = Bpe.of(read_alphabet(Path(options.alphabet)), read_merges(Path(options.start)))
        return Loaded(bpe), Reference(bpe, tokenizer_json.build(bpe, (S1,)), (S1,))
    loaded = tokenizer_json.load(options.start)
    if loaded.ignore_merges and options.keep:
        raise ValueError(
            f"config.data.superbpe.start={options.start!r} takes whole tokens whatever its merges "
            "say (ignore_merges), which stage 2 cannot: use keep=False, or set it to false there"
        )
    inner = tokenizers.Tokenizer.from_file(str(tokenizer_json.find(options.start)))
    inner.no_truncation()
    inner.no_padding()
    if not options.keep:  # ids are new, so nothing that names them can stay
        loaded = loaded._replace(added=(), post_processor=None)
    return loaded, Reference(loaded.bpe, inner, None)


def _check(options, size: int) -> None:
    """Raises for numbers that no text can make right."""
    if options.all_bytes and size <= 256:
        raise ValueError(f"config.data.vocab_size={size}: more than the 256 bytes are needed")
    if not 0 <= options.share <= 1:
        raise ValueError(f"config.data.superbpe.share={options.share}: allowed are 0 to 1")
    if not -1 <= options.t < size:
        raise ValueError(
            f"config.data.superbpe.t={options.t}: allowed are -1 and 0 to {size - 1}, less than "
            "config.data.vocab_size"
        )
    if options.keep and (options.t >= 0 or options.sweep or not options.start):
        raise ValueError(
            "config.data.superbpe.keep=True keeps the whole vocabulary of `start`: it needs "
            "start=FILE, t=-1 and sweep=()"
        )


def _starts(config, source: Bpe, begun: bool) -> dict[int, Bpe]:
    """{t: what stage 2 goes on from}; `source` holds the merges that there are."""
    options, size, every = config.data.superbpe, config.data.vocab_size, len(source.merges)
    if options.sweep:
        shares = sweep.merges_of(options.sweep, size, len(source.alphabet))
        choices = sorted({min(t, every) for t in shares})
    elif options.t >= 0:
        choices = [options.t]
    else:
        choices = [every if begun else min(round(options.share * size), every)]
    if choices[-1] > every:
        whose = "`start` has" if begun else "stage 1 found in this text"
        raise ValueError(
            f"config.data.superbpe.t={options.t}: allowed are -1 and 0 to {every}, the merges that "
            f"{whose}"
        )
    starts = {t: source if t == every else source.first(t) for t in choices}
    if not options.sweep:
        whole = with_all_bytes(starts[choices[0]]) if options.all_bytes else starts[choices[0]]
        # Without `keep`, merges that this text does not use make room.
        least = len(whole.vocab) + (options.keep or not begun)
        if size < least:
            raise ValueError(
                f"config.data.vocab_size={size}: stage 2 begins with {len(whole.vocab)} tokens "
                f"(t={choices[0]}), so at least {least} are needed"
            )
    return starts


def run(config, workdir) -> dict:
    """Trains config.data.superbpe; returns the report."""
    workdir, size, options = Path(workdir), config.data.vocab_size, config.data.superbpe
    _check(options, size)
    rules, begun = _rules(options), _start(options)
    loaded, reference = begun or (None, None)
    starts = _starts(config, loaded.bpe, True) if loaded else {}
    workdir.mkdir(parents=True, exist_ok=True)
    found = corpus(config, workdir, loaded)
    key = _hash(found.key, size, sorted(options.to_dict().items()), loaded)
    if told := _kept(workdir / "report.json", key):
        print(f"finished before: {workdir / 'tokenizer.json'}, report.md beside it", flush=True)
        return told
    if not loaded:
        source = first_stage(config, found, workdir)
        reference = Reference(source, tokenizer_json.build(source, (S1,)), (S1,))
        starts = _starts(config, source, False)
    reference.inner.encode_special_tokens = True  # marks that a text spells are text
    specials = () if loaded and loaded.added else options.specials
    rows, made = [], {}
    for t, start in starts.items():
        if len(start.vocab) >= size and options.sweep:  # plain BPE
            bpe, facts, cut = start, {"t": t, "inherited": t, "skipped": 0}, PRESETS["bpe"].encode
        else:
            bpe, facts = second_stage(config, found, start, workdir, loaded)
            cut = rules.encode
        inner = tokenizer_json.build(bpe, cut, specials, like=loaded)
        inner.encode_special_tokens = True
        value = tokenizer_json.bytes_per_token(inner, [text for _, text in found.measured])
        superwords = report.shape(bpe, facts["inherited"])["superwords"]
        plain = cut != rules.encode
        rows.append(dict(t=t, bytes_per_token=value, plain=plain, superwords=superwords))
        made[t] = bpe, facts, cut, inner
    if options.sweep:
        sweep.write(workdir, rows, size, f"Choosing t: {workdir.name}")
        print(sweep.table(rows, size), flush=True)
    bpe, facts, cut, inner = made[sweep.best(rows)["t"]]
    _write(workdir / "tokenizer.json", inner)
    if not loaded:
        _write(workdir / "bpe.json", tokenizer_json.build(source, (S1,), specials))
    write_merges(workdir / "merges.txt", bpe.merges)
    _atomic(workdir / "vocab.json", json.dumps(dict(bpe.vocab), ensure_ascii=False, indent=0))
    told = {"key": key, "t": facts["t"]}
    told |= _report(inner, bpe, cut, reference, facts, found, loaded)
    report.write(workdir, told, bpe, f"SuperBPE, {workdir.name}")
    # Last, because the same command again does nothing where it finds this file.
    _atomic(workdir / "report.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    print((workdir / "report.md").read_text("utf-8"), flush=True)
    return told


def _write(path: Path, inner: tokenizers.Tokenizer) -> None:
    """Writes a tokenizer and reads it again, as whoever uses it will."""
    _atomic(path, inner.to_str())
    if tokenizers.Tokenizer.from_file(str(path)).get_vocab() != inner.get_vocab():
        raise ValueError(f"{path} gives other ids than were written")


def _report(
    inner, bpe: Bpe, cut: tuple[str, ...], reference: Reference, facts: dict, found: Corpus,
    loaded: Loaded | None,
) -> dict:  # fmt: skip
    measured = found.measured
    size = len(bpe.vocab)
    sizes = [s for s in SIZES if s < size] + [size]
    old = reference.bpe, reference.patterns
    like = loaded and loaded._replace(added=(), post_processor=None)
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
        "curve": report.curve(bpe, cut, measured, sizes, like),
        "curve_bpe": report.curve(*old, measured, sizes) if old[1] is not None else {},
        "vocabulary": report.shape(bpe, facts["inherited"]),
    }
