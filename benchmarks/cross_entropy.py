"""Cross-entropy over a large vocabulary: in slices against all scores at once.

    python -m benchmarks.cross_entropy [--vocabulary=256000] [--tokens=512] [--width=256] [--out=F]

Loss and gradients of hidden states [N, D] and table [V, D] in both forms: bytes of temporaries that
the compiler reserves, seconds (in turns), largest relative difference of the gradients. Two rows
more are only compiled: Gemma-2 2B's width with 4,096 tokens, in float32 and bfloat16.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from models.blocks import losses

SOFTCAP = 30.0
FORMS = {"chunked": losses.chunked_cross_entropy, "plain": losses.plain_cross_entropy}


def gradient(form):
    """Jitted (hidden, table, targets, weights) -> (loss, gradients of hidden and table)."""

    def value(hidden, table, targets, weights):
        return FORMS[form](hidden, table, targets, weights, softcap=SOFTCAP)[0]

    return jax.jit(jax.value_and_grad(value, (0, 1)))


def shapes(tokens: int, width: int, vocabulary: int, dtype: str):
    """Abstract arguments; the table stays float32, as parameters do."""
    return (
        jax.ShapeDtypeStruct((tokens, width), jnp.dtype(dtype)),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
        jax.ShapeDtypeStruct((tokens,), jnp.float32),
    )


def arrays(tokens: int, width: int, vocabulary: int, dtype: str):
    """Random arguments with hidden states of unit size, as behind the final norm."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, width)).astype(dtype)
    table = jax.random.normal(keys[1], (vocabulary, width)) * width**-0.5
    targets = jax.random.randint(keys[2], (tokens,), 0, vocabulary)
    return hidden, table, targets, jnp.ones((tokens,))


def memory(tokens: int, width: int, vocabulary: int, dtype: str) -> dict:
    """Temporaries of both forms and their ratio; nothing is run."""
    spec = shapes(tokens, width, vocabulary, dtype)
    size = {form: common.temp_bytes(gradient(form).lower(*spec).compile()) for form in FORMS}
    setup = dict(tokens=tokens, width=width, vocabulary=vocabulary, dtype=dtype)
    share = common.digits(size["chunked"] / size["plain"])
    return {"what": "temporary bytes", **setup, **size, "chunked / plain": share}


def timing(tokens: int, width: int, vocabulary: int, dtype: str, rounds: int) -> list[dict]:
    """Seconds of both forms in turns, and how far their gradients are apart."""
    inputs = arrays(tokens, width, vocabulary, dtype)
    runs = {form: functools.partial(gradient(form), *inputs) for form in FORMS}
    got, want = (jax.tree.leaves(runs[form]()) for form in FORMS)
    apart = [float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(got, want, strict=True)]
    del got, want
    times = common.interleave(runs, rounds)
    setup = dict(tokens=tokens, width=width, vocabulary=vocabulary, dtype=dtype)
    names = ("loss", "hidden gradient", "table gradient")
    difference = dict(zip(names, np.round(apart, 9).tolist(), strict=True))
    rows = [{"what": "largest relative difference", **setup, **difference}]
    rows += [{"what": f"{f} seconds", **setup, **common.spread(times[f])} for f in FORMS]
    speed = common.ratio(times["plain"], times["chunked"])
    return [*rows, {"what": "plain / chunked seconds", **setup, **speed}]


def arguments(argv=None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=256_000)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="", help="JSON file for the results")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """All rows."""
    args = arguments(argv)
    size = (args.tokens, args.width, args.vocabulary)
    rows = [memory(*size, "float32"), *timing(*size, "float32", args.rounds)]
    rows += [memory(4096, 2304, args.vocabulary, dtype) for dtype in ("float32", "bfloat16")]
    for row in rows:
        common.show(row)
    options = f"--vocabulary={args.vocabulary} --tokens={args.tokens} --width={args.width}"
    common.save(
        args.out, f"python -m benchmarks.cross_entropy {options} --rounds={args.rounds}", rows
    )


if __name__ == "__main__":
    main()
