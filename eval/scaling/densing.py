"""The Densing Law (arXiv 2412.04315): effective size, capacity density, and their trend in time.

    loss          L(N, D) = a N^-alpha + b D^-beta (+ E)
    performance   S(L)    = c / (1 + exp(-gamma (L - l))) + d,   c < 0 < gamma; d: the ceiling
    family        S(N)    = floor + c / (1 + exp(-g (ln N - l)))

Inverted: the size N^(S) that a reference would need for a score; density = N^ / N. A score that no
size reaches gives inf, one at chance 0, each with its flag; nothing raises and nothing is NaN.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from eval.scaling import fitting
from eval.scaling.fitting import Fit

OK, CEILING, CHANCE, OUTSIDE = "", "above reference ceiling", "at chance", "outside fitted range"
LOSS = ("ln a", "alpha", "ln b", "beta")
FAMILY = ("c", "g", "l")


class Effective(NamedTuple):
    """A size in the reference's unit, and what to know about it."""

    size: float
    flag: str


class TwoStep(NamedTuple):
    """The real reference: size to loss at d0 tokens, loss to score."""

    a: float
    alpha: float
    b: float
    beta: float
    c: float
    gamma: float
    l: float
    d: float
    d0: float
    e: float = 0.0  # irreducible loss; none in the paper
    losses: tuple[float, float] = (0.0, math.inf)  # seen by the fit

    @property
    def floor(self) -> float:
        """Loss that no size gets below after d0 tokens."""
        return self.b * self.d0**-self.beta + self.e

    def loss(self, n: float) -> float:
        """Loss of a size after d0 tokens."""
        return self.a * n**-self.alpha + self.floor

    def score(self, n: float) -> float:
        """Score of a size after d0 tokens."""
        return self.c / (1 + math.exp(-self.gamma * (self.loss(n) - self.l))) + self.d

    def size_of_loss(self, loss: float) -> Effective:
        """Size that reaches a loss after d0 tokens."""
        left = loss - self.floor
        if not left > 0:
            return Effective(math.inf, CEILING)
        size = _exp((math.log(self.a) - math.log(left)) / self.alpha)
        inside = self.losses[0] <= loss <= self.losses[1]
        return Effective(size, OK if inside else OUTSIDE)

    def tokens_of_loss(self, loss: float, n: float) -> Effective:
        """Tokens after which a size reaches a loss."""
        left = loss - self.a * n**-self.alpha - self.e
        if not left > 0:
            return Effective(math.inf, CEILING)
        tokens = _exp((math.log(self.b) - math.log(left)) / self.beta)
        inside = self.losses[0] <= loss <= self.losses[1]
        return Effective(tokens, OK if inside else OUTSIDE)

    def size(self, score: float) -> Effective:
        """Size that reaches a score after d0 tokens."""
        if score <= self.d + self.c:
            return Effective(0.0, CHANCE)
        if score >= self.d:
            return Effective(math.inf, CEILING)
        # c / (S - d) - 1 loses every digit near the ceiling.
        odds = math.log(score - (self.c + self.d)) - math.log(self.d - score)
        return self.size_of_loss(self.l - odds / self.gamma)


class Family(NamedTuple):
    """A reference without losses: models of one family, trained on as many tokens."""

    c: float
    g: float
    l: float
    floor: float
    margins: tuple[float, float] = (0.01, 0.001)  # to chance and ceiling: no size is read there
    scores: tuple[float, float] = (-math.inf, math.inf)  # seen by the fit

    def score(self, n: float) -> float:
        """Score of a size."""
        return self.floor + self.c / (1 + math.exp(-self.g * (math.log(n) - self.l)))

    def size(self, score: float) -> Effective:
        """Size that reaches a score."""
        gain = score - self.floor
        if gain <= self.margins[0]:
            return Effective(0.0, CHANCE)
        if gain >= self.c - self.margins[1]:
            return Effective(math.inf, CEILING)
        size = _exp(self.l + (math.log(gain) - math.log(self.c - gain)) / self.g)
        inside = self.scores[0] <= score <= self.scores[1]
        return Effective(size, OK if inside else OUTSIDE)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709.0 else math.inf


def density(reference, score: float, n: float) -> Effective:
    """Effective size over real size `n` (in the reference's unit)."""
    size, flag = reference.size(score)
    return Effective(size / n, flag)


def loss_law(
    theta: Float[Array, "4"], n: Float[Array, "*s"], d: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """L(N, D) from (ln a, alpha, ln b, beta); the paper's, without an irreducible term."""
    return jnp.exp(theta[0] - theta[1] * jnp.log(n)) + jnp.exp(theta[2] - theta[3] * jnp.log(d))


def _loss_residuals(theta, n, d, y):
    return jnp.log(loss_law(theta, n, d)) - jnp.log(y)


def fit_loss(n, d, y) -> Fit:
    """Least squares of log losses over runs, from a grid of exponents; scaled parameters."""
    n, d, y = (np.asarray(x, np.float64) for x in (n, d, y))
    starts = []
    for alpha, beta, share in fitting.grid((0.1, 0.3, 0.5), (0.1, 0.3, 0.5), (0.3, 0.7)):
        first = math.log(share * y.mean()) + alpha * np.log(n).mean()
        second = math.log((1 - share) * y.mean()) + beta * np.log(d).mean()
        starts.append((first, alpha, second, beta))
    bounds = [(None, None), (1e-6, 5.0)] * 2
    exact = dict(xtol=1e-15, ftol=1e-15, gtol=1e-15, x_scale="jac")
    return fitting.least_squares(
        _loss_residuals, starts, args=(n, d, y), names=LOSS, bounds=bounds, **exact
    )


def family_law(theta: Float[Array, "3"], log_n: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """What a family's score gains over its floor, from (c, g, l)."""
    return theta[0] * jax.nn.sigmoid(theta[1] * (log_n - theta[2]))


def fit_family(n, score, floor: float) -> tuple[Family, Fit]:
    """Least squares of the scores of one family's sizes."""
    log_n, score = np.log(np.asarray(n, np.float64)), np.asarray(score, np.float64)
    if len(score) < 4:
        raise fitting.FitError(f"a reference family needs at least 4 sizes, got {len(score)}")
    starts = fitting.grid((0.6,), (0.5, 1.2), np.quantile(log_n, (0.25, 0.5, 0.75)))
    bounds = [(0.0, 1.0), (0.0, None), (None, None)]
    exact = dict(xtol=1e-14, ftol=1e-14, gtol=1e-14)
    fit = fitting.curve_fit(
        family_law, log_n, score - floor, starts, names=FAMILY, bounds=bounds, **exact
    )
    seen = (float(score.min()), float(score.max()))
    return Family(*map(float, fit.theta), floor, scores=seen), fit


def ladder_reference(loss: Fit, score: Fit, d0: float, losses=(0.0, math.inf)) -> TwoStep:
    """Both steps of a ladder (eval/scaling/ladder_laws.py) as a reference at d0 tokens."""
    a, b, alpha, beta, e = map(float, loss.theta)
    c, middle, gamma, d = map(float, score.theta)
    return TwoStep(math.exp(a), alpha, math.exp(b), beta, c, gamma, middle, d, d0, e, losses)
