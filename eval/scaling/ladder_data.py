"""Runs of a ladder: their sizes, tokens and scores, from our workdirs or from CSV files.

A list of runs is a JSON file {label: {"n": N, "flops": FLOPs per token, "mode": "train" | "eval",
"paths": [CSV, ...]}}, as published with arXiv 2412.04403; runs of mode "eval" are targets that no
fit sees. Or it is a folder of runs of this codebase, the largest size of which is the target; a
folder that has only their evaluations (`save`) will do.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.run import write_json
from eval.scaling import curves, report, sizes

SEED = re.compile(r"/(seed[^/]*)$")
TOKENS, STEP, BATCH = "throughput/total_tokens", "_step", "batch_size_in_tokens"
SAVED = "runs.json"


class Task(NamedTuple):
    """A benchmark: weighted sums of columns, and the score of guessing."""

    name: str
    losses: tuple[tuple[str, float], ...]
    scores: tuple[tuple[str, float], ...]
    chance: float


class Run(NamedTuple):
    """Evaluations of one run in order."""

    name: str
    n: float  # parameters without the input embedding
    flops_per_token: float
    tokens: np.ndarray  # [rows]
    table: dict[str, np.ndarray]  # {column: [rows]}
    target: bool
    family: str = ""  # config.model.name of a run of this codebase

    @property
    def d(self) -> float:
        """Tokens at the last evaluation."""
        return float(self.tokens[-1])

    @property
    def c(self) -> float:
        """FLOPs at the last evaluation."""
        return self.d * self.flops_per_token


def make_tasks(listed: Sequence) -> list[Task]:
    """Tasks of config.fit.tasks."""
    return [Task(name, tuple(map(tuple, losses)), tuple(map(tuple, scores)), float(chance))
            for name, losses, scores, chance in listed]  # fmt: skip


def mixed(run: Run, columns: Sequence[tuple[str, float]]) -> np.ndarray:
    """[rows] weighted sum of columns."""
    for column, _ in columns:
        if column not in run.table:
            raise ValueError(
                f"config.fit.tasks: run {run.name!r} has no column {column!r}; it has "
                f"{', '.join(list(run.table)[:8])}, ..."
            )
    return sum(weight * run.table[column] for column, weight in columns)


def points(run: Run, task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, loss, score) of the evaluations that have all of them."""
    loss, score = mixed(run, task.losses), mixed(run, task.scores)
    kept = np.isfinite(loss) & np.isfinite(score) & np.isfinite(run.tokens)
    if not kept.any():
        raise ValueError(f"config.fit.tasks: run {run.name!r} has no row with {task.name!r}")
    return run.tokens[kept], loss[kept], score[kept]


def final(run: Run, task: Task, last: int) -> tuple[float, float]:
    """(loss, score): means over the last evaluations."""
    _, loss, score = points(run, task)
    return float(loss[-last:].mean()), float(score[-last:].mean())


def trailing_mean(x: np.ndarray, window: int) -> np.ndarray:
    """Mean of up to `window` values that end at each place."""
    total = np.cumsum(np.concatenate([[0.0], x]))
    end = np.arange(1, len(x) + 1)
    begin = np.maximum(end - window, 0)
    return (total[end] - total[begin]) / (end - begin)


def smoothed(run: Run, task: Task, skip: float, window: int) -> tuple[np.ndarray, np.ndarray]:
    """(loss, score) of step 2: without the first ceil(skip) share, then trailing means."""
    _, loss, score = points(run, task)
    first = math.ceil(skip * len(loss))
    return trailing_mean(loss[first:], window), trailing_mean(score[first:], window)


def read(options, workdir="", names: Sequence[str] = (), *, one_family: bool = True) -> list[Run]:
    """Runs of config.fit.runs, a JSON list or a folder of runs; where it is empty those of
    `workdir` with these names. one_family: of our own runs only those of config.fit.family."""
    where = Path(options.runs).expanduser()
    if not options.runs:
        runs = _ordered([from_workdir(Path(workdir) / name, name) for name in names])
    elif where.is_dir():
        runs = read_workdirs(where)
    else:
        return _read_list(where, options)
    if one_family:
        runs = of_family(runs, options.family)
    return held_out(runs, options.held_out)


def of_family(runs: list[Run], family: str) -> list[Run]:
    """The runs of one family; where none is named there may be only one."""
    known = sorted({run.family for run in runs})
    if family not in known and (family or len(known) > 1):
        raise ValueError(
            f"config.fit.family={family!r}: the runs are of {', '.join(known)}; a ladder is one "
            "family, name it"
        )
    return [run for run in runs if run.family == (family or known[0])]


def _read_list(where: Path, options) -> list[Run]:
    if where.suffix != ".json" or not where.is_file():
        raise FileNotFoundError(
            f"config.fit.runs={options.runs!r} must be a .json list of runs or a folder of them"
        )
    listed = json.loads(where.read_text())
    runs = []
    for label, entry in listed.items():
        try:
            n, paths, target = float(entry["n"]), entry["paths"], entry["mode"] == "eval"
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"config.fit.runs={options.runs!r}: {label!r} needs n, paths and mode ({error!r})"
            ) from None
        flops = float(entry.get("flops", 6 * n))
        for path in paths:
            file = _locate(path, where.parent, options.folder)
            runs.append(from_csv(file, n=n, flops_per_token=flops, target=target))
    return runs


def _locate(path: str, root: Path, folder: str) -> Path:
    """The file as written, beside the list, or by its name in config.fit.folder."""
    tried = [Path(path), root / path, root / Path(path).name]
    if folder:
        tried.insert(0, Path(folder).expanduser() / Path(path).name)
    for file in tried:
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"config.fit.runs names {path!r}: neither there nor in config.fit.folder={folder!r}"
    )


def from_csv(path, *, n: float, flops_per_token: float = 0.0, target: bool = False) -> Run:
    """A run from a table of evaluations with a column of tokens, or of steps and batch size."""
    path = Path(path)
    table = curves.read_table(path)
    tokens = table.get(TOKENS, np.array([np.nan]))
    if STEP in table and BATCH in table:
        tokens = np.where(np.isfinite(tokens), tokens, table[STEP] * table[BATCH])
    if not np.isfinite(tokens).any():
        raise ValueError(f"{path}: needs the column {TOKENS!r}, or {STEP!r} and {BATCH!r}")
    order = np.argsort(tokens, kind="stable")
    table = {name: column[order] for name, column in table.items()}
    return Run(path.stem, n, flops_per_token or 6 * n, tokens[order], table, target)


def read_workdirs(folder) -> list[Run]:
    """Every run of this codebase below `folder`, smallest first; or what `save` left there."""
    folder = Path(folder)
    if (folder / SAVED).is_file() and not any(folder.rglob("metrics.jsonl")):
        return _ordered(_saved(folder / SAVED))
    paths = [p for p in curves.find(folder, setting="config.fit.runs") if p.is_dir()]
    if not paths:
        raise FileNotFoundError(f"config.fit.runs={str(folder)!r}: no run with a metrics.jsonl")
    runs = [from_workdir(path, str(path.relative_to(folder))) for path in paths]
    return _ordered(runs)


def save(workdir, runs: list[Run]) -> None:
    """The evaluations of our own runs in one file, which `read_workdirs` takes without the runs."""
    own = {}
    for run in runs:
        if run.family:
            kept = {key: column for key, column in run.table.items() if key.startswith("eval/")}
            own[run.name] = dict(n=run.n, family=run.family, tokens=run.tokens, columns=kept)
    if own:
        write_json(Path(workdir) / SAVED, report.plain(own))


def _saved(path: Path) -> list[Run]:
    array = lambda cells: np.array(cells, float)  # noqa: E731
    return [
        Run(
            name, row["n"], 6.0 * row["n"], array(row["tokens"]),
            {key: array(column) for key, column in row["columns"].items()}, False, row["family"],
        )
        for name, row in json.loads(path.read_text()).items()
    ]  # fmt: skip


def _ordered(runs: list[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: (run.n, run.d))


def by_seed(runs: list[Run]) -> dict[str, list[Run]]:
    """{"seed0": runs} where the runs are called NAME/seed0, {"": runs} elsewhere."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        seed = SEED.search(run.name)
        groups.setdefault(seed[1] if seed else "", []).append(
            run._replace(name=SEED.sub("", run.name))
        )
    return dict(sorted(groups.items()))


def from_workdir(path, name: str = "") -> Run:
    """A run of this codebase: its evaluations, the size of its model, its tokens."""
    path = Path(path)
    config = json.loads((path / "config.json").read_text())
    table = curves.read_table(path / "metrics.jsonl")
    columns = [column for column in table if column.startswith("eval/")]
    if not columns:
        raise ValueError(f"config.fit.runs: run {str(path)!r} has no evaluation in metrics.jsonl")
    kept = np.isfinite([table[column] for column in columns]).any(0)
    table = {name: column[kept] for name, column in table.items()}
    tokens = table["step"] * config["batch_size"] * config["data"]["length"]
    n = sizes.count(config).without_input
    family = config["model"]["name"]
    return Run(name or path.name, n, 6.0 * n, tokens, table, False, family)


def held_out(runs: list[Run], names: Sequence[str]) -> list[Run]:
    """The same runs, targets those whose names begin with one of `names`, or the largest size."""
    top = max(run.n for run in runs)

    def one(run):
        return run.name.startswith(tuple(names)) if names else run.n == top

    found = [run._replace(target=one(run)) for run in runs]
    if not any(run.target for run in found):
        raise ValueError(
            f"config.fit.held_out={tuple(names)}: no run begins so; there are "
            f"{', '.join(run.name for run in runs)}"
        )
    return found
