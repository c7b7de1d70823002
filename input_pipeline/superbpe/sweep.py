"""Choosing t: stage 1 once, stage 2 from several of its prefixes, held-out bytes per token."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def merges_of(shares: Sequence[float], vocab_size: int, alphabet: int) -> list[int]:
    """Merges of stage 1 at these shares of the vocabulary; 1.0 is plain BPE."""
    for share in shares:
        if not 0 <= share <= 1:
            raise ValueError(f"config.data.superbpe.sweep has {share}: shares lie in [0, 1]")
    room = max(vocab_size - alphabet, 0)
    return sorted({min(round(share * vocab_size), room) for share in shares})


def best(rows: Sequence[Mapping]) -> Mapping:
    """The row with most bytes per token; of equal ones the first."""
    return max(rows, key=lambda row: row["bytes_per_token"])


def table(rows: Sequence[Mapping], vocab_size: int) -> str:
    """One row for each t, the best marked; plain BPE is the last."""
    top = best(rows)
    lines = ["| t | share of the vocabulary | bytes per token | superwords |"]
    lines += ["| --- | --- | --- | --- |"]
    for row in rows:
        value = f"{row['bytes_per_token']:.4f}"
        value = f"**{value}**" if row is top else value
        name = f"{row['t']} (BPE)" if row["plain"] else row["t"]
        lines.append(f"| {name} | {row['t'] / vocab_size:.2f} | {value} | {row['superwords']} |")
    return "\n".join(lines) + "\n"


def write(workdir: Path, rows: Sequence[Mapping], vocab_size: int, title: str) -> None:
    """sweep.json, sweep.md and sweep.png."""
    from matplotlib.figure import Figure

    (workdir / "sweep.json").write_text(json.dumps(list(rows), indent=1) + "\n")
    (workdir / "sweep.md").write_text(f"# {title}\n\n" + table(rows, vocab_size), "utf-8")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [row["t"] / vocab_size for row in rows], [row["bytes_per_token"] for row in rows], "o-"
    )
    top = best(rows)
    axes.plot(
        top["t"] / vocab_size, top["bytes_per_token"], "*", ms=16, label=f"best: t={top['t']}"
    )
    axes.set_xlabel("t / vocabulary (1: plain BPE)")
    axes.set_ylabel("bytes per token, held out")
    axes.set_title(title)
    axes.legend()
    figure.savefig(workdir / "sweep.png", dpi=110)
