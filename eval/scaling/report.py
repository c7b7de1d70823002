"""One report writer for laws and comparisons: JSON, a Markdown table, PNG plots."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from eval.run import write_json


def cell(value: Any, digits: int = 4) -> str:
    """A number to `digits` significant digits, an Interval as value [low, high], text as it is."""
    if value is None:
        return ""
    if hasattr(value, "low"):
        low, high = cell(float(value.low), digits), cell(float(value.high), digits)
        return f"{cell(float(value.value), digits)} [{low}, {high}]"
    if isinstance(value, float | np.floating):
        return f"{value:.{digits}g}"
    return str(value)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence], digits: int = 4) -> str:
    """A Markdown table; cells by `cell`."""
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    lines += ["| " + " | ".join(cell(value, digits) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], mean: str = ".4f", deviation: str = ".2g") -> str:
    """Mean ± sample standard deviation (not of one value), by format specifications; values that
    are not finite are counted and left out of the mean."""
    finite = [v for v in map(float, values) if math.isfinite(v)]
    if not finite:
        return f"{len(values)} infinite"
    text = f"{np.mean(finite):{mean}}"
    if len(finite) < len(values):
        return f"{text} in {len(finite)}, {len(values) - len(finite)} infinite"
    return f"{text} ± {np.std(finite, ddof=1):{deviation}}" if len(finite) > 1 else text


def plain(value: Any) -> Any:
    """Arrays, intervals and infinities as what JSON can hold (null for what is not finite)."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value if isinstance(value, str | int | bool) or value is None else str(value)


def write(workdir, title: str, sections: Sequence[str], data: Mapping, *, name: str = "report"):
    """Writes name.md (title, sections separated by blank lines) and name.json; prints the text."""
    workdir = Path(workdir)
    text = "\n\n".join([f"# {title}", *(s.strip() for s in sections if s.strip())]) + "\n"
    write_json(workdir / f"{name}.json", plain(data))
    (workdir / f"{name}.md").write_text(text)
    print(text, flush=True)
    return text


def problems(found: Mapping[str, Sequence[str]]) -> str:
    """A section that lists {fit: problems}; empty where there are none."""
    lines = [f"- {fit}: {text}" for fit, texts in found.items() for text in texts]
    return "\n".join(["Not to be trusted without a look:", "", *lines]) if lines else ""


@contextmanager
def figure(path, *, size: tuple[float, float] = (6, 4)) -> Iterator[Any]:
    """A matplotlib Figure that is written to `path` (PNG) at the end."""
    from matplotlib.figure import Figure

    made = Figure(figsize=size, layout="constrained")
    yield made
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=120)
