"""Power law with an offset, L(s) = L_inf + A s^-alpha, fitted to a loss curve.

Huber loss of the residuals in log space (Hoffmann et al. 2022, arXiv 2203.15556, section 3.3),
from a grid of starts; intervals by a moving-block bootstrap of the residuals, since neighbouring
points of one run are not independent.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from eval import common

HUBER_DELTA = 1e-3
STARTS = ((0.2, 0.6, 0.95), (0.1, 0.4, 0.8))  # L_inf as a share of the smallest loss; alpha


class PowerLaw(NamedTuple):
    """Coefficients of L(s) = floor + scale * s^-exponent."""

    floor: float
    scale: float
    exponent: float

    def __call__(self, steps) -> np.ndarray:
        """Loss at `steps` (> 0)."""
        return self.floor + self.scale * np.asarray(steps, np.float64) ** -self.exponent


def _residuals(theta, log_steps, log_losses):
    predicted = np.logaddexp(theta[0], theta[1] - np.exp(theta[2]) * log_steps)
    return predicted - log_losses


def _minimise(log_steps, log_losses, starts):
    best = None
    for start in starts:
        fit = least_squares(
            _residuals,
            start,
            loss="huber",
            f_scale=HUBER_DELTA,
            x_scale=(1.0, 1.0, 0.3),
            bounds=((-25.0, -25.0, -5.0), (10.0, 25.0, 1.5)),
            args=(log_steps, log_losses),
        )
        if best is None or fit.cost < best.cost:
            best = fit
    return best.x


def _law(theta) -> PowerLaw:
    return PowerLaw(float(np.exp(theta[0])), float(np.exp(theta[1])), float(np.exp(theta[2])))


def _starts(steps, losses):
    for share, exponent in itertools.product(*STARTS):
        floor = share * losses.min()
        scale = (losses[0] - floor) * steps[0] ** exponent
        yield np.log([floor, max(scale, 1e-9), exponent])


def fit(steps, losses) -> PowerLaw:
    """Least Huber residuals in log space over points (steps > 0, losses > 0)."""
    steps, losses = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    if len(steps) < 4 or (steps <= 0).any() or not (losses > 0).all():
        raise ValueError(
            f"a power law needs at least 4 points with positive steps and losses, got {len(steps)}"
        )
    return _law(_minimise(np.log(steps), np.log(losses), _starts(steps, losses)))


def bootstrap(steps, losses, law: PowerLaw, *, draws: int, seed: int) -> np.ndarray:
    """[draws, 3] coefficients refitted to the law plus resampled blocks of residuals."""
    steps, losses = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    rng, fitted = np.random.default_rng(seed), np.log(law(steps))
    residuals = np.log(losses) - fitted
    n = len(steps)
    block = max(1, round(n ** (1 / 3)))
    start = np.log(np.maximum(law, 1e-9))
    samples = []
    for _ in range(draws):
        first = rng.integers(0, n - block + 1, size=-(-n // block))
        index = (first[:, None] + np.arange(block)).reshape(-1)[:n]
        samples.append(_law(_minimise(np.log(steps), fitted + residuals[index], [start])))
    return np.array(samples)


def read_curve(path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric of a metrics.jsonl file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config.fit.source={str(path)!r}: no such metrics.jsonl")
    rows = common.read_rows(path)
    points = [(row["step"], row[key]) for row in rows if key in row]
    if not points:
        known = sorted({k for row in rows for k in row if k != "step"})
        raise ValueError(f"config.fit.key={key!r}: {path} has only {', '.join(known)}")
    steps, values = zip(*points)
    return np.array(steps, np.float64), np.array(values, np.float64)


def thin(steps, values, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most `points` bins, equal in log step: late steps do not outvote early ones."""
    if len(steps) <= points:
        return steps, values
    edges = np.geomspace(steps[0], steps[-1], points + 1)
    index = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, points - 1)
    full = np.unique(index)
    return tuple(np.array([x[index == i].mean() for i in full]) for x in (steps, values))


def build(config):
    """Evaluator without a model: fits config.fit.source and writes power_law.png."""
    options = config.fit

    def evaluate(model, params, *, step, rng, workdir):
        steps, losses = read_curve(options.source, options.key)
        kept = steps >= max(options.skip, 1)
        if kept.sum() < 8:
            raise ValueError(
                f"config.fit.skip={options.skip}: {int(kept.sum())} points are left, need 8"
            )
        steps, losses = thin(steps[kept], losses[kept], options.points)
        shown = max(4, int(len(steps) * (1.0 - options.held_out)))
        law = fit(steps[:shown], losses[:shown])
        samples = bootstrap(
            steps[:shown], losses[:shown], law, draws=options.bootstrap, seed=config.seed
        )
        metrics = dict(zip(("floor", "scale", "exponent"), law), points=float(shown))
        for name, column in zip(PowerLaw._fields, samples.T):
            metrics[f"{name}_low"], metrics[f"{name}_high"] = np.quantile(column, (0.05, 0.95))
        error = np.abs(law(steps) / losses - 1.0)
        metrics["fit_error"] = error[:shown].mean()
        if shown < len(steps):
            metrics["held_out_error"] = error[shown:].mean()
        metrics["forecast_step"] = options.forecast * steps[-1]
        forecasts = [PowerLaw(*sample)(metrics["forecast_step"]) for sample in samples]
        metrics["forecast"] = law(metrics["forecast_step"])
        metrics["forecast_low"], metrics["forecast_high"] = np.quantile(forecasts, (0.05, 0.95))
        _plot(Path(workdir) / "power_law.png", options, steps, losses, shown, law, samples)
        return {name: float(value) for name, value in metrics.items()}

    return evaluate


def _plot(path, options, steps, losses, shown, law, samples):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    grid = np.geomspace(steps[0], options.forecast * steps[-1], 200)
    band = np.quantile([PowerLaw(*s)(grid) for s in samples], (0.05, 0.95), axis=0)
    axes.fill_between(grid, *band, alpha=0.25, label="90 % of bootstrap fits")
    axes.plot(grid, law(grid), label=f"{law.floor:.3g} + {law.scale:.3g} s^-{law.exponent:.3g}")
    axes.plot(steps[:shown], losses[:shown], ".", color="black", label="fitted")
    axes.plot(steps[shown:], losses[shown:], "x", color="tab:red", label="held out")
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel=options.key)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
