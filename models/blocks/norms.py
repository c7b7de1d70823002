"""RMSNorm, with Gemma's (1 + w) unless told otherwise, and LayerNorm, both in float32."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "... d"], weight: Float[Array, "d"], eps: float = 1e-6, offset: float = 1.0
) -> Float[Array, "... d"]:
    """x / sqrt(mean(x²) + eps) · (offset + w), all in float32, cast back after the product."""
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(variance + eps) * (offset + weight)).astype(x.dtype)


def layer_norm(
    x: Float[Array, "... d"],
    scale: Float[Array, "d"] | None = None,
    bias: Float[Array, "d"] | None = None,
    eps: float = 1e-6,
) -> Float[Array, "... d"]:
    """(x - mean) / sqrt(var + eps) · scale + bias, all in float32; affine parts are optional."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * scale
    if bias is not None:
        y = y + bias
    return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """rms_norm with its weight, which starts at 1 - offset (so the factor starts at 1)."""

    eps: float = 1e-6
    axis: str = "norm"
    offset: float = 1.0  # Gemma's; 0 for norms published with their factor

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        start = nn.initializers.constant(1.0 - self.offset)
        init = nn.with_logical_partitioning(start, (self.axis,))
        scale = self.param("scale", init, x.shape[-1:], jnp.float32)
        return rms_norm(x, scale, self.eps, self.offset)


class LayerNorm(nn.Module):
    """layer_norm with scale (starts at 1) and bias (starts at 0)."""

    eps: float = 1e-6
    dtype: Any = None  # of the output; None keeps the input's

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",))
        scale = self.param("scale", ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", zeros, x.shape[-1:], jnp.float32)
        y = layer_norm(x, scale, bias, self.eps)
        return y if self.dtype is None else y.astype(self.dtype)
