"""How often each piece occurs in texts that no memory holds: on disk, or by Apache Beam.

A count file has one line for each different piece, "COUNT<tab>PIECE" in byte spelling (which holds
no white space), sorted by piece. `stage1_from_counts` and stage2.train(counted=True) train on it;
the merges are those of the texts themselves.
"""

import heapq
import itertools
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from input_pipeline.superbpe import pieces, stage2, tokenizer_json
from input_pipeline.superbpe.bpe import Bpe, byte_symbols, unspell
from input_pipeline.superbpe.rules import PRESETS

ENTRY = 160  # bytes that one piece takes in memory, beside its characters
OPEN = 256  # parts that are merged at a time: a process may open 1,024 files


def cut(texts: Iterable[str], patterns: Sequence[str]) -> Iterator[str]:
    """Pieces of the texts in byte spelling."""
    cutter = tokenizer_json.cutter(patterns, lines=True)
    for block in pieces.blocks(texts):
        for piece, _ in cutter.pre_tokenize_str(block):
            yield piece


def count(texts: Iterable[str], patterns: Sequence[str], out: Path, memory_mb: float = 512) -> Path:
    """Writes the count file of the texts; holds at most about memory_mb of pieces at a time.

    What does not fit is written as sorted parts, which are merged at the end.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    limit, size = int(memory_mb * 2**20), 0
    found: Counter[str] = Counter()
    parts: list[Path] = []
    names = (scratch / f"{number:06}.tsv" for number in itertools.count())

    def write(rows: Iterable[tuple[str, int]]) -> None:
        parts.append(next(names))
        _write(parts[-1], rows)

    def flush() -> None:
        write(sorted(found.items()))
        found.clear()

    try:
        for piece in cut(texts, patterns):
            if piece not in found:
                size += ENTRY + 2 * len(piece)
            found[piece] += 1
            if size > limit:
                flush()
                size = 0
        flush()
        while len(parts) > 1:
            some = parts[:OPEN]
            write(_added(map(_read, some)))
            for path in some:
                path.unlink()
            del parts[: len(some)]
        parts[0].rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _write(path: Path, rows: Iterable[tuple[str, int]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for piece, number in rows:
            file.write(f"{number}\t{piece}\n")


def _read(path: Path) -> Iterator[tuple[str, int]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            number, _, piece = line.rstrip("\n").partition("\t")
            yield piece, int(number)


def _added(parts: Iterable[Iterator[tuple[str, int]]]) -> Iterator[tuple[str, int]]:
    """Sorted rows of all parts, equal pieces added up."""
    held, total = "", 0
    for piece, number in heapq.merge(*parts):
        if piece != held and total:
            yield held, total
            total = 0
        held = piece
        total += number
    if total:
        yield held, total


def read_counts(paths: Path | Sequence[Path]) -> Iterator[tuple[str, int]]:
    """(piece as text, how often) of count files; Beam writes several, each piece in one of them."""
    for path in [paths] if isinstance(paths, Path) else paths:
        for piece, number in _read(path):
            yield unspell(piece).decode(), number


def stage1_from_counts(
    counts: Iterable[tuple[str, int]],
    *,
    vocab_size: int = 0,
    merges: int | None = None,
    all_bytes: bool = False,
    engine: str = "auto",
    on_progress=lambda progress: None,
) -> Bpe:
    """Stage 1 from (piece, how often), by the loop of stage 2: the stock trainer's merges, which
    takes no counts, and counts that do not end at 2^31."""
    start = Bpe.of(sorted(byte_symbols()) if all_bytes else (), ())
    most = vocab_size if merges is None else merges + 256
    found = stage2.train(
        counts, start, most, PRESETS["bpe"],
        counted=True, all_bytes=all_bytes, engine=engine, on_progress=on_progress,
    ).bpe  # fmt: skip
    return found if merges is None else found.first(min(merges, len(found.merges)))


def count_with_beam(
    files: Sequence[Path],
    patterns: Sequence[str],
    out: Path,
    options: Sequence[str] = (),
    *,
    max_unreadable: int = 0,
    normalizer: dict | None = None,
) -> list[Path]:
    """Count files of text files by an Apache Beam pipeline. Extra "beam".

    options: of any runner, which is this machine's by default (--runner=FlinkRunner, ...).
    max_unreadable: of one file, as no worker sees the others; normalizer: JSON, texts pass it first
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError(
            "config.data.superbpe.count='beam' needs: pip install -e '.[beam]'"
        ) from error
    patterns = tuple(patterns)
    out.parent.mkdir(parents=True, exist_ok=True)
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        (
            pipeline
            | "files" >> beam.Create([str(f) for f in files])
            | "spread" >> beam.Reshuffle()
            | "pieces" >> beam.FlatMap(_count_file, patterns, max_unreadable, normalizer)
            | "add up" >> beam.CombinePerKey(sum)
            | "lines" >> beam.MapTuple(lambda piece, number: f"{number}\t{piece}")
            | "write" >> beam.io.WriteToText(str(out), file_name_suffix=".tsv")
        )
    return sorted(out.parent.glob(f"{out.name}-*.tsv"))


def _count_file(
    path: str, patterns: tuple[str, ...], max_unreadable: int, normalizer: dict | None
) -> Iterator[tuple[str, int]]:
    """Pieces of one file with counts; added up for a part of the file at a time."""
    from input_pipeline.records import Skipped
    from input_pipeline.superbpe.reading import read_file

    found: Counter[str] = Counter()
    texts = read_file(Path(path), Skipped(max_unreadable))
    for piece in cut(tokenizer_json.normalised(texts, normalizer), patterns):
        found[piece] += 1
        if len(found) > 200_000:
            yield from found.items()
            found.clear()
    yield from found.items()
