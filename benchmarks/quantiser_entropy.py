"""Entropy losses of LFQ (over all 2^d codes) and BSQ (bit by bit) as d grows: bytes and seconds.

    python -m benchmarks.quantiser_entropy --out=benchmarks/results/quantiser_entropy.json

Both entropies and their gradients for 8 pictures of 16 x 16 tokens, float32. Bytes are those of the
compiled program's temporaries, for this machine's CPU and for one v5e (15.75 GiB; needs the extra
`aot`); a program that does not fit says so. Seconds are this machine's, in turns; LFQ's for the
sizes that take less than `--limit` bytes. The published table (arXiv 2406.07548): LFQ 37.6 GB at 16
bits, 53.7 at 18, out of memory from 20 on; BSQ 32.4 throughout, a whole training step on one GPU.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp

from benchmarks import common, static

CHIPS = ("v5e:2x2",)
BITS = (8, 12, 14, 16, 18, 20, 32, 64)
PICTURES, SIDE, INV_TEMPERATURE = 8, 16, 100.0


def loss(quantiser: str, values):
    """H_token - H_code."""
    from models.tokenizers.quantisers import bits

    if quantiser == "bsq":
        token, code = bits.factorised_entropies(bits.unit(values), INV_TEMPERATURE)
    else:
        token, code = bits.joint_entropies(values, INV_TEMPERATURE)
    return token.mean() - code


def graded(quantiser: str):
    """Jitted loss and gradient."""
    return jax.jit(jax.value_and_grad(functools.partial(loss, quantiser)))


def compiled(topology: str) -> list[dict]:
    """Rows of one chip, or of this machine's CPU for an empty topology."""
    from models.tokenizers.quantisers.bits import JOINT_LIMIT
    from training import topology as topologies

    place, chip = None, "cpu"
    if topology:
        where = topologies.parse(topology)
        place, chip = jax.sharding.SingleDeviceSharding(topologies.devices(where)[0]), where.kind
    rows = []
    for d in BITS:
        for quantiser in ("bsq", "lfq"):
            row = dict(chip=chip, quantiser=quantiser, bits=d)
            shape = jax.ShapeDtypeStruct((PICTURES, SIDE, SIDE, d), jnp.float32, sharding=place)
            if quantiser == "lfq" and d > JOINT_LIMIT:
                scores = 4 * PICTURES * SIDE**2 * 2**d
                rows.append(row | dict(refused=f"{scores:.3g} bytes of scores"))
                continue
            try:
                program = graded(quantiser).lower(shape).compile()
            except jax.errors.JaxRuntimeError as error:
                rows.append(row | dict(does_not_fit=str(error).splitlines()[0][:200]))
                continue
            rows.append(row | dict(temporary_bytes=common.temp_bytes(program)))
    return rows


def timed(rows: list[dict], limit: int, rounds: int) -> list[dict]:
    """Seconds in turns; LFQ's, and their ratio to BSQ's, where its CPU row fits the limit."""
    fits = {
        row["bits"]
        for row in rows
        if row["chip"] == "cpu"
        and row["quantiser"] == "lfq"
        and row.get("temporary_bytes", limit) < limit
    }
    found = []
    for d in BITS:
        values = jax.random.normal(jax.random.key(d), (PICTURES, SIDE, SIDE, d))
        names = ("bsq", "lfq") if d in fits else ("bsq",)
        cases = {name: functools.partial(graded(name), values) for name in names}
        times = common.interleave(cases, rounds)
        for name, seconds in times.items():
            found.append(dict(what="seconds", quantiser=name, bits=d) | common.spread(seconds))
        if "lfq" in times:
            ratio = common.ratio(times["lfq"], times["bsq"])
            found.append(dict(what="lfq / bsq, seconds", bits=d) | ratio)
    return found


def arguments(argv=None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of CPU timing; 0: none")
    parser.add_argument("--limit", type=int, default=4 << 30, help="bytes of what is timed")
    parser.add_argument("--out", default="", help="JSON file for the results")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """All rows."""
    args = arguments(argv)
    if args.one:
        print(json.dumps(compiled(args.one)))
        return
    rows = static.compiled_everywhere("benchmarks.quantiser_entropy", compiled, CHIPS)
    if args.rounds:
        rows += timed(rows, args.limit, args.rounds)
    for row in rows:
        common.show(row)
    command = f"python -m benchmarks.quantiser_entropy --rounds={args.rounds}"
    common.save(args.out, command, rows)


if __name__ == "__main__":
    main()
