"""SuperBPE: stage 2 against a plain reference, its growth, stage 1 and encoding beside the library.

    python -m benchmarks.superbpe --out=benchmarks/results/superbpe.json

Text: GCIDE where the extra `text` is installed, then Python's sources, of which every machine has
enough. Times are of the process's own CPU where the machine is shared (wall time beside it);
sizes run in processes of their own, so that peak memory is theirs.
"""

import argparse
import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

from benchmarks import common
from input_pipeline import documents
from input_pipeline.records import Skipped
from input_pipeline.superbpe import pieces, stage1, stage2, tokenizer_json
from input_pipeline.superbpe.bpe import Bpe, Pair
from input_pipeline.superbpe.rules import PRESETS, S1, rejected

SIZES = (5, 10, 20, 50)  # MB
VOCABULARY, T = 32_000, 12_000


def text(megabytes: float) -> str:
    """That much text."""
    found, size = [], 0
    for document in _documents():
        found.append(document)
        size += len(document.encode())
        if size >= megabytes * 1e6:
            break
    return "".join(found).encode()[: int(megabytes * 1e6)].decode(errors="ignore")


def _documents():
    try:
        for _, document in documents.READERS["gcide"](SimpleNamespace(), Skipped(10)):
            yield document + "\n"
    except ValueError:  # the extra is not there
        pass
    for name in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_paths()[name]).rglob("*.py")):
            try:
                yield path.read_text("utf-8")
            except (OSError, UnicodeDecodeError):
                continue


def plain(content: str, start: Bpe, vocab_size: int) -> list[Pair]:
    """The textbook's BPE on stage-2 pieces: counts kept up to date, the best pair by looking at
    all of them. The same merges as stage2.train."""
    rules = PRESETS["repo"]
    inner = tokenizer_json.build(pieces.with_all_bytes(start), rules.train, lines=True)
    words = Counter()
    for one in inner.encode_batch(list(pieces.blocks([content]))):
        rows: dict[int, list[str]] = defaultdict(list)
        for token, word in zip(one.tokens, one.word_ids):
            rows[word].append(token)
        words.update(tuple(row) for row in rows.values())
    rows, weights = [list(w) for w in words], list(words.values())
    _, merges = pieces.used(start, _present(start, rows))
    ids = dict(Bpe.of(sorted({*start.alphabet, *"".join(map("".join, rows))}), merges).vocab)
    counts, where = Counter(), defaultdict(set)

    def add(number: int, sign: int) -> None:
        for pair in pairwise(rows[number]):
            counts[pair] += sign * weights[number]
            where[pair].add(number)

    for number in range(len(rows)):
        add(number, 1)
    found = list(merges)
    while len(ids) < vocab_size and counts:
        best = max(counts, key=lambda p: (counts[p], -ids[p[0]], -ids[p[1]]))
        product = best[0] + best[1]
        if counts[best] < 1:
            break
        if rejected(product, rules.veto):
            counts[best] = -(10**12)  # for good: later changes are far smaller
            continue
        ids.setdefault(product, len(ids))
        found.append(best)
        for number in where.pop(best):
            add(number, -1)
            old, new, i = rows[number], [], 0
            while i < len(old):
                both = tuple(old[i : i + 2]) == best
                new.append(product if both else old[i])
                i += 1 + both
            rows[number] = new
            add(number, 1)
        del counts[best]
    return found


def _present(start: Bpe, rows: list[list[str]]):
    import numpy as np

    present = np.zeros(len(start.vocab) + 1, bool)
    present[[start.vocab[t] for row in rows for t in row if t in start.vocab]] = True
    return present


def cpu(run: Callable) -> float:
    """Seconds of this process's CPU, all threads."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def against_plain(rounds: int) -> dict:
    """400 KB, 4,000 tokens from 2,000 merges: both, in turns."""
    content, made = text(0.4), {}
    start = stage1.train([content], vocab_size=4000).first(2000)
    stage2.train([content[:2000]], start, 2200)  # compiled code is loaded before the clock

    def run(name: str) -> None:
        if name == "plain":
            made[name] = plain(content, start, 4000)
        else:
            made[name] = list(stage2.train([content], start, 4000, engine=name).bpe.merges)

    cases = {
        name: lambda name=name: cpu(lambda: run(name)) for name in ("plain", "python", "numba")
    }
    seconds = common.take_turns(cases, rounds, warmup=0)
    if not made["plain"] == made["python"] == made["numba"]:
        raise RuntimeError("the three give different merges")
    return {
        "what": "against the plain reference",
        **{f"{name}_cpu_seconds": common.spread(s) for name, s in seconds.items()},
        "ratio": common.ratio(seconds["plain"], seconds["numba"]),
        "ratio_of_the_fallback": common.ratio(seconds["plain"], seconds["python"]),
    }


def grow(path: str, stage1_path: str) -> dict:
    """One size, in this process: stage 2 from a file."""
    kept = json.loads(Path(stage1_path).read_text())
    start = Bpe.of(kept["alphabet"], [tuple(pair) for pair in kept["merges"]])
    stage2.train(["a b a b"], Bpe.of("ab", ()), 5)  # compiled code is loaded before the clock
    wall, begin = time.perf_counter(), time.process_time()
    with open(path, encoding="utf-8", newline="\n") as file:
        found = stage2.train(file, start, VOCABULARY)
    return {
        "cpu_seconds": common.digits(time.process_time() - begin),
        "wall_seconds": common.digits(time.perf_counter() - wall),
        "peak_rss_gb": common.digits(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20),
        "tokens_before": found.tokens[0],
        "tokens_after": found.tokens[1],
        "merges": len(found.counts),
    }


def growth(folder: Path):
    """Stage 2 on 5, 10, 20 and 50 MB: stage 1 is that of the first 5 MB."""
    first = stage1.train([text(SIZES[0])], merges=T)
    (folder / "stage1.json").write_text(
        json.dumps({"alphabet": first.alphabet, "merges": first.merges})
    )
    for size in SIZES:
        (folder / "text.txt").write_text(text(size), "utf-8", newline="\n")
        command = [sys.executable, "-m", "benchmarks.superbpe", f"--one={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = {"what": "stage 2", "mb": size, **json.loads(done.stdout.splitlines()[-1])}
        common.show(row)
        yield row


def beside_the_library(rounds: int) -> list[dict]:
    """Stage 1 against the stock trainer on a file; encoding with S1 and across spaces."""
    import tokenizers

    content = text(5)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(content, "utf-8", newline="\n")

        def stock():
            inner = tokenizers.Tokenizer(tokenizers.models.BPE())
            inner.pre_tokenizer = tokenizer_json.cutter((S1,))
            trainer = tokenizers.trainers.BpeTrainer(vocab_size=8000, show_progress=False)
            inner.train([str(path)], trainer)

        cases = {
            "ours": lambda: cpu(lambda: stage1.train(path.open(newline="\n"), vocab_size=8000)),
            "stock": lambda: cpu(stock),
        }
        seconds = common.take_turns(cases, rounds, warmup=0)
    rows = [{"what": "stage 1, 5 MB", "ours / stock": common.ratio(*seconds.values())}]
    small = text(2)
    bpe = stage1.train([small], vocab_size=8000)
    mine = stage2.train([small], bpe.first(3200), 8000).bpe
    split = content[-2_000_000:].splitlines(keepends=True)
    split = ["".join(split[i : i + 20]) for i in range(0, len(split), 20)]
    both = {
        "BPE": tokenizer_json.build(bpe, (S1,)),
        "SuperBPE": tokenizer_json.build(mine, PRESETS["repo"].encode),
    }
    cases = {
        name: (lambda t=inner: cpu(lambda: t.encode_batch_fast(split)))
        for name, inner in both.items()
    }
    seconds = common.take_turns(cases, rounds, warmup=1)
    size = sum(len(block.encode()) for block in split) / 1e6
    rates = {name: common.spread([size / s for s in found]) for name, found in seconds.items()}
    rows.append({"what": "encoding, MB per CPU second", **rates})
    rows[-1]["SuperBPE / BPE"] = common.ratio(seconds["BPE"], seconds["SuperBPE"])
    return rows


def arguments(argv=None):
    """Command line of this benchmark."""
    parts = ["plain", "growth", "library"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--parts", nargs="*", default=parts, choices=parts)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """All of it; --one=FOLDER: one size of the growth."""
    args = arguments(argv)
    if args.one:
        folder = Path(args.one)
        print(json.dumps(grow(str(folder / "text.txt"), str(folder / "stage1.json"))))
        return
    rows = []
    if "plain" in args.parts:
        rows.append(against_plain(args.rounds))
        common.show(rows[-1])
    if "growth" in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            rows += growth(Path(folder))
    if "library" in args.parts:
        for row in beside_the_library(args.rounds):
            common.show(row)
            rows.append(row)
    common.save(args.out, "python -m benchmarks.superbpe", rows)


if __name__ == "__main__":
    main()
