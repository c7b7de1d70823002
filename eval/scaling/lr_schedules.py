"""Learning rates per step as arrays: what the laws of the loss curve take, and what they give.

A schedule is written down as {"name": "cosine", "steps": 24000, "peak": 3e-4, "final": 3e-5,
"warmup": 2160}; a JSON file lists several by the names of their curves, with common keys on top:

    {"peak": 3e-4, "warmup": 2160, "schedules": {"a": {"name": "constant", "steps": 24000}, ...}}

Shapes follow arXiv 2503.12811's data: the warm-up runs from 0 at step 0 to the peak at its last
step, decays reach `final` one step after the last.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

SHAPES = {  # name -> keys beside steps, peak, warmup
    "constant": (),
    "cosine": ("final",),
    "wsd": ("final", "decay"),
    "piecewise": ("boundaries", "rates"),
    "file": ("path",),
}
FALLS = ("exponential", "linear", "power")


class Schedule(NamedTuple):
    """One learning rate per update."""

    name: str
    lrs: np.ndarray  # [steps] float64
    warmup: int  # the first updates, which the law may leave out

    @property
    def peak(self) -> float:
        return float(self.lrs.max())


def make(name: str, spec: dict, *, folder=".") -> Schedule:
    """The Schedule of one entry of a list; `folder` is where relative paths start."""
    shape = spec.get("name")
    if shape not in SHAPES:
        raise ValueError(f"schedule {name!r}: name={shape!r} must be one of {', '.join(SHAPES)}")
    if shape == "file":
        lrs = read_rates(Path(folder) / _need(name, spec, "path"))
        return Schedule(name, lrs, int(spec.get("warmup", 0)))
    steps, peak = int(_need(name, spec, "steps")), float(_need(name, spec, "peak"))
    warmup = int(spec.get("warmup", 0))
    if not 0 <= warmup < steps or peak <= 0:
        raise ValueError(
            f"schedule {name!r}: 0 <= warmup={warmup} < steps={steps}, peak={peak} > 0"
        )
    after = _after(name, shape, spec, steps, peak, warmup)
    return Schedule(name, np.concatenate([np.linspace(0, peak, warmup), after]), warmup)


def _after(name, shape, spec, steps, peak, warmup) -> np.ndarray:
    """Rates of the steps that follow the warm-up."""
    step = np.arange(warmup, steps)
    if shape == "constant":
        return np.full(len(step), peak)
    if shape == "piecewise":
        rates = np.full(len(step), peak)
        for start, rate in zip(
            _need(name, spec, "boundaries"), _need(name, spec, "rates"), strict=True
        ):
            rates[step >= start] = rate
        return rates
    final = float(_need(name, spec, "final"))
    if shape == "cosine":
        x = (step - warmup) / (steps - warmup)
        return final + 0.5 * (peak - final) * (1 + np.cos(np.pi * x))
    start = steps - int(_need(name, spec, "decay"))
    x = np.maximum(step - start, 0) / max(steps - start, 1)
    fall = spec.get("fall", "linear")
    if fall == "exponential" and final > 0:
        return peak ** (1 - x) * final**x
    if fall == "linear":
        return peak * (1 - x) + final * x
    if fall == "power":
        return final + (peak - final) * (1 - x) ** float(_need(name, spec, "power"))
    raise ValueError(
        f"schedule {name!r}: fall={fall!r} must be one of {', '.join(FALLS)}; "
        "final must be > 0 where it is exponential"
    )


def _need(name: str, spec: dict, key: str):
    if key not in spec:
        raise ValueError(f"schedule {name!r} ({spec.get('name')}) lacks {key!r}")
    return spec[key]


def read_list(path, *, setting: str = "config.fit.schedules") -> dict[str, Schedule]:
    """{curve name: Schedule} of a JSON file; relative paths in it start at its folder."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{setting}={str(path)!r}: no such JSON file")
    try:
        found = json.loads(path.read_text())
        listed = found.pop("schedules")
    except (json.JSONDecodeError, AttributeError, KeyError) as error:
        raise ValueError(f'{setting}={str(path)!r} must be JSON with "schedules"') from error
    return {name: make(name, found | spec, folder=path.parent) for name, spec in listed.items()}


def read_rates(path) -> np.ndarray:
    """[steps] learning rates of a .npy, or of the column lr of a .csv."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r}: no such schedule")
    if path.suffix == ".npy":
        lrs = np.load(path, allow_pickle=False)
    elif path.suffix == ".csv":
        table = np.atleast_1d(np.genfromtxt(path, delimiter=",", names=True))
        if "lr" not in (table.dtype.names or ()):
            raise ValueError(f"{str(path)!r} needs a column lr, it has {table.dtype.names}")
        lrs = table["lr"]
    else:
        raise ValueError(f"{str(path)!r} must end in .npy or .csv")
    lrs = np.asarray(lrs, np.float64)
    if lrs.ndim != 1 or not len(lrs) or not np.isfinite(lrs).all() or (lrs < 0).any():
        raise ValueError(f"{str(path)!r} must hold one finite learning rate >= 0 per step")
    return lrs


def write_rates(path, lrs) -> None:
    """A .csv with columns step, lr: what config.schedule.path of a training takes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{step},{lr:.17g}\n" for step, lr in enumerate(np.asarray(lrs, np.float64)))
    path.write_text("step,lr\n" + rows)


def from_log(name: str, index, rates, steps: int) -> Schedule:
    """Rates between logged ones by straight lines; the warm-up ends where they stop rising.

    index: updates (0-based) whose rate was logged. With every update logged this is exact.
    """
    lrs = np.interp(np.arange(steps), index, rates)
    rising = np.flatnonzero(np.diff(lrs) <= 1e-9 * lrs.max())
    warmup = int(rising[0]) + 1 if len(rising) else 0
    return Schedule(name, lrs, warmup if warmup > 1 else 0)
