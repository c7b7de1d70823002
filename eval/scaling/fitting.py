"""Robust fits of parametric laws: many starts, bounds, float64, gradients by jax.

Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3) fit Huber losses of residuals in log space by
L-BFGS from a grid of starts; the other laws here do the same with their own forms. Forms are pure
functions of a parameter vector written with jax.numpy, so that their derivatives are exact.

A fit that did not converge raises FitError. A parameter that ends at its bound does not (some laws
are meant to: OLMo's E = 0), but the Fit says so in `problems`, and every report prints them.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from eval.common import jitted

AT_BOUND = 1e-6  # distance to a bound, of the bound's or the parameter's size, that counts as there
SAME_COST = 1e-4  # relative difference of costs of starts that found the same minimum


class FitError(ValueError):
    """A fit that must not be used: no start converged, or nothing finite was found."""


class Fit(NamedTuple):
    """The best of all starts."""

    theta: np.ndarray  # [p] float64
    cost: float
    names: tuple[str, ...]
    at_bound: tuple[str, ...]  # parameters that ended at a bound
    agreeing: int  # starts that ended at this cost, to SAME_COST
    starts: int
    message: str  # the optimiser's own word

    @property
    def values(self) -> dict[str, float]:
        """{name: value}."""
        return dict(zip(self.names, map(float, self.theta)))

    @property
    def problems(self) -> tuple[str, ...]:
        """What a reader of the result must know, one sentence each; () where all is well."""
        found = [f"{name} = {self.values[name]:.4g} is at its bound" for name in self.at_bound]
        if self.starts > 2 and self.agreeing == 1:
            found.append(f"only 1 of {self.starts} starts found the best cost {self.cost:.4g}")
        return tuple(found)


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Within it jax computes in float64; outside, models keep float32."""
    with jax.enable_x64(True):
        yield


def huber(residual, delta: float):
    """r^2 / 2 up to delta, then delta * (|r| - delta / 2); elementwise."""
    size = jnp.abs(residual)
    return jnp.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def grid(*axes: Iterable[float]) -> np.ndarray:
    """[n, p] every combination of one value per axis: starts of a fit."""
    return np.array(list(itertools.product(*axes)), np.float64)


def minimise(
    loss: Callable,
    starts,
    *,
    args: tuple = (),
    names: Sequence[str] = (),
    bounds: Sequence[tuple[float | None, float | None]] | None = None,
    jac: str = "jax",
    **options,
) -> Fit:
    """L-BFGS-B on loss(theta, *args) -> scalar from every start [n, p]; keeps the least.

    Arrays in `args` are inputs of one compiled function, so refits of the same shapes do not
    compile again (keep `loss` the same object). jac="self": loss returns (value, gradient) itself
    and is called with numpy. `options` go to scipy (ftol, gtol, maxiter, maxls, ...).
    """
    starts = _starts(starts)
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000, "maxfun": 100_000} | options
    found = []
    with float64():
        args = tuple(jax.tree.map(jnp.asarray, a) for a in args) if jac == "jax" else args
        function = _value_and_grad(loss) if jac == "jax" else loss

        def objective(theta):
            value, gradient = function(theta, *args)
            return float(value), np.asarray(gradient, np.float64)

        for start in starts:
            low_high = bounds or [(None, None)] * len(start)
            out = scipy.optimize.minimize(
                objective, start, jac=True, method="L-BFGS-B", bounds=low_high, options=options
            )
            # A stalled line search (status 2) is how L-BFGS ends at the kink of a Huber minimum;
            # one that stalls where it began has found nothing.
            converged = out.status == 0 or (out.status == 2 and out.nit > 0)
            found.append((float(out.fun), out.x, converged, str(out.message)))
    return _best(found, names, bounds)


def least_squares(
    residuals: Callable,
    starts,
    *,
    args: tuple = (),
    names: Sequence[str] = (),
    bounds: Sequence[tuple[float | None, float | None]] | None = None,
    delta: float | None = None,
    **options,
) -> Fit:
    """Trust-region least squares of residuals(theta, *args) -> [n] from every start; as `minimise`.

    delta: Huber's, None for plain squares. This is what scipy's curve_fit runs with bounds. `cost`
    is half the sum of squares (of the Huber losses). `options` go to scipy.
    """
    starts = _starts(starts)
    found = []
    with float64():
        args = tuple(jax.tree.map(jnp.asarray, a) for a in args)
        function, jacobian = jitted(residuals), _jacobian(residuals)
        low_high = (-np.inf, np.inf)
        if bounds is not None:
            low_high = (
                [-np.inf if low is None else low for low, _ in bounds],
                [np.inf if high is None else high for _, high in bounds],
            )
        if delta is not None:
            options = {"loss": "huber", "f_scale": delta} | options
        for start in starts:
            out = scipy.optimize.least_squares(
                lambda theta: np.asarray(function(theta, *args)),
                start,
                jac=lambda theta: np.asarray(jacobian(theta, *args)),
                bounds=low_high,
                **options,
            )
            found.append((float(out.cost), out.x, out.status > 0, str(out.message)))
    return _best(found, names, bounds)


def curve_fit(form: Callable, x, y, starts, **options) -> Fit:
    """Least squares of form(theta, x) - y by `least_squares`; x is an array or a tuple of them."""
    return least_squares(_against(form), starts, args=(x, y), **options)


def _starts(starts) -> np.ndarray:
    return np.atleast_2d(np.asarray(starts, np.float64))


def _best(found, names, bounds) -> Fit:
    usable = [f for f in found if f[2] and np.isfinite(f[0]) and np.isfinite(f[1]).all()]
    if not usable:
        words = sorted({f[3] for f in found})
        raise FitError(f"none of {len(found)} starts converged: {'; '.join(words)}")
    cost, theta, _, message = min(usable, key=lambda f: f[0])
    names = tuple(names) or tuple(f"p{i}" for i in range(len(theta)))
    agreeing = sum(f[0] <= cost + SAME_COST * abs(cost) + 1e-300 for f in usable)
    at = tuple(n for n, t, b in zip(names, theta, bounds or ()) if _is_at(t, b))
    return Fit(theta, cost, names, at, agreeing, len(found), message)


def _is_at(value: float, bound) -> bool:
    return any(
        edge is not None
        and np.isfinite(edge)
        and abs(value - edge) <= AT_BOUND * max(abs(edge), 1e-3)
        for edge in bound
    )


# One compiled function per law and shape, whoever fits it and however often.
@functools.cache
def _value_and_grad(loss: Callable) -> Callable:
    return jax.jit(jax.value_and_grad(loss))


@functools.cache
def _jacobian(function: Callable) -> Callable:
    return jax.jit(jax.jacfwd(function))


@functools.cache
def _against(form: Callable) -> Callable:
    return lambda theta, x, y: form(theta, x) - y
