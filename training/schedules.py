"""Learning-rate schedules: step -> lr, chosen by config.schedule.name."""

from collections.abc import Callable

import jax.numpy as jnp

NAMES = ("constant", "cosine", "wsd", "exp_linear", "piecewise", "from_file")


def make_schedule(config) -> Callable:
    """step (int array, 0-based) -> learning rate (float32), peak config.optimizer.lr.

    The warm-up takes `warmup` steps: step s uses peak * (s + 1) / warmup. The closing decay takes
    the last `decay` steps, as far as the warm-up leaves them.
    """
    peak, total, s = config.optimizer.lr, config.steps, config.schedule
    if s.warmup < 0 or s.decay < 0:
        raise ValueError(
            f"config.schedule.warmup={s.warmup} and config.schedule.decay={s.decay} must be >= 0"
        )
    shape = _shape(s, total)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum((step + 1) / max(s.warmup, 1), 1.0)
        return peak * jnp.where(step < s.warmup, warm, shape(step))

    return schedule


def _shape(s, total: int) -> Callable:
    """step -> lr over peak, after the warm-up."""
    # The last update runs at step total - 1; `final` is reached there.
    last = max(total - 1, 1)
    decay = min(s.decay, max(total - s.warmup, 0))
    match s.name:
        case "constant":
            return lambda step: jnp.ones_like(step)
        case "cosine":
            end = total - decay if decay else last

            def cosine(step):
                x = jnp.clip((step - s.warmup) / max(end - s.warmup, 1), 0.0, 1.0)
                level = s.final + (1 - s.final) * 0.5 * (1 + jnp.cos(jnp.pi * x))
                return level * _to_zero(step, total, decay)

            return cosine
        case "wsd":
            return _wsd(s, total)
        case "exp_linear":
            if s.rate_steps <= s.warmup:
                raise ValueError(
                    f"config.schedule.rate_steps={s.rate_steps} must be larger than "
                    f"config.schedule.warmup={s.warmup}"
                )

            def exp_linear(step):
                # xLSTM-7B: from the peak at the warm-up's end to rate times it at rate_steps and
                # on, then linearly to zero.
                fallen = jnp.clip(step, s.warmup, max(total - decay, s.warmup)) - s.warmup
                level = s.rate ** (fallen / (s.rate_steps - s.warmup))
                return level * _to_zero(step, total, decay)

            return exp_linear
        case "piecewise":
            if len(s.boundaries) != len(s.factors):
                raise ValueError(
                    f"config.schedule.boundaries={s.boundaries} and factors={s.factors} must "
                    "have the same length"
                )

            def piecewise(step):
                level = jnp.ones_like(step)
                for boundary, factor in zip(s.boundaries, s.factors, strict=True):
                    level = jnp.where(step >= boundary, factor, level)
                return level

            return piecewise
        case "from_file":
            return _from_file(s, total)
        case other:
            raise ValueError(f"config.schedule.name={other!r} must be one of {', '.join(NAMES)}")


def _from_file(s, total: int) -> Callable:
    """The rates of config.schedule.path over their largest: one per step, or one per step after
    the warm-up, as optimised schedules are published."""
    from eval.scaling.lr_schedules import read_rates

    try:
        rates = read_rates(s.path)
    except (OSError, ValueError) as error:
        raise ValueError(f"config.schedule.path={s.path!r}: {error}") from error
    if len(rates) not in (total, total - s.warmup) or not rates.max() > 0:
        raise ValueError(
            f"config.schedule.path={s.path!r} has {len(rates)} rates up to {rates.max():.3g}; "
            f"config.steps={total} needs {total}, or {total - s.warmup} after "
            f"config.schedule.warmup={s.warmup}"
        )
    first, shape = total - len(rates), jnp.asarray(rates / rates.max(), jnp.float32)
    at = lambda step: jnp.clip(step.astype(jnp.int32) - first, 0, len(shape) - 1)  # noqa: E731
    return lambda step: shape[at(step)]


def _to_zero(step, total: int, decay: int):
    """1, and over the last `decay` steps linearly to 0 at step `total`."""
    return jnp.clip((total - step) / max(decay, 1), 0.0, 1.0)


def _wsd(s, total: int) -> Callable:
    """Warm-up, stable, decay over the last s.decay steps by s.shape. With s.cycles the rate falls
    towards each of those steps too and is at its peak again from it on: WSD-S, Wen et al.,
    arXiv 2410.05192, which continues from the decayed weights."""
    match s.shape:
        case "linear":
            fall = lambda x: 1 - (1 - s.final) * x  # noqa: E731
        case "exponential":
            if s.final <= 0:
                raise ValueError(
                    f"config.schedule.final={s.final} must be > 0 when shape is exponential"
                )
            fall = lambda x: s.final**x  # noqa: E731
        case "sqrt":
            fall = lambda x: 1 - (1 - s.final) * jnp.sqrt(x)  # noqa: E731
        case "sqrt_cube":  # arXiv 2503.12811: near to the optimum of the multi-power law
            fall = lambda x: s.final + (1 - s.final) * (1 - x) ** 1.5  # noqa: E731
        case other:
            raise ValueError(
                f"config.schedule.shape={other!r} must be one of linear, exponential, sqrt, "
                "sqrt_cube"
            )
    begins, ends = (s.warmup, *s.cycles), (*s.cycles, total)
    if list(begins) != sorted(begins) or (s.cycles and s.cycles[-1] >= total):
        raise ValueError(
            f"config.schedule.cycles={s.cycles} must rise from warmup={s.warmup} to below "
            f"config.steps={total}"
        )

    def wsd(step):
        level = 1.0
        for begin, end in zip(begins, ends, strict=True):
            # The last update of a cycle runs at step end - 1; `final` is reached there.
            last = max(end - 1, 1)
            start = max(last - s.decay, begin)
            x = jnp.clip((step - start) / max(last - start, 1), 0.0, 1.0)
            level = jnp.where(step >= begin, fall(x), level)
        return level

    return wsd
