"""The selective scan, SSD and attention, here and as torch has them, on the same two cores.

    python -m benchmarks.scan_peers [--torch-python=PYTHON] [--what SECTION ...] [--out=F]

| section | what takes turns |
| --- | --- |
| associative | the scan in chunks, token by token, as one associative scan; temporary bytes |
| mamba | forward and backward: ours, transformers' Mamba path in torch |
| mamba2 | forward and backward in chunks: ours, transformers' Mamba-2 path in torch |
| attention | forward and backward, causal, grouped heads: ours, torch's |
| window | attention under a window against the whole row, ours |

float32. Inputs are the same on both sides, outputs and gradients are compared before anything is
timed. On a machine with other load take --threads=1, for the reason that cpu_peers gives.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, peers
from kernels.attention import MaskSpec, attention
from kernels.selective_scan import selective_scan
from kernels.ssd import ssd

# rows, tokens and: channels, states; heads, head size, states; heads, key heads, head size
FULL = dict(scan=(2, 2048, 256, 16), ssd=(2, 2048, 8, 64, 128), attention=(1, 2048, 8, 2, 64))
TINY = dict(scan=(1, 64, 8, 4), ssd=(1, 64, 2, 8, 8), attention=(1, 64, 4, 2, 8))


def graded(run: Callable, arrays: Mapping[str, np.ndarray]) -> Callable:
    """Jitted () -> y and the gradients by name, as scan_torch.Graded gives them."""
    arrays = {k: jnp.asarray(x) for k, x in arrays.items()}
    dy = arrays.pop("dy")

    def both(inputs, dy):
        y, pullback = jax.vjp(lambda x: run(**x), inputs)
        return {"y": y, **pullback(dy)[0]}

    return functools.partial(jax.jit(both), arrays, dy)


def temp_bytes(run: functools.partial) -> int:
    """Of the compiled program."""
    return common.temp_bytes(run.func.lower(*run.args).compile())


def against(args, what: str, shape, arrays, run, folder: Path, **options) -> dict:
    """Our forward and backward beside the peer's, once they agree."""
    arrays = {k: x.astype(np.float32) for k, x in arrays.items()}
    path, mine = str(folder / f"{what}.npz"), graded(run, arrays)
    np.savez(path, **arrays)
    with peers.processes(args, "scan_torch.py", (what,)) as others:
        packages = others[what].ask(
            "build", kind=what, threads=args.threads, inputs=path, **options
        )
        same = peers.apart(mine(), peers.answers(others, folder, "gradients")[what])
        row = dict(what=what, shape=shape, packages=packages, largest_difference=same, **options)
        return row | peers.turns(mine, others, args.rounds, "gradients")


def scan_inputs(shape) -> dict[str, np.ndarray]:
    """Of a Mamba: steps around 0.1, decays of -1 to -N."""
    (rows, tokens, channels, states), rng = shape, np.random.default_rng(0)
    wide, narrow = (rows, tokens, channels), (rows, tokens, states)
    found = {"u": wide, "delta": wide, "B": narrow, "C": narrow, "z": wide, "dy": wide}
    found = {name: rng.normal(size=size) for name, size in found.items()}
    found["A"] = -np.tile(np.arange(1.0, states + 1), (channels, 1))
    return found | {"D": np.ones(channels), "bias": np.full(channels, -2.0)}


def scanned(u, delta, A, B, C, D, z, bias, **options):
    """y of our scan."""
    return selective_scan(u, delta, A, B, C, D, z=z, delta_bias=bias, **options)[0]


def at_once(u, delta, A, B, C, D, z, bias):
    """One associative scan over [B, T, E, N], differentiated by JAX."""
    delta = jax.nn.softplus(delta + bias)
    a = jnp.exp(delta[..., None] * A)
    b = (delta * u)[..., None] * B[:, :, None]
    h = jax.lax.associative_scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (a, b), axis=1)[1]
    return ((h * C[:, :, None]).sum(-1) + D * u) * jax.nn.silu(z)


def associative(args, sizes, folder: Path) -> list[dict]:
    """Time and temporary bytes of the three ways."""
    arrays = {k: x.astype(np.float32) for k, x in scan_inputs(sizes["scan"]).items()}
    ways = {
        "chunks": graded(scanned, arrays),
        "token by token": graded(functools.partial(scanned, impl="ref"), arrays),
        "one associative scan": graded(at_once, arrays),
    }
    values = {name: run() for name, run in ways.items()}
    row = dict(what="associative", shape=sizes["scan"])
    row["largest_difference"] = max(peers.apart(values["chunks"], v) for v in values.values())
    row["temp_bytes"] = {name: temp_bytes(run) for name, run in ways.items()}
    return [row | peers.report(common.interleave(ways, args.rounds), "chunks")]


def mamba(args, sizes, folder: Path) -> list[dict]:
    """Against transformers' Mamba path."""
    arrays = scan_inputs(sizes["scan"])
    return [against(args, "mamba", sizes["scan"], arrays, scanned, folder)]


def mamba2(args, sizes, folder: Path) -> list[dict]:
    """Against transformers' Mamba-2 path, in chunks of its default."""
    (rows, tokens, heads, size, states), rng = sizes["ssd"], np.random.default_rng(0)
    wide, narrow = (rows, tokens, heads, size), (rows, tokens, 1, states)
    arrays = {"x": wide, "delta": wide[:3], "B": narrow, "C": narrow, "dy": wide}
    arrays = {name: rng.normal(size=x) for name, x in arrays.items()}
    arrays |= {"A": -np.linspace(1, 16, heads), "D": np.ones(heads), "bias": np.full(heads, -4.0)}

    def run(x, delta, A, B, C, D, bias):
        return ssd(x, delta, A, B, C, D, delta_bias=bias)[0]

    chunk = min(256, tokens)
    return [against(args, "mamba2", sizes["ssd"], arrays, run, folder, chunk=chunk)]


def attention_inputs(shape) -> dict[str, np.ndarray]:
    """Random q, k, v and dy."""
    (rows, tokens, heads, groups, size), rng = shape, np.random.default_rng(0)
    wide, narrow = (rows, tokens, heads, size), (rows, tokens, groups, size)
    names = {"q": wide, "k": narrow, "v": narrow, "dy": wide}
    return {name: rng.normal(size=x) for name, x in names.items()}


def attend(args, sizes, folder: Path) -> list[dict]:
    """Against torch's scaled_dot_product_attention."""

    def run(q, k, v):
        return attention(q, k, v, MaskSpec())

    arrays = attention_inputs(sizes["attention"])
    return [against(args, "attention", sizes["attention"], arrays, run, folder)]


def window(args, sizes, folder: Path) -> list[dict]:
    """An eighth of the row or all of it before a token: time and temporary bytes."""
    shape = sizes["attention"]
    arrays = {k: x.astype(np.float32) for k, x in attention_inputs(shape).items()}
    near = shape[1] // 8
    ways = {
        name: graded(functools.partial(attention, mask=MaskSpec(window=size)), arrays)
        for name, size in ((f"window of {near}", near), ("whole row", None))
    }
    row = dict(what="window", shape=shape)
    row["temp_bytes"] = {name: temp_bytes(run) for name, run in ways.items()}
    return [row | peers.report(common.interleave(ways, args.rounds), f"window of {near}")]


SECTIONS = {
    "associative": associative,
    "mamba": mamba,
    "mamba2": mamba2,
    "attention": attend,
    "window": window,
}


def arguments(argv=None):
    """Command line of this benchmark."""
    return peers.parser(__doc__, SECTIONS).parse_args(argv)


def run(args) -> list[dict]:
    """The rows of the chosen sections."""
    return peers.run(args, SECTIONS, TINY if args.tiny else FULL)


def main(argv=None) -> None:
    """Measure and save."""
    peers.measure(arguments(argv), run, "benchmarks.scan_peers")


if __name__ == "__main__":
    main()
