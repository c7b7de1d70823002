"""Trend of the densest models in time: ln density = A t + B on the upper envelope.

The envelope keeps a day's best model where it beats all days before. A resample of models decides
anew which those are, so the bootstrap is one vmapped function of which models are in.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from eval.scaling import fitting

RULES = ("record", "every day", "all")  # what the line is fitted to


class Trend(NamedTuple):
    """Line through the logarithms of the envelope; days since the first day."""

    a: float  # per day
    b: float
    r2: float
    frontier: np.ndarray  # indices of the models that it goes through

    @property
    def doubling(self) -> float:
        """Days in which the density doubles."""
        return math.log(2) / self.a if self.a else math.inf


def _kept(days, logs, present, rule: str):
    """[n] bool: models, sorted by day, that the line goes through."""
    logs = jnp.where(present, logs, -jnp.inf)
    same = days[:, None] == days[None, :]
    best = jnp.max(jnp.where(same, logs[None, :], -jnp.inf), axis=1)  # of each model's day
    # One model a day, the first of equals.
    order = jnp.arange(len(days))
    top = same & (logs[None, :] == best[:, None])
    first = jnp.min(jnp.where(top, order, len(days)), axis=1)
    daily = present & (order == first)
    if rule == "all":
        return present
    if rule == "every day":
        return daily
    before = jax.lax.cummax(logs)
    earlier = jnp.where(days[None, :] < days[:, None], before[None, :], -jnp.inf).max(axis=1)
    return daily & (logs > earlier)


def _line(days, logs, present, rule: str):
    """(A, B, R^2, kept)."""
    kept = _kept(days, logs, present, rule)
    y = logs
    if rule == "every day":  # the running maximum at every release day
        top = jax.lax.cummax(jnp.where(present, logs, -jnp.inf))
        y = jnp.where(days[None, :] <= days[:, None], top[None, :], -jnp.inf).max(axis=1)
    w = kept.astype(logs.dtype)
    y = jnp.where(kept, y, 0.0)
    total = w.sum()
    x_mean, y_mean = (w * days).sum() / total, (w * y).sum() / total
    dx, dy = days - x_mean, y - y_mean
    a = (w * dx * dy).sum() / (w * dx**2).sum()
    b = y_mean - a * x_mean
    residual = (w * (y - a * days - b) ** 2).sum()
    return a, b, 1 - residual / (w * dy**2).sum(), kept


@functools.partial(jax.jit, static_argnames="rule")
def _lines(
    days: Float[Array, "n"], logs: Float[Array, "n"], present: Bool[Array, "k n"], rule: str
):
    return jax.vmap(lambda p: _line(days, logs, p, rule)[:3])(present)


def _sorted(days, densities):
    days, densities = np.asarray(days, np.float64), np.asarray(densities, np.float64)
    usable = np.isfinite(densities) & (densities > 0)
    order = np.argsort(days, kind="stable")
    order = order[usable[order]]
    if len(set(days[order])) < 2:
        raise fitting.FitError("a trend needs models of at least two different days")
    return order, days[order], np.log(densities[order])


def fit(days, densities, rule: str = "record") -> Trend:
    """The trend of models released on `days`; densities of 0 or inf are left out."""
    if rule not in RULES:
        raise ValueError(f"config.fit.envelope={rule!r}: allowed are {', '.join(RULES)}")
    order, days, logs = _sorted(days, densities)
    with fitting.float64():
        present = jnp.ones(len(days), bool)
        a, b, r2, kept = _line(jnp.asarray(days), jnp.asarray(logs), present, rule)
    return Trend(float(a), float(b), float(r2), order[np.asarray(kept)])


def bootstrap(days, densities, *, draws: int, seed: int, rule: str = "record") -> np.ndarray:
    """[kept] slopes A of resamples of models, the envelope found anew in each."""
    _, days, logs = _sorted(days, densities)
    rng, n = np.random.default_rng(seed), len(days)
    drawn = rng.integers(0, n, size=(draws, n))
    present = np.zeros((draws, n), bool)
    np.put_along_axis(present, drawn, True, axis=1)
    with fitting.float64():
        a, _, _ = _lines(jnp.asarray(days), jnp.asarray(logs), jnp.asarray(present), rule)
        a = np.asarray(a)
    return a[np.isfinite(a)]


def without_each(days, densities, groups, rule: str = "record") -> dict[str, Trend]:
    """The trend without the models of each group (family)."""
    days, densities, groups = np.asarray(days), np.asarray(densities), np.asarray(groups)
    found = {}
    for group in dict.fromkeys(groups.tolist()):
        kept = groups != group
        index = np.flatnonzero(kept)
        trend = fit(days[kept], densities[kept], rule)
        found[group] = trend._replace(frontier=index[trend.frontier])
    return found
