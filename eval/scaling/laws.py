"""Laws of the loss curve: learning rates of every step -> loss at every step.

MULTI_POWER (arXiv 2503.12811): L0 + A S1(t)^-alpha - B sum_k (lr[k-1] - lr[k]) G(lr[k]^-gamma S_k)
with G(x) = 1 - (1 + C x)^-beta, S1 the sum of all rates up to t, S_k from k to t (both included).
MOMENTUM (arXiv 2408.11029): L0 + A S1^-alpha - C S2, S2 the sum of momenta of the rate's drops.
CHINCHILLA: L0 + A t^-alpha, which knows the step and nothing of the schedule.

Each is a Law: `features` turns a schedule and the observed steps into arrays once, `predict` is a
pure jax function of parameters and features. Whether drops are counted from step 1 on, the rise of
the warm-up included (form "code", what the authors' code computes), or from the warm-up's end
("paper") moves L0 by about B times the peak and hardly anything else.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy.signal import lfilter

from eval.common import jitted
from eval.scaling import fitting
from eval.scaling.lr_schedules import Schedule

HUBER_DELTA = 1e-3
LEAST_RATE = 1e-10
FORMS = ("code", "paper")


class Observed(NamedTuple):
    """Losses of one run at updates `index` (0-based) of its schedule."""

    name: str
    schedule: Schedule
    index: np.ndarray  # [n] int
    losses: np.ndarray  # [n]


class Options(NamedTuple):
    """Choices that are no parameters."""

    form: str = "code"  # multi-power: code | paper
    merge: int = 1  # multi-power: neighbouring drops summed up; 1 is exact
    decay: float = 0.999  # momentum: lambda
    least_beta: float = 0.5  # multi-power: beta and B are degenerate below
    most_gamma: float = 1.0  # multi-power: at 1 a drop acts within a number of steps, at any rate


class Law(NamedTuple):
    """One law; parameters are all >= 0 and fitted in logarithms."""

    name: str
    names: tuple[str, ...]
    features: Callable  # (schedule, index, options) -> tuple of arrays
    predict: Callable  # (theta [p], features) -> [n]
    bounds: Callable  # (options) -> ((low, high), ...) per parameter
    starts: Callable  # ([Observed], options) -> [s, p]


def _multi_power_features(schedule: Schedule, index, options: Options):
    """(cum [n], before [k], log_rate [k], gap [k]): drops with their weights, merged or not."""
    lrs, index = schedule.lrs, np.asarray(index)
    cum = np.cumsum(lrs)
    first = 1 if options.form == "code" else max(schedule.warmup, 1)
    k = np.arange(first, int(index.max()) + 1)
    gap = lrs[k] - lrs[k - 1]
    kept = gap != 0
    k, gap = k[kept], gap[kept]
    parts = (cum[k - 1], np.log(np.maximum(lrs[k], LEAST_RATE)), gap)
    return (cum[index], *_merged(*parts, options.merge))


def _merged(before, log_rate, gap, size: int):
    """Runs of up to `size` neighbouring drops of one sign as one, at their weighted means."""
    if size <= 1 or len(gap) < 2:
        return before, log_rate, gap
    turn = np.flatnonzero(np.diff(np.sign(gap)) != 0) + 1
    edges = np.concatenate([np.arange(a, b, size) for a, b in zip([0, *turn], [*turn, len(gap)])])
    total = np.add.reduceat(gap, edges)
    mean = lambda x: np.add.reduceat(x * gap, edges) / total  # noqa: E731
    return mean(before), mean(log_rate), total


def saturation(x, beta):
    """G: 1 - (1 + x)^-beta, exact for small x."""
    return -jnp.expm1(-beta * jnp.log1p(x))


def _multi_power(theta, features):
    floor, scale, alpha, drop, speed, beta, gamma = theta
    cum, before, log_rate, gap = features
    since = jnp.maximum(cum[:, None] - before, 0.0)  # drops still to come: G(0) = 0
    effect = saturation(speed * jnp.exp(-gamma * log_rate) * since, beta) @ gap
    return floor + scale * cum**-alpha + drop * effect


def _multi_power_bounds(options: Options):
    free, beta, gamma = (1e-9, 1e9), (options.least_beta, 10.0), (1e-3, options.most_gamma)
    return ((1e-3, 1e3), free, (1e-3, 5.0), free, (1e-6, 1e6), beta, gamma)


def _multi_power_starts(observed, options):
    """A grid in quantities without a unit: floor, loss moved by the drop, steps it takes."""
    peak = max(o.schedule.peak for o in observed)
    rows = []
    for floor, scale, alpha in _power_starts(observed):
        drop = 0.1 * min(o.losses.min() for o in observed) / peak
        for steps in (10.0, 100.0):
            speed = 1 / (peak**0.5 * steps)  # C lr^-gamma (lr steps) = 1 at gamma 1/2
            rows.append((floor, scale, alpha, drop, speed, max(options.least_beta, 0.5), 0.5))
    return np.array(rows)


def _power_starts(observed, x=lambda o: np.cumsum(o.schedule.lrs)[o.index]):
    """(L0, A, alpha) through the first loss, for two floors."""
    least = min(o.losses.min() for o in observed)
    for share in (0.7, 0.92):
        floor = share * least
        ends = [(x(o)[0], o.losses[0] - floor) for o in observed]
        at, above = max(ends, key=lambda e: e[1])
        yield floor, max(above, 1e-3) * at**0.5, 0.5


def _momentum_features(schedule: Schedule, index, options: Options):
    """(S1 [n], S2 [n]); the warm-up counts as the peak, so that it earns no credit."""
    lrs = schedule.lrs.copy()
    cum = np.cumsum(lrs)
    lrs[: schedule.warmup] = schedule.peak
    drops = np.concatenate([[0.0], lrs[:-1] - lrs[1:]])
    momentum = lfilter([1.0], [1.0, -options.decay], drops)
    return cum[index], np.cumsum(momentum)[index]


def _momentum(theta, features):
    floor, scale, alpha, drop = theta
    cum, momentum = features
    return floor + scale * cum**-alpha - drop * momentum


def _momentum_bounds(options):
    return ((1e-3, 1e3), (1e-9, 1e9), (1e-3, 5.0), (1e-9, 1e9))


def _momentum_starts(observed, options):
    peak = max(o.schedule.peak for o in observed)
    reach = peak / (1 - options.decay)  # S2 long after a drop from the peak
    least = min(o.losses.min() for o in observed)
    return np.array(
        [(*p, share * least / reach) for p in _power_starts(observed) for share in (0.01, 0.1)]
    )


def _steps(schedule, index, options):
    return (np.asarray(index, np.float64) + 1.0,)


def _chinchilla(theta, features):
    floor, scale, alpha = theta
    return floor + scale * features[0] ** -alpha


MULTI_POWER = Law(
    "multi-power",
    ("L0", "A", "alpha", "B", "C", "beta", "gamma"),
    _multi_power_features,
    _multi_power,
    _multi_power_bounds,
    _multi_power_starts,
)
MOMENTUM = Law(
    "momentum",
    ("L0", "A", "alpha", "C"),
    _momentum_features,
    _momentum,
    _momentum_bounds,
    _momentum_starts,
)
CHINCHILLA = Law(
    "chinchilla",
    ("L0", "A", "alpha"),
    _steps,
    _chinchilla,
    lambda options: _momentum_bounds(options)[:3],
    lambda observed, options: np.array(list(_power_starts(observed, lambda o: o.index + 1.0))),
)
LAWS = {law.name: law for law in (MULTI_POWER, MOMENTUM, CHINCHILLA)}


def huber_sum(law: Law, theta, features, log_losses, weights):
    """Sum over curves and points of weight * Huber(ln predicted - ln observed)."""
    total = 0.0
    for f, y, w in zip(features, log_losses, weights):
        predicted = jnp.maximum(law.predict(theta, f), 1e-10)
        total += (w * fitting.huber(jnp.log(predicted) - y, HUBER_DELTA)).sum()
    return total


def _in_logs(law: Law) -> Callable:
    return lambda log_theta, *args: huber_sum(law, jnp.exp(log_theta), *args)


_OBJECTIVES = {law.name: _in_logs(law) for law in LAWS.values()}


def objective_args(law: Law, observed: Sequence[Observed], options: Options, weights=None):
    """What `_OBJECTIVES[law.name]` takes after the parameters; weights: one number per curve."""
    features = tuple(law.features(o.schedule, o.index, options) for o in observed)
    log_losses = tuple(np.log(o.losses) for o in observed)
    weights = [1.0] * len(observed) if weights is None else weights
    return features, log_losses, tuple(np.float64(w) for w in weights)


def objective(law: Law, theta, observed: Sequence[Observed], options: Options) -> float:
    """The training objective at natural parameters."""
    with fitting.float64():
        args = objective_args(law, observed, options)
        return float(_OBJECTIVES[law.name](jnp.log(jnp.asarray(theta)), *args))


def fit(
    law: Law,
    observed: Sequence[Observed],
    options: Options = Options(),  # noqa: B008 - a tuple of constants
    *,
    starts=None,
    weights=None,
    coarse: int = 100,
    fine: int = 1000,
) -> fitting.Fit:
    """Least Huber sum over curves of points: many starts with the drops of a schedule merged into
    about `coarse` ones, then the best of them with `fine` (merging errors fall with the square).
    weights (one per curve; 0 leaves it out) keep the compiled function.
    """
    longest = max(len(o.schedule.lrs) for o in observed)
    if starts is None:
        kept = [o for o, w in zip(observed, weights or [1.0] * len(observed)) if w]
        starts = law.starts(kept, options)
    bounds = [tuple(np.log(b)) for b in law.bounds(options)]
    low, high = np.array(bounds).T
    log_starts = np.clip(np.log(np.atleast_2d(starts)), low, high)

    def minimise(at, parts):
        merged = options._replace(merge=max(1, longest // parts))
        args = objective_args(law, observed, merged, weights)
        return fitting.minimise(
            _OBJECTIVES[law.name], at, args=args, names=law.names, bounds=bounds, gtol=1e-9
        )

    found = minimise(log_starts, coarse)
    if law is MULTI_POWER and fine != coarse:
        polished = minimise(found.theta, fine)
        found = polished._replace(agreeing=found.agreeing, starts=found.starts)
    return found._replace(theta=np.exp(found.theta))


def predict(
    law: Law,
    theta,
    schedule: Schedule,
    index,
    options: Options = Options(),  # noqa: B008
    chunk: int = 2**22,
) -> np.ndarray:
    """[n] losses at updates `index`, float64; exact unless options.merge says otherwise."""
    index = np.asarray(index)
    features = law.features(schedule, index, options)
    sized = max(1, chunk // max(len(features[-1]), 1)) if law is MULTI_POWER else len(index)
    with fitting.float64():
        run = jitted(law.predict)
        theta = jnp.asarray(theta, jnp.float64)
        if law is not MULTI_POWER:
            return np.asarray(run(theta, features))
        cum, *drops = features
        padded = np.concatenate([cum, np.repeat(cum[-1:], -len(cum) % min(sized, len(cum)))])
        parts = padded.reshape(-1, min(sized, len(cum)))
        found = [np.asarray(run(theta, (part, *drops))) for part in parts]
    return np.concatenate(found)[: len(index)]


def final_loss(theta, rates, *, peak, before: float):
    """Multi-power law at the end of `rates` (the steps after the warm-up), form "paper".

    Differentiable in rates and theta, O(len(rates)): only the last step's sums are needed.
    rates [n] any float dtype; peak: the rate before rates[0]; before: sum of the warm-up's rates.
    """
    floor, scale, alpha, drop, speed, beta, gamma = theta
    rates = jnp.asarray(rates)
    since = jnp.cumsum(rates[::-1])[::-1]
    total = since[0] + before
    drops = jnp.concatenate([jnp.asarray([peak], rates.dtype), rates[:-1]]) - rates
    log_rate = jnp.log(jnp.maximum(rates, LEAST_RATE))
    effect = saturation(speed * jnp.exp(-gamma * log_rate) * since, beta) @ drops
    return floor + scale * total**-alpha - drop * effect


def curve(theta, rates, index, *, first: int = 1):
    """Multi-power law at updates `index` of all `rates` [n], differentiable in both.

    first: drops before this update do not count (1: form "code"; the warm-up: form "paper").
    """
    rates = jnp.asarray(rates)
    cum = jnp.cumsum(rates)
    k = jnp.arange(first, rates.shape[0])
    log_rate = jnp.log(jnp.maximum(rates[k], LEAST_RATE))
    return _multi_power(theta, (cum[index], cum[k - 1], log_rate, rates[k] - rates[k - 1]))


def scores(predicted, losses) -> dict[str, float]:
    """MAE, RMSE, PredE (mean relative error), WorstE (largest) and R2 of one curve."""
    error = np.asarray(predicted) - losses
    spread = ((losses - losses.mean()) ** 2).sum()
    return dict(
        MAE=float(np.abs(error).mean()),
        RMSE=float(np.sqrt((error**2).mean())),
        PredE=float((np.abs(error) / losses).mean()),
        WorstE=float((np.abs(error) / losses).max()),
        R2=float(1 - (error**2).sum() / spread) if spread > 0 else float("nan"),
    )


def mean_scores(rows: Sequence[dict]) -> dict[str, float]:
    """The average over curves of every score."""
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
