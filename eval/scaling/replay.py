"""The published recipe of the multi-power law's fit, which stops long before it converges.

As released with arXiv 2503.12811: a crude law gives (L0, A, alpha, B), then at most 200 steps of
AdamW (torch's defaults, weight decay 0.01 included) with two learning rates and a patience of 20.
B hardly moves from where the crude law put it: the early stop is the regularisation. The parameters
kept are those after the update of the best step, whose loss was measured before it.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import linregress

from eval.scaling import fitting, laws

RATES = dict(slow=5e-2, fast=5e-3)
GROUPS = ("slow", "slow", "fast", "slow", "slow", "fast", "fast")  # L0 A alpha B C beta gamma
STEPS, PATIENCE, LEAST_GRADIENT = 200, 20, 1e-5


class Replay(NamedTuple):
    """What the recipe ends with."""

    theta: np.ndarray  # [7]
    objective: float  # the least one, before its update
    stopped: int  # the step at which patience, or the gradient, ended it
    start: np.ndarray  # [4] the crude law's L0, A, alpha, B


def crude_start(observed: Sequence[laws.Observed], weights=None) -> np.ndarray:
    """(L0, A, alpha, B) of the least Huber sum of L0 + A S1^-alpha - B (peak - lr).

    The authors search a grid of 135 starts with differences for gradients; where it ends is this
    minimum, to 1e-5.
    """
    peak = max(o.schedule.peak for o in observed)
    total = np.concatenate([np.cumsum(o.schedule.lrs)[o.index] for o in observed])
    below = peak - np.concatenate([o.schedule.lrs[o.index] for o in observed])
    losses = np.concatenate([o.losses for o in observed])
    each = np.repeat(weights or [1.0] * len(observed), [len(o.losses) for o in observed])
    line = linregress(np.log(total), np.log(losses - losses.min() + 0.01))
    starts = fitting.grid(
        (losses.min() - 0.1, losses.min() - 0.3),
        (np.exp(line.intercept),),
        (-line.slope,),
        (0.03, 0.3),  # loss for a whole drop of the rate; B is 100 to 1000 at the paper's 3e-4
    )
    args = (total, below / peak, np.log(losses), each)
    theta = fitting.minimise(_crude, starts, args=args, bounds=[(0, None)] * 4).theta
    return theta / np.array([1, 1, 1, peak])


def _crude(theta, total, below, log_losses, weights):
    floor, scale, alpha, drop = theta
    predicted = jnp.maximum(floor + scale * total**-alpha - drop * below, 1e-10)
    return (weights * fitting.huber(jnp.log(predicted) - log_losses, laws.HUBER_DELTA)).sum()


def replay(
    observed: Sequence[laws.Observed], *, weights=None, merge: int = 1, steps: int = STEPS
) -> Replay:
    """The whole recipe on these curves; weights as in laws.fit, merge as in laws.Options."""
    crude = crude_start(observed, weights)
    args = laws.objective_args(laws.MULTI_POWER, observed, laws.Options(merge=merge), weights)
    with fitting.float64():
        theta = jnp.concatenate([jnp.asarray(crude), jnp.asarray([1.0, 0.5, 0.5])])
        best, kept, since, at = np.inf, theta, 0, 0
        state = _optimizer().init(tuple(theta))
        for at in range(steps):
            value, norm, theta, state = _step(theta, state, *args)
            value = float(value)
            improved = value < best
            since = 0 if improved else since + 1
            if (at > PATIENCE and since >= PATIENCE) or float(norm) < LEAST_GRADIENT:
                break
            if improved:
                best, kept = value, theta
    return Replay(np.asarray(kept), best, at, crude)


def _optimizer():
    # torch.optim.AdamW's defaults
    tx = {
        g: optax.adamw(r, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01) for g, r in RATES.items()
    }
    return optax.multi_transform(tx, GROUPS)


# At natural parameters, which AdamW moves as they are.
_natural = functools.partial(laws.huber_sum, laws.MULTI_POWER)


@jax.jit
def _step(theta, state, *args):
    value, gradient = jax.value_and_grad(_natural)(theta, *args)
    updates, state = _optimizer().update(tuple(gradient), state, tuple(theta))
    return value, jnp.linalg.norm(gradient), theta + jnp.stack(updates), state
