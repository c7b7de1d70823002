"""The laws of model ladders (arXiv 2412.04403; start values and bounds of allenai/OLMo-ladder).

    step 1        L(N, D) = exp(a - alpha ln N) + exp(b - beta ln D) + E
    FLOPs         L(C)    = exp(a - alpha ln C) + E
    step 2        S(L)    = a / (1 + exp(-k (L - L0))) + b,   a < 0
    single step   S(N, D) = p / (1 + exp(-L(N, D))) + q,      p < 0

N: parameters without the input embedding, D: tokens, C: FLOPs, L: bits per byte (or any loss).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from eval.scaling import fitting
from eval.scaling.fitting import Fit

DELTA = 1e-3  # of the Huber loss: nearly every point is in its linear part
# The minimum has kinks; a looser end stops before it.
EXACT = dict(ftol=0.0, gtol=1e-10, maxiter=1_000_000, maxfun=1_000_000)
STEP_1 = ("a", "b", "alpha", "beta", "E")
FLOPS = ("a", "alpha", "E")
STEP_2 = ("a", "L0", "k", "b")
SINGLE = ("a", "b", "alpha", "beta", "E", "p", "q")
PUBLISHED_START = (3.0, 6.0, 0.1, 0.2, 1.0)
# The first finds the published minima; from it alone other ladders end in far worse ones.
STARTS = (PUBLISHED_START, (6.0, 6.0, 0.3, 0.3, 0.5), (10.0, 4.0, 0.6, 0.2, 0.5))
IDEAL = (0.0, 1.0)  # no loss, all right: one point that identifies the ceiling b
FLOOR = 1e-6  # least score of the single step


def loss_law(
    theta: Float[Array, "5"], n: Float[Array, "*s"], d: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """Step 1."""
    a, b, alpha, beta, e = theta
    return jnp.exp(a - alpha * jnp.log(n)) + jnp.exp(b - beta * jnp.log(d)) + e


def flops_law(theta: Float[Array, "3"], c: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Step 1 on the compute alone."""
    a, alpha, e = theta
    return jnp.exp(a - alpha * jnp.log(c)) + e


def score_law(theta: Float[Array, "4"], loss: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Step 2."""
    a, middle, k, b = theta
    return a * jax.nn.sigmoid(k * (loss - middle)) + b


def single_law(
    theta: Float[Array, "7"], n: Float[Array, "*s"], d: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """Both in one."""
    return jnp.maximum(theta[5] * jax.nn.sigmoid(loss_law(theta[:5], n, d)) + theta[6], FLOOR)


def _huber_sum(predicted, y, weights):
    return (weights * fitting.huber(jnp.log(predicted) - jnp.log(y), DELTA)).sum()


def _step_1_cost(theta, n, d, y, weights):
    return _huber_sum(loss_law(theta, n, d), y, weights)


def _flops_cost(theta, c, y, weights):
    return _huber_sum(flops_law(theta, c), y, weights)


def _single_cost(theta, n, d, y, weights):
    return _huber_sum(single_law(theta, n, d), y, weights)


def _step_2_residuals(theta, loss, score, weights):
    return weights * (score_law(theta, loss) - score)


def fit_loss(n, d, y, weights=None, starts=STARTS) -> Fit:
    """Step 1 on one point a run; points of weight 0 are left out (refits do not compile again)."""
    if len(y) < len(STEP_1):
        raise fitting.FitError(f"step 1 has 5 parameters and {len(y)} runs")
    weights = np.ones(len(y)) if weights is None else weights
    bounds = [(0.0, None)] * len(STEP_1)
    return fitting.minimise(
        _step_1_cost, starts, args=(n, d, y, weights), names=STEP_1, bounds=bounds, **EXACT
    )


def fit_flops(c, y, weights=None) -> Fit:
    """The FLOPs variant of step 1."""
    weights = np.ones(len(y)) if weights is None else weights
    bounds = [(0.0, None), (0.0, 1.0), (0.0, None)]
    return fitting.minimise(
        _flops_cost, (3.0, 0.1, 1.0), args=(c, y, weights), names=FLOPS, bounds=bounds, **EXACT
    )


def fit_score(loss, score, chance: float, weights=None) -> Fit:
    """Step 2 on every checkpoint and the ideal point."""
    weights = np.ones(len(loss)) if weights is None else weights
    loss, score = np.append(loss, IDEAL[0]), np.append(score, IDEAL[1])
    bounds = [(-1.0, 0.0), (0.0, None), (0.0, None), (0.0, 1.0)]
    return fitting.least_squares(
        _step_2_residuals,
        (chance - 1.0, 0.9, 3.0, 1.0),
        args=(loss, score, np.append(weights, 1.0)),
        names=STEP_2,
        bounds=bounds,
    )


def fit_single(n, d, score, chance: float) -> Fit:
    """The single step on one score a run."""
    bounds = [(0.0, None)] * 4 + [(None, None), (-1.0, 0.0), (0.0, 1.0)]
    start = (3.0, 5.0, 0.2, 0.3, 0.0, chance - 1.0, 1.0)
    weights = np.ones(len(score))
    return fitting.minimise(
        _single_cost, start, args=(n, d, score, weights), names=SINGLE, bounds=bounds, **EXACT
    )


def evaluate(law, fit: Fit, *x) -> np.ndarray:
    """law(fit.theta, *x) in float64 on the host."""
    with fitting.float64():
        return np.asarray(law(jnp.asarray(fit.theta), *map(jnp.asarray, map(np.float64, x))))
