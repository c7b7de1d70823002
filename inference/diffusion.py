"""Ancestral sampling of single tokens from the diffusion head: one compiled loop over steps.

What does not depend on the noisy token is computed outside the loop: time embeddings of all steps,
the projected conditions, all noise, and the modulations of as many steps at once as make one large
product. Guidance acts on eps only and carries one trajectory (MAR, section 3.4).
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.blocks import diffusion_head as dh

# Rows of a product with the modulation's weights: above some hundreds they are read once for all.
MODULATED_ROWS = 1024


@lru_cache(maxsize=16)
def spaced(steps: int, total: int = dh.STEPS) -> dh.Schedule:
    """Float64 tables of the process reduced to `steps` of `total` steps."""
    return dh.respace(dh.schedule(total), steps)


def step_coefficients(tables: dh.Schedule) -> dict[str, np.ndarray]:
    """Float32 numbers each step needs, from the last step to the first."""
    inverse = 1.0 / tables.alphas_cumprod
    rows = {
        "x0_x": np.sqrt(inverse),
        "x0_eps": np.sqrt(inverse - 1.0),
        "mean_x0": tables.posterior_mean_x0,
        "mean_x": tables.posterior_mean_xt,
        "log_small": tables.posterior_log_variance,
        "log_large": tables.log_betas,
        "noise": (np.arange(len(inverse)) > 0).astype(np.float64),  # the last step adds none
    }
    return {k: v[::-1].astype(np.float32) for k, v in rows.items()}


def draw_noise(keys: Array, steps: int, channels: int) -> Float[Array, "s n c"]:
    """Start noise and one draw per step from one typed key per row, [steps + 1, n, channels].

    A row's noise depends on its key only, not on the batch around it.
    """
    rows = jax.vmap(lambda key: jax.random.normal(key, (steps + 1, channels)))(keys)
    return rows.transpose(1, 0, 2)


def guidance_weights(scale: float | Float[Array, "*n"]) -> Float[Array, "k *n"]:
    """Branch weights of classifier-free guidance eps_u + s (eps_c - eps_u): [s, 1 - s]."""
    scale = jnp.asarray(scale, jnp.float32)
    return jnp.stack([scale, 1.0 - scale])


def sample_head(
    head: dh.Head,
    z: Float[Array, "k n z"],
    weights: Float[Array, "k"] | Float[Array, "k n"] | None = None,
    keys: Array | None = None,
    *,
    steps: int = 100,
    temperature: float | Float[Array, ""] = 1.0,
    x0_clip: float | None = None,
    noise: Float[Array, "s n c"] | None = None,
    total_steps: int = dh.STEPS,
) -> Float[Array, "n c"]:
    """Sample one token per row from the branches' weighted eps; branch 0 gives the variance.

    z: one branch per guidance condition, the full one first; K = 1 runs no other branch.
    weights: of the branches, summing to one, may be traced and differ per row.
    keys: typed PRNG keys [n]; or give `noise` [steps + 1, n, C] (start, then last step to first).
    temperature scales the noise of the steps, not the start. x0_clip bounds the predicted x_0:
    a young head's error is multiplied by 2e4 at the first step; None is MAR's sampler.
    """
    branches = z.shape[0]
    tables = spaced(steps, total_steps)
    if noise is None:
        noise = draw_noise(keys, steps, head.channels)
    cond = head.cond(z)
    weights = jnp.ones((1,)) if weights is None else weights
    weights = weights.reshape(branches, -1, 1).astype(jnp.float32)

    def predict(x, modulation):
        inputs = jnp.broadcast_to(x, (branches, *x.shape))
        eps, v = jnp.split(head.denoise(inputs, modulation), 2, axis=-1)
        return eps[0] if branches == 1 else (weights * eps).sum(0), v[0]

    def step(x, inputs):
        c, modulation, eps_step = inputs
        eps, v = predict(x, modulation)
        x0 = c["x0_x"] * x - c["x0_eps"] * eps
        if x0_clip is not None:
            x0 = jnp.clip(x0, -x0_clip, x0_clip)
        frac = (v + 1.0) / 2.0
        log_var = frac * c["log_large"] + (1.0 - frac) * c["log_small"]
        scale = c["noise"] * temperature * jnp.exp(0.5 * log_var)
        return c["mean_x0"] * x0 + c["mean_x"] * x + scale * eps_step, None

    def several(x, inputs):
        c, times, eps_steps = inputs
        modulations = head.modulate(times[:, None, None] + cond)
        return jax.lax.scan(step, x, (c, modulations, eps_steps))

    together = _divisor(steps, MODULATED_ROWS // (cond.shape[0] * cond.shape[1]))
    times = head.time(jnp.asarray(tables.steps[::-1].copy(), jnp.int32))
    inputs = (step_coefficients(tables), times, noise[1:])
    inputs = jax.tree.map(lambda a: a.reshape(-1, together, *a.shape[1:]), inputs)
    x, _ = jax.lax.scan(several, noise[0], inputs)
    return x


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`, or 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(most, 1))
