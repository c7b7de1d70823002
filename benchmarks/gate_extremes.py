"""The mLSTM with its gates at their caps: relative errors against float64 (xlstm.md, check 9).

    python -m benchmarks.gate_extremes [--out=FILE]

Input gates of +-15 with forget gates of -15 over 4,096 tokens, forget gates of +15 over 65,536, and
ordinary gates. One head, K = 64, V = 128; the chunkwise form (impl="xla") with float32 and
bfloat16 q, k, v. An error is the largest difference over the largest entry, which is given too: a
gradient that cancels to nearly nothing has a large relative error. Gradients are those of
sum(h * c) with a random c; q and k are positive, so that h has no small denominator by chance.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from kernels.mlstm import mlstm

CASES = {  # (input gate, forget gate, tokens); None: normal with mean 0, of forget gates 3
    "input 15, forget -15": (15.0, -15.0, 4096),
    "input -15, forget -15": (-15.0, -15.0, 4096),
    "input 0, forget 15": (0.0, 15.0, 65_536),
    "ordinary": (None, None, 4096),
}
NAMES = ("h", "dq", "dk", "dv", "di", "df")


def arrays(input_gate, forget_gate, tokens: int) -> list[jax.Array]:
    """q, k [1, 1, T, 64], v [1, 1, T, 128], both gates [1, 1, T] and the cotangent of h."""
    keys = jax.random.split(jax.random.key(0), 6)
    q, k = (jnp.abs(jax.random.normal(key, (1, 1, tokens, 64))) for key in keys[:2])
    v, cotangent = (jax.random.normal(key, (1, 1, tokens, 128)) for key in keys[2:4])
    i, f = (jax.random.normal(key, (1, 1, tokens)) for key in keys[4:])
    gates = [
        i if input_gate is None else jnp.full_like(i, input_gate),
        f + 3.0 if forget_gate is None else jnp.full_like(f, forget_gate),
    ]
    # Rounded once, so that both types are given the same numbers.
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (q, k, v)]
    return [*rounded, *gates, cotangent]


@jax.jit
def everything(q, k, v, i, f, cotangent):
    """(h, five gradients)."""
    h, pull = jax.vjp(lambda *x: mlstm(*x, chunk=64, impl="xla")[0], q, k, v, i, f)
    return h, *pull(cotangent.astype(h.dtype))


def error(got, want) -> float:
    """Largest difference over the largest entry, in float64; 0 where both are 0."""
    got, want = (np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, np.float64)
                 for x in (got, want))  # fmt: skip
    worst = np.abs(got - want).max()
    return float(worst / np.abs(want).max()) if worst else 0.0


def measure(case: str, dtype: str) -> dict:
    """Relative errors of h and of the five gradients, and whether all of them are finite."""
    inputs = arrays(*CASES[case])
    cast = [x.astype(dtype) for x in inputs[:3]] + inputs[3:]
    got = everything(*cast)
    with jax.enable_x64():
        want = everything(*(jnp.asarray(np.asarray(x), jnp.float64) for x in inputs))
        errors = {n: common.digits(error(a, b), 2) for n, a, b in zip(NAMES, got, want)}
        largest = {n: common.digits(float(jnp.abs(x).max()), 2) for n, x in zip(NAMES, want)}
    finite = all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in got)
    return {"case": case, "dtype": dtype, "finite": finite, **errors, "largest": largest}


def arguments(argv=None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="", help="JSON file to write")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """One row per case and type."""
    args = arguments(argv)
    rows = [measure(case, dtype) for case in CASES for dtype in ("float32", "bfloat16")]
    for row in rows:
        common.show(row)
    common.save(args.out, "python -m benchmarks.gate_extremes", rows)


if __name__ == "__main__":
    main()
