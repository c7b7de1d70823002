"""Fingerprints of arrays, computed where they lie: the same on every mesh and host count."""

from typing import Any

import jax
import jax.numpy as jnp


def _one(x: jax.Array) -> jax.Array:
    """uint32: sum over elements of bits * odd(position), wrapping. Integer, so order is free."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(x.dtype.itemsize)
    if bits is None:
        raise ValueError(f"arrays of {x.dtype} cannot be saved")
    bits = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    position, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position = position + index * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    # Odd multipliers are invertible, so any single changed element changes the sum.
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)


@jax.jit
def _all(arrays: dict[str, jax.Array]) -> jax.Array:
    return jnp.stack([_one(arrays[name]) for name in sorted(arrays)])


def fingerprints(arrays: dict[str, Any]) -> dict[str, int]:
    """{name: 32-bit fingerprint} of a flat dict of arrays."""
    if not arrays:
        return {}
    values = jax.device_get(_all(arrays))
    return {name: int(value) for name, value in zip(sorted(arrays), values, strict=True)}


def verify(arrays: dict[str, Any], saved: dict[str, int]) -> bool:
    """True when every array has its saved fingerprint; otherwise the first one is named."""
    for name, value in fingerprints(arrays).items():
        if saved[name] != value:
            raise OSError(f"array {name} does not have the contents that were saved")
    return True
