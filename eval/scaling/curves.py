"""One reader for curves and scores: metrics.jsonl, eval/<step>.json, CSV with named columns.

A table is {column: array}; a curve is two of its columns. Folders and lists of files give one
curve per file; a run's folder (it has a metrics.jsonl) is one curve and brings its config.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval import common

SUFFIXES = (".csv", ".jsonl", ".json")


class Curve(NamedTuple):
    """Points of one run: x (steps) and y (losses), float64, in order of x."""

    name: str
    steps: np.ndarray  # [n]
    values: np.ndarray  # [n]
    table: dict[str, np.ndarray]  # every column, the same rows (NaN where a row has none)
    config: dict | None  # the run's config.json where there is one
    path: Path


def read_table(path) -> dict[str, np.ndarray]:
    """{column: [rows]} of a CSV with a header, a metrics.jsonl or a flat JSON (one row).

    Columns whose every filled cell is a number are float64, empty cells NaN; others are str.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r}: no such file")
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    elif path.suffix == ".jsonl":
        rows = common.read_rows(path)
    elif path.suffix == ".json":
        found = json.loads(path.read_text())
        rows = found if isinstance(found, list) else [found]
    else:
        raise ValueError(f"{str(path)!r} must end in one of {', '.join(SUFFIXES)}")
    names = list(dict.fromkeys(key for row in rows for key in row if key))
    return {name: _column([row.get(name) for row in rows]) for name in names}


def _column(cells: list) -> np.ndarray:
    empty = [c is None or c == "" for c in cells]
    try:
        return np.array([np.nan if e else float(c) for c, e in zip(cells, empty)], np.float64)
    except (TypeError, ValueError):
        return np.array(["" if e else str(c) for c, e in zip(cells, empty)])


def read_curve(path, *, x: str = "step", y: str = "train/loss", key: str = "config.fit.key"):
    """The Curve of a file or of a run's folder; rows without x or y are left out.

    `key` names the setting that chose y, for the message when there is no such column.
    """
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    table = read_table(file)
    for column, setting in ((x, "the column of steps"), (y, key)):
        if column not in table or table[column].dtype.kind != "f":
            known = ", ".join(c for c, v in table.items() if v.dtype.kind == "f") or "nothing"
            raise ValueError(f"{setting}={column!r}: {file} has only {known}")
    kept = np.isfinite(table[x]) & np.isfinite(table[y])
    if not kept.any():
        raise ValueError(f"{key}={y!r}: {file} has no number in that column")
    order = np.flatnonzero(kept)[np.argsort(table[x][kept], kind="stable")]
    table = {name: column[order] for name, column in table.items()}
    folder = file.parent if file.name == "metrics.jsonl" else None
    config = folder / "config.json" if folder else None
    loaded = json.loads(config.read_text()) if config and config.is_file() else None
    name = folder.name if folder else file.stem
    return Curve(name, table[x], table[y], table, loaded, path)


def find(where: str | Path | Sequence[str], *, setting: str = "config.fit.source") -> list[Path]:
    """Curve files below `where`: a file, a run's folder, a folder of either, or a list of those.

    One text may hold several, separated by commas; * and ? are filled in.
    """
    if isinstance(where, str | Path):
        where = [part for part in str(where).split(",") if part.strip()]
    found: list[Path] = []
    for part in where:
        text = str(part).strip()
        places = [Path(text)]
        if any(c in text for c in "*?["):
            root = Path(Path(text).anchor) if Path(text).is_absolute() else Path()
            places = sorted(root.glob(str(Path(text).relative_to(root))))
        below = [file for place in places for file in _below(place)]
        if not below:
            raise FileNotFoundError(
                f"{setting}={text!r}: no such CSV, metrics.jsonl, run or folder of them"
            )
        found += below
    return list(dict.fromkeys(found))


def _below(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if (place / "metrics.jsonl").is_file():
        return [place]
    if not place.is_dir():
        return []
    runs = [p.parent for p in place.rglob("metrics.jsonl")]
    return sorted([*place.glob("*.csv"), *runs])


def read_curves(
    where, *, x: str = "step", y: str = "train/loss",
    setting: str = "config.fit.source", key: str = "config.fit.key",
) -> dict[str, Curve]:  # fmt: skip
    """{name: Curve} of everything `find` finds; names are file stems or folders, made different."""
    paths = find(where, setting=setting)
    curves = [read_curve(path, x=x, y=y, key=key) for path in paths]
    names = [c.name for c in curves]
    if len(set(names)) < len(names):  # runs of several seeds: seed0 is no name
        names = _apart([p.parent if p.is_file() and p.suffix == ".jsonl" else p for p in paths])
    return {name: c._replace(name=name) for name, c in zip(names, curves)}


def _apart(paths: list[Path]) -> list[str]:
    """Shortest ends of the paths that tell them apart, without suffixes."""
    for depth in range(2, 1 + max(len(p.parts) for p in paths)):
        names = ["/".join(p.with_suffix("").parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same curve twice: {paths[0]}")


def thin(steps, values, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most `points` bins, equal in log step: late steps do not outvote early ones."""
    if len(steps) <= points:
        return steps, values
    edges = np.geomspace(steps[0], steps[-1], points + 1)
    index = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, points - 1)
    full = np.unique(index)
    return tuple(np.array([x[index == i].mean() for i in full]) for x in (steps, values))


def bins(steps, values, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over bins of `width` neighbouring rows: what one noisy batch says less of."""
    if width <= 1 or len(steps) < 2 * width:
        return steps, values
    whole = len(steps) // width * width
    shape = lambda x: np.asarray(x)[len(x) - whole :].reshape(-1, width).mean(1)  # noqa: E731
    return shape(steps), shape(values)


def evaluations(folder) -> dict[str, float] | None:
    """The numbers of the newest folder/eval/<step>.json, or None."""
    files: Iterable[Path] = Path(folder).glob("eval/*.json")
    numbered = [p for p in files if p.stem.isdigit()]
    return json.loads(max(numbered, key=lambda p: int(p.stem)).read_text()) if numbered else None
