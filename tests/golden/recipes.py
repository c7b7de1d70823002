"""Weights and inputs of golden numbers of public implementations, made from seeds alone.

`mar.npz`: outputs of github.com/LTH14/mar at commit fe470ac24afbee924668d8c5c83e9fec60af3a73 in
float32 on a CPU, recipe in README.md. Only outputs are stored; weights and inputs are these.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent


def weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """One tensor per published name, in sorted order from one generator: matrices N(0, 1/fan-in),
    norm scales 1 + N(0, 0.1^2), the rest N(0, 0.1^2)."""
    rng, out = np.random.default_rng(seed), {}
    for name in sorted(shapes):
        shape = shapes[name]
        x = rng.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            x /= np.sqrt(np.prod(shape[1:]))
        elif name.endswith("weight"):
            x = 1 + 0.1 * x
        else:
            x = 0.1 * x
        out[name] = x.astype(np.float32)
    return out


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32 array of a seed."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def load(name: str) -> dict[str, np.ndarray]:
    """Arrays of tests/golden/<name>.npz."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def assert_close(got, want, tolerance: float) -> None:
    """Largest difference below tolerance times the largest magnitude of the reference."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}"
