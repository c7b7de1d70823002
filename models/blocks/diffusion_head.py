"""Per-token diffusion head (MAR's DiffLoss): an adaLN MLP that denoises one token given z.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; the network returns [eps | v], v interpolating the
log variance between beta_t and the posterior's. Schedules are float64 tables, used in float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

FREQUENCIES = 256
STEPS = 1000  # of the training process


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Token channels C, condition width Z, head width W, residual blocks D."""

    channels: int = 16
    cond: int = 2304
    width: int = 1024
    depth: int = 6


SIZES = {
    "mar_b": HeadConfig(width=1024, depth=6),
    "mar_l": HeadConfig(width=1280, depth=8),
    "mar_h": HeadConfig(width=1536, depth=12),
}


# ---------------------------------------------------------------- noise schedule


class Schedule(NamedTuple):
    """Float64 tables over the kept steps; `steps` holds their numbers in the full process."""

    steps: np.ndarray
    betas: np.ndarray
    alphas_cumprod: np.ndarray
    log_betas: np.ndarray
    posterior_log_variance: np.ndarray  # entry 0 repeats entry 1: the true variance there is 0
    posterior_mean_x0: np.ndarray
    posterior_mean_xt: np.ndarray


def _tables(betas: np.ndarray, steps: np.ndarray) -> Schedule:
    alphas_cumprod = np.cumprod(1.0 - betas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    variance = betas * (1.0 - previous) / (1.0 - alphas_cumprod)
    return Schedule(
        steps=steps,
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        log_betas=np.log(betas),
        posterior_log_variance=np.log(np.append(variance[1], variance[1:])),
        posterior_mean_x0=betas * np.sqrt(previous) / (1.0 - alphas_cumprod),
        posterior_mean_xt=(1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
    )


def schedule(steps: int = STEPS) -> Schedule:
    """Cosine schedule: abar(u) = cos^2((u + 0.008) / 1.008 * pi / 2), betas capped at 0.999."""
    u = np.arange(steps + 1, dtype=np.float64) / steps
    bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return _tables(np.minimum(1.0 - bar[1:] / bar[:-1], 0.999), np.arange(steps))


def respace(tables: Schedule, steps: int) -> Schedule:
    """Keep `steps` evenly spaced steps (first and last included) and rebuild every table."""
    total = len(tables.betas)
    if not 2 <= steps <= total:
        raise ValueError(f"sample.steps={steps}: allowed are 2..{total}")
    stride, position, kept = (total - 1) / (steps - 1), 0.0, []
    for _ in range(steps):  # summed, not multiplied: ties then round as in the published code
        kept.append(round(position))
        position += stride
    bar = tables.alphas_cumprod[kept]
    betas = 1.0 - bar / np.append(1.0, bar[:-1])
    return _tables(betas, tables.steps[kept])


# ---------------------------------------------------------------- network, pure functions


def _dense(p: dict, x: Array) -> Array:
    return x @ p["kernel"].astype(x.dtype) + p["bias"].astype(x.dtype)


def _layer_norm(x: Array) -> Array:
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)


def embed_time(params: dict, t: Int[Array, "*n"], dtype=jnp.float32) -> Float[Array, "*n w"]:
    """Features [cos | sin] of the integer step at frequencies 10000^(-j/128), then an MLP."""
    half = FREQUENCIES // 2
    freqs = jnp.exp(-np.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t[..., None].astype(jnp.float32) * freqs
    x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(dtype)
    return _dense(params["time_out"], nn.silu(_dense(params["time_in"], x)))


def embed_cond(params: dict, z: Float[Array, "*n z"], dtype=jnp.float32) -> Float[Array, "*n w"]:
    """Project the condition once; it does not depend on the step."""
    return _dense(params["cond"], z.astype(dtype))


def modulation(p: dict, y: Float[Array, "*n w"]) -> Float[Array, "*n m"]:
    """Shift, scale (and a block's gate) side by side, from silu(y)."""
    return _dense(p["modulation"], nn.silu(y))


def block(p: dict, h: Float[Array, "*n w"], m: Float[Array, "*n 3*w"]) -> Float[Array, "*n w"]:
    """h + gate * MLP(LN(h) * (1 + scale) + shift)."""
    shift, scale, gate = jnp.split(m, 3, axis=-1)
    u = (_layer_norm(h) * p["norm"]["scale"] + p["norm"]["bias"]).astype(h.dtype)
    u = u * (1 + scale) + shift
    return h + gate * _dense(p["mlp_out"], nn.silu(_dense(p["mlp_in"], u)))


def final(p: dict, h: Float[Array, "*n w"], m: Float[Array, "*n 2*w"]) -> Float[Array, "*n c2"]:
    """[eps | v] in float32."""
    shift, scale = jnp.split(m, 2, axis=-1)
    u = _layer_norm(h).astype(h.dtype) * (1 + scale) + shift
    return _dense(p["linear"], u).astype(jnp.float32)


class Head(NamedTuple):
    """The network bound to its parameters, in the pieces that samplers hoist differently.

    All that looks at y = time + condition and not at the noisy token is `modulate`: six tenths of
    the products of a step, which a sampler takes for many steps at once.
    """

    time: Callable[[Array], Array]  # t [*n] -> [*n, W]
    cond: Callable[[Array], Array]  # z [*n, Z] -> [*n, W]
    modulate: Callable[[Array], Any]  # y [*n, W] -> arrays [*n, ...]
    denoise: Callable[[Array, Any], Array]  # x [*n, C] and those arrays -> [*n, 2C]
    channels: int

    def __call__(self, x: Array, t: Array, z: Array) -> Array:
        """[eps | v] for noisy tokens x at integer steps t under conditions z."""
        return self.denoise(x, self.modulate(self.time(t) + self.cond(z)))


def bind(params: dict, cfg: HeadConfig, *, dtype=jnp.float32, unroll: bool = True) -> Head:
    """Close the pure functions over plain parameters; `unroll` slices the stacked layers here,
    outside the sampler's loop, while False scans them with rematerialisation for training."""
    if unroll:
        layers = [jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(cfg.depth)]

        def modulate(y):
            return [modulation(p, y) for p in (*layers, params["final"])]

        def denoise(x, m):
            h = _dense(params["input"], x.astype(m[0].dtype))
            for p, own in zip(layers, m[:-1], strict=True):
                h = block(p, h, own)
            return final(params["final"], h, m[-1])
    else:

        def modulate(y):
            return y  # to be recomputed layer by layer in the backward pass, not kept

        def denoise(x, y):
            def step(h, p):
                return block(p, h, modulation(p, y)), None

            h = _dense(params["input"], x.astype(y.dtype))
            h, _ = jax.lax.scan(jax.checkpoint(step), h, params["layers"])
            return final(params["final"], h, modulation(params["final"], y))

    return Head(
        time=lambda t: embed_time(params, t, dtype),
        cond=lambda z: embed_cond(params, z, dtype),
        modulate=modulate,
        denoise=denoise,
        channels=cfg.channels,
    )


# ---------------------------------------------------------------- parameters


def _dense_init(kernel, in_axis: str, out_axis: str, shape: tuple[int, ...]):
    """Initialiser of {kernel, bias}, boxed; a leading third dimension is the layer stack."""
    stack = ("layers",) * (len(shape) - 2)

    def init(rng):
        boxed = nn.with_logical_partitioning(kernel, (*stack, in_axis, out_axis))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (*stack, out_axis))
        return {"kernel": boxed(rng, shape), "bias": zeros(rng, (*shape[:-2], shape[-1]))}

    return init


def init(rng: Array, cfg: HeadConfig) -> dict:
    """Boxed parameters; adaLN and output layers are zero, so a fresh head returns exactly 0."""
    xavier = nn.initializers.xavier_uniform(batch_axis=())
    stacked = nn.initializers.xavier_uniform(batch_axis=(0,))
    small, zero = nn.initializers.normal(0.02), nn.initializers.zeros
    w, d, keys = cfg.width, cfg.depth, iter(jax.random.split(rng, 9))

    def dense(kernel, in_axis, out_axis, *shape):
        return _dense_init(kernel, in_axis, out_axis, shape)(next(keys))

    norm_axes = ("layers", "norm")
    return {
        "time_in": dense(small, "time", "width_out", FREQUENCIES, w),
        "time_out": dense(small, "width_in", "width_out", w, w),
        "cond": dense(xavier, "embed", "width_out", cfg.cond, w),
        "input": dense(xavier, "channels_in", "width_out", cfg.channels, w),
        "layers": {
            "norm": {
                "scale": nn.with_logical_partitioning(nn.initializers.ones, norm_axes)(rng, (d, w)),
                "bias": nn.with_logical_partitioning(zero, norm_axes)(rng, (d, w)),
            },
            "mlp_in": dense(stacked, "width_in", "width_out", d, w, w),
            "mlp_out": dense(stacked, "width_in", "width_out", d, w, w),
            "modulation": dense(zero, "width_in", "width_out", d, w, 3 * w),
        },
        "final": {
            "modulation": dense(zero, "width_in", "width_out", w, 2 * w),
            "linear": dense(zero, "width_in", "channels_out", w, 2 * cfg.channels),
        },
    }


class DiffusionHead(nn.Module):
    """Linen wrapper for models that hold the head as a submodule: parameters as in `init`."""

    cfg: HeadConfig
    dtype: jnp.dtype = jnp.float32
    unroll: bool = True

    def setup(self):
        names = ("time_in", "time_out", "cond", "input", "layers", "final")
        self.weights = {n: self.param(n, lambda r, n=n: init(r, self.cfg)[n]) for n in names}

    def bound(self) -> Head:
        """The head's functions on this module's parameters."""
        return bind(self.weights, self.cfg, dtype=self.dtype, unroll=self.unroll)

    def __call__(
        self, x: Float[Array, "*n c"], t: Int[Array, "*n"], z: Float[Array, "*n z"]
    ) -> Float[Array, "*n c2"]:
        return self.bound()(x, t, z)


# ---------------------------------------------------------------- training loss


def draw(
    keys: Array, channels: int, steps: int = STEPS
) -> tuple[Int[Array, "*n"], Float[Array, "*n c"]]:
    """Uniform step and Gaussian noise from one typed key per token, any leading shape."""

    def one(key):
        step_key, noise_key = jax.random.split(key)
        t = jax.random.randint(step_key, (), 0, steps)
        return t, jax.random.normal(noise_key, (channels,))

    t, eps = jax.vmap(one)(keys.reshape(-1))
    return t.reshape(keys.shape), eps.reshape(*keys.shape, channels)


def diffuse(
    tables: Schedule, x0: Float[Array, "*n c"], t: Int[Array, "*n"], eps: Float[Array, "*n c"]
) -> Float[Array, "*n c"]:
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps."""
    bar = tables.alphas_cumprod
    return _at(np.sqrt(bar), t) * x0 + _at(np.sqrt(1.0 - bar), t) * eps


def _at(table: np.ndarray, t: Array) -> Array:
    return jnp.asarray(table, jnp.float32)[t][..., None]


def loss(
    head: Callable[[Array, Array, Array], Array],
    x0: Float[Array, "n c"],
    z: Float[Array, "n z"],
    t: Int[Array, "*r n"],
    eps: Float[Array, "*r n c"],
    *,
    tables: Schedule | None = None,
    discretised_t0: bool = True,
) -> tuple[Float[Array, "*r n"], Float[Array, "*r n"]]:
    """(MSE of eps, variational bound in bits) per token, means over C.

    head: (x_t, t, z) -> [eps | v], a `Head` or a bound `DiffusionHead`. t and eps may put repeats
    in front: z is projected once for all of them. The bound trains the variance half only.
    """
    tables = schedule() if tables is None else tables
    x0 = x0.astype(jnp.float32)
    x_t = diffuse(tables, x0, t, eps)
    eps_hat, v = jnp.split(head(x_t, t, z), 2, axis=-1)
    mse = jnp.square(eps_hat - eps).mean(-1)
    return mse, variational_bound(
        tables, x0, x_t, t, jax.lax.stop_gradient(eps_hat), v, discretised_t0=discretised_t0
    )


def variational_bound(
    tables: Schedule,
    x0: Float[Array, "*n c"],
    x_t: Float[Array, "*r c"],
    t: Int[Array, "*r"],
    eps_hat: Float[Array, "*r c"],
    v: Float[Array, "*r c"],
    *,
    discretised_t0: bool = True,
) -> Float[Array, "*r"]:
    """KL(q(x_{t-1} | x_t, x_0) || p) / ln 2, mean over C.

    At t = 0 the published loss scores x_0 under a Gaussian discretised into bins of 2/255, which
    means nothing for latents; `discretised_t0=False` keeps the KL with the clipped variance.
    """
    log_true = _at(tables.posterior_log_variance, t)
    frac = (v + 1.0) / 2.0
    log_var = frac * _at(tables.log_betas, t) + (1.0 - frac) * log_true
    mean = posterior_mean(tables, predict_x0(tables, x_t, t, eps_hat), x_t, t)
    true_mean = posterior_mean(tables, x0, x_t, t)
    kl = 0.5 * (
        -1.0
        + log_var
        - log_true
        + jnp.exp(log_true - log_var)
        + jnp.square(true_mean - mean) * jnp.exp(-log_var)
    )
    if discretised_t0:
        nll = -discretised_log_likelihood(jnp.broadcast_to(x0, mean.shape), mean, 0.5 * log_var)
        kl = jnp.where((t == 0)[..., None], nll, kl)
    return kl.mean(-1) / np.log(2.0)


def predict_x0(
    tables: Schedule, x_t: Float[Array, "*n c"], t: Int[Array, "*n"], eps: Float[Array, "*n c"]
) -> Float[Array, "*n c"]:
    """x_0 = x_t / sqrt(abar) - sqrt(1 / abar - 1) eps, not clipped."""
    inverse = 1.0 / tables.alphas_cumprod
    return _at(np.sqrt(inverse), t) * x_t - _at(np.sqrt(inverse - 1.0), t) * eps


def posterior_mean(
    tables: Schedule, x0: Float[Array, "*m c"], x_t: Float[Array, "*n c"], t: Int[Array, "*n"]
) -> Float[Array, "*n c"]:
    """Mean of q(x_{t-1} | x_t, x_0)."""
    return _at(tables.posterior_mean_x0, t) * x0 + _at(tables.posterior_mean_xt, t) * x_t


def discretised_log_likelihood(
    x: Float[Array, "*n c"], mean: Float[Array, "*n c"], log_scale: Float[Array, "*n c"]
) -> Float[Array, "*n c"]:
    """Log mass in nats of bins x +- 1/255, open-ended beyond +-0.999 (tanh approximation)."""

    def cdf(a):
        return 0.5 * (1.0 + jnp.tanh(np.sqrt(2.0 / np.pi) * (a + 0.044715 * a**3)))

    def log(p):
        return jnp.log(jnp.maximum(p, 1e-12))

    scale = jnp.exp(-log_scale)
    upper, lower = cdf(scale * (x - mean + 1 / 255)), cdf(scale * (x - mean - 1 / 255))
    inner = jnp.where(x > 0.999, log(1.0 - lower), log(upper - lower))
    return jnp.where(x < -0.999, log(upper), inner)
