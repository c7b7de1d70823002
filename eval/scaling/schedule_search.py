"""The schedule with the least final loss under a fitted multi-power law (arXiv 2503.12811).

Variables are the drops of the rate after the warm-up, all >= 0, so the schedule never rises; Adam
on the predicted final loss, drops clipped after every step. The gradient needs sums over the steps
only, since no loss but the last one counts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eval.scaling import fitting, laws
from eval.scaling.lr_schedules import Schedule

CHUNK = 500  # optimiser steps of one compiled call


class Search(NamedTuple):
    """Where the search ended."""

    schedule: Schedule  # warm-up and all
    loss: float  # predicted at the end, form "paper": the warm-up's rise is left out
    history: np.ndarray  # predicted before every CHUNK optimiser steps
    flat_until: int  # the last update at 99.5 % of the peak or more


def search(
    theta,
    rising,
    *,
    steps: int,
    peak: float,
    least: float = 0.0,
    decay: float = 1.0,
    updates: int = 10_000,
    rate: float = 0.0,
    name: str = "optimised",
) -> Search:
    """Optimises the rates of the updates that follow the warm-up's, `rising` [w].

    least: no rate is below it. decay: the rate may fall only in this last share of the run.
    rate: Adam's, 0: the authors' 5e-9 for a peak of 3e-4 and 21,840 steps, in proportion to both.
    """
    rising = np.asarray(rising, np.float64)
    warmup = len(rising)
    after = steps - warmup
    if after < 2 or not 0 <= least < peak or not 0 < decay <= 1:
        raise ValueError(
            f"a schedule search needs warmup={warmup} < steps={steps}, "
            f"0 <= least={least} < peak={peak} and 0 < decay={decay} <= 1"
        )
    floor = max(least, laws.LEAST_RATE)
    free = np.arange(after) >= after - max(1, round(decay * after))
    with fitting.float64():
        rate = rate or peak / 3e-4 * 5e-9 * 21_840 / after
        fixed = (jnp.asarray(theta, jnp.float64), peak, floor, rising.sum(), jnp.asarray(free))
        drops = jnp.zeros(after, jnp.float64)
        state, history = optax.scale_by_adam().init(drops), []
        for done in range(0, updates, CHUNK):
            count = min(CHUNK, updates - done)
            drops, state, losses = _run(drops, state, rate, count, *fixed)
            history.append(float(losses))
        # Summed one by one: a parallel sum may rise by its last digit.
        rates = np.maximum(peak - np.cumsum(np.asarray(drops)), floor)
        loss = float(laws.final_loss(fixed[0], rates, peak=peak, before=rising.sum()))
    lrs = np.concatenate([rising, rates])
    flat = int(np.flatnonzero(lrs >= 0.995 * peak)[-1])
    return Search(Schedule(name, lrs, warmup), loss, np.array([*history, loss]), flat)


def _rates(drops, peak, floor):
    """Rates after the warm-up; jnp.maximum would halve the gradient where they are at the floor."""
    rates = peak - jnp.cumsum(drops)
    return jnp.where(rates >= floor, rates, floor)


def objective(drops, theta, peak, floor, before):
    """Predicted final loss of the drops [n]; `before` is the sum of the warm-up's rates."""
    return laws.final_loss(theta, _rates(drops, peak, floor), peak=peak, before=before)


@jax.jit
def _run(drops, state, rate, count, theta, peak, floor, before, free):
    """`count` optimiser steps; also the loss before the first of them."""
    adam = optax.scale_by_adam()

    def step(_, carry):
        drops, state = carry
        gradient = jax.grad(objective)(drops, theta, peak, floor, before)
        updates, state = adam.update(jnp.where(free, gradient, 0.0), state)
        drops = jnp.clip(drops - rate * updates, 0.0, peak)
        # What would fall below the floor does not fall.
        drops = jnp.where((peak - jnp.cumsum(drops) > floor) & free, drops, 0.0)
        return drops, state

    first = objective(drops, theta, peak, floor, before)
    drops, state = jax.lax.fori_loop(0, count, step, (drops, state))
    return drops, state, first


def as_optax(schedule: Schedule) -> Callable:
    """step -> rate, as optax takes it; the last rate goes on for ever."""
    rates = jnp.asarray(schedule.lrs, jnp.float32)
    return lambda count: rates[jnp.clip(count, 0, len(rates) - 1)]
