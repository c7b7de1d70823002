"""Error bars of fitted laws: bootstrap (points, blocks, groups) and leave-one-group-out.

Everything here takes `refit`, a function of chosen indices, so that any law and any statistic can
have an interval: refit(index) -> array of numbers, e.g. fitted coefficients or a forecast.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from eval.scaling.fitting import FitError


class Interval(NamedTuple):
    """An estimate with its interval at `level`; arrays or floats alike."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float


class Jackknife(NamedTuple):
    """Leave-one-group-out estimates and what they say."""

    groups: tuple
    estimates: np.ndarray  # [groups, ...] without each group
    standard_error: np.ndarray  # [...]

    def interval(self, value, level: float = 0.9) -> Interval:
        """value -+ the normal quantile times the standard error."""
        reach = stats.norm.ppf(0.5 + level / 2) * self.standard_error
        return Interval(np.asarray(value), value - reach, value + reach, level)


def blocks(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """[count] indices of a moving-block resample: neighbours in one curve are not independent."""
    size = max(1, min(size, count))
    first = rng.integers(0, count - size + 1, size=-(-count // size))
    return (first[:, None] + np.arange(size)).reshape(-1)[:count]


def default_block(count: int) -> int:
    """The usual block length for `count` neighbouring points."""
    return max(1, round(count ** (1 / 3)))


def members(rng: np.random.Generator, groups: Sequence[Hashable]) -> np.ndarray:
    """Indices of a resample of whole groups with replacement (runs, curves, models)."""
    groups = np.asarray(groups)
    names = np.unique(groups)
    drawn = rng.choice(names, size=len(names))
    return np.concatenate([np.flatnonzero(groups == name) for name in drawn])


def bootstrap(
    refit: Callable[[np.ndarray], np.ndarray],
    count: int,
    *,
    draws: int,
    seed: int,
    groups: Sequence[Hashable] | None = None,
    block: int = 1,
) -> np.ndarray:
    """[kept, ...] refit(index) over resamples of 0..count-1: points, blocks, or whole groups.

    Resamples on which the fit fails are left out; more than half failing is an error.
    """
    rng, samples, failed = np.random.default_rng(seed), [], 0
    for _ in range(draws):
        index = blocks(rng, count, block) if groups is None else members(rng, groups)
        try:
            samples.append(np.asarray(refit(index), np.float64))
        except FitError as error:
            failed, last = failed + 1, error
    if 2 * failed > draws:
        raise FitError(f"{failed} of {draws} bootstrap refits failed, the last: {last}")
    return np.array(samples)


def interval(value, samples: np.ndarray, level: float = 0.9) -> Interval:
    """Percentile interval of samples [draws, ...] around `value`."""
    low, high = np.nanquantile(samples, (0.5 - level / 2, 0.5 + level / 2), axis=0)
    return Interval(np.asarray(value), low, high, level)


def jackknife(refit: Callable[[np.ndarray], np.ndarray], groups: Sequence[Hashable]) -> Jackknife:
    """refit(index of all points but one group's), for each group in order of appearance.

    Standard error: sqrt((n - 1) / n * sum of squared deviations from the mean of the estimates).
    """
    names = tuple(dict.fromkeys(groups))
    groups = np.asarray(groups)
    if len(names) < 2:
        raise FitError(f"leave-one-out needs at least 2 groups, got {len(names)}")
    estimates = np.array(
        [np.asarray(refit(np.flatnonzero(groups != name)), np.float64) for name in names]
    )
    n = len(names)
    error = np.sqrt((n - 1) / n * ((estimates - estimates.mean(0)) ** 2).sum(0))
    return Jackknife(names, estimates, error)
