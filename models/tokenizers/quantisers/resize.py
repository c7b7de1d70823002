"""Resizing as two small matrices [to, from], with PyTorch's conventions (half-pixel centres)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@functools.cache
def area(to: int, size: int) -> np.ndarray:
    """Adaptive average pooling: row i covers floor(i size / to) .. ceil((i + 1) size / to) - 1."""
    matrix = np.zeros((to, size), np.float32)
    for i in range(to):
        begin, end = i * size // to, -(-(i + 1) * size // to)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix


def _taps(to: int, size: int, weights) -> np.ndarray:
    """Rows of interpolation weights around each centre; taps beyond the edge fall on the edge."""
    matrix = np.zeros((to, size), np.float64)
    for i in range(to):
        centre = (i + 0.5) * size / to - 0.5
        first = int(np.floor(centre))
        for offset, weight in weights(centre - first):
            matrix[i, min(max(first + offset, 0), size - 1)] += weight
    return matrix.astype(np.float32)


@functools.cache
def linear(to: int, size: int) -> np.ndarray:
    """Linear interpolation without antialiasing, also where it shrinks."""
    return _taps(to, size, lambda t: ((0, 1 - t), (1, t)))


@functools.cache
def cubic(to: int, size: int) -> np.ndarray:
    """Cubic convolution with a = -0.75, as PyTorch has it (JAX's is -0.5)."""
    a = -0.75

    def weights(t):
        near = lambda x: ((a + 2) * x - (a + 3)) * x * x + 1  # noqa: E731
        far = lambda x: a * (((x - 5) * x + 8) * x - 4)  # noqa: E731
        return ((-1, far(1 + t)), (0, near(t)), (1, near(1 - t)), (2, far(2 - t)))

    return _taps(to, size, weights)


def resize(
    x: Float[Array, "b h w c"], grid: tuple[int, int], kind=linear
) -> Float[Array, "b h2 w2 c"]:
    """x on another grid; the identity where the grid is its own."""
    if tuple(grid) == x.shape[1:3]:
        return x
    rows, columns = kind(grid[0], x.shape[1]), kind(grid[1], x.shape[2])
    # A matrix unit's default would round the weights: codes are compared bit by bit.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return product("ph,bhwc,qw->bpqc", rows, x, columns)
