"""Power law with an offset, L(s) = L_inf + A s^-alpha, fitted to a loss curve.

Huber loss of the residuals in log space (Hoffmann et al. 2022, arXiv 2203.15556, section 3.3),
from a grid of starts; intervals by a moving-block bootstrap of the residuals, since neighbouring
points of one run are not independent.
"""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from eval.scaling import fitting, intervals, report
from eval.scaling.curves import read_curve, thin

HUBER_DELTA = 1e-3
STARTS = ((0.2, 0.6, 0.95), (0.1, 0.4, 0.8))  # L_inf as a share of the smallest loss; alpha
NAMES = ("log floor", "log scale", "log exponent")
BOUNDS = ((-25.0, 10.0), (-25.0, 25.0), (-5.0, 1.5))


class PowerLaw(NamedTuple):
    """Coefficients of L(s) = floor + scale * s^-exponent."""

    floor: float
    scale: float
    exponent: float

    def __call__(self, steps) -> np.ndarray:
        """Loss at `steps` (> 0)."""
        return self.floor + self.scale * np.asarray(steps, np.float64) ** -self.exponent


def _residuals(theta, log_steps, log_losses):
    predicted = jnp.logaddexp(theta[0], theta[1] - jnp.exp(theta[2]) * log_steps)
    return predicted - log_losses


def _minimise(log_steps, log_losses, starts):
    return fitting.least_squares(
        _residuals,
        starts,
        args=(log_steps, log_losses),
        names=NAMES,
        bounds=BOUNDS,
        delta=HUBER_DELTA,
        x_scale=(1.0, 1.0, 0.3),
    ).theta


def _law(theta) -> PowerLaw:
    return PowerLaw(*map(float, np.exp(theta)))


def _starts(steps, losses):
    shares = fitting.grid(*STARTS)
    floors = shares[:, 0] * losses.min()
    scales = (losses[0] - floors) * steps[0] ** shares[:, 1]
    return np.log(np.stack([floors, np.maximum(scales, 1e-9), shares[:, 1]], axis=1))


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
    fitted, start = np.log(law(steps)), np.log(np.maximum(law, 1e-9))
    residuals = np.log(losses) - fitted
    return intervals.bootstrap(
        lambda index: _law(_minimise(np.log(steps), fitted + residuals[index], [start])),
        len(steps),
        draws=draws,
        seed=seed,
        block=intervals.default_block(len(steps)),
    )


def build(config):
    """Evaluator without a model: fits config.fit.source and writes power_law.png."""
    options = config.fit

    def evaluate(model, params, *, step, rng, workdir):
        steps, losses = _points(options)
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


def _points(options):
    """Steps and losses of config.fit.source."""
    if not Path(options.source).exists():
        raise FileNotFoundError(f"config.fit.source={options.source!r}: no such metrics.jsonl")
    curve = read_curve(options.source, y=options.key)
    return curve.steps, curve.values


def _plot(path, options, steps, losses, shown, law, samples):
    grid = np.geomspace(steps[0], options.forecast * steps[-1], 200)
    band = np.quantile([PowerLaw(*s)(grid) for s in samples], (0.05, 0.95), axis=0)
    with report.figure(path) as figure:
        axes = figure.subplots()
        axes.fill_between(grid, *band, alpha=0.25, label="90 % of bootstrap fits")
        label = f"{law.floor:.3g} + {law.scale:.3g} s^-{law.exponent:.3g}"
        axes.plot(grid, law(grid), label=label)
        axes.plot(steps[:shown], losses[:shown], ".", color="black", label="fitted")
        axes.plot(steps[shown:], losses[shown:], "x", color="tab:red", label="held out")
        axes.set(xscale="log", yscale="log", xlabel="step", ylabel=options.key)
        axes.legend()
