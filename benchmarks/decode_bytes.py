"""What one step of decoding reads and writes: Hymba 1.5B beside the Llama 3.2 3B of its paper.

    python -m benchmarks.decode_bytes --out=benchmarks/results/decode_bytes.json

The step of --rows rows behind --length tokens (the paper's 128 and 8,192), bfloat16 weights, is
compiled for one device; its bytes are those of every fusion, kernel and copy, with every turn of
the scan over layers, that are in the device's memory (eval/hlo.py). Beside them: the state that
a row carries along, the least a step can move (weights and state read once), and the dry run's
estimate of the time. --llama-rows: fewer rows for the Llama, where 128 do not fit the device; its
bytes at --rows follow, as weights are read once whatever the rows. Nothing runs. Needs the extra
`aot`; minutes a model and device. --cache only prints one sequence's cache in Hymba 1.5B, in the
paper's two conventions and as it is held here (models/hymba_build.py): seconds.
"""

import argparse
import json
from pathlib import Path

from benchmarks import static

MODELS = {"Hymba 1.5B": "configs/hymba.py:1.5b_8k", "Llama 3.2 3B": "configs/llama.py:llama3.2_3b"}
PAPER = dict(cache=11.67, throughput=3.49)


def arguments(argv=None):
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="h100:1,v5p:1x1x1")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--llama-rows", default="128,64", help="of each topology")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--out", default="")
    parser.add_argument("--cache", action="store_true", help="only Hymba's cache, by convention")
    parser.add_argument("--debug", action="store_true", help="tiny models")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """Each step in a process of its own; what is done is written."""
    args = arguments(argv)
    if args.one:
        print(json.dumps(step(args)))
        return
    if args.cache:
        print(json.dumps(cache(args.length)))
        return
    rows, command = [], "python -m benchmarks.decode_bytes"
    fewer = args.llama_rows.split(",")
    for topology, few in zip(args.topology.split(","), fewer, strict=True):
        both = [
            _process(model, topology, n, args) for model, n in zip(MODELS, (args.rows, int(few)))
        ]
        rows += [*both, compare(*both, args.rows)]
        for row in rows[-3:]:
            print(json.dumps(row))
        if args.out:
            text = json.dumps({"command": command, "rows": rows}, indent=1)
            Path(args.out).write_text(text + "\n")


def _process(model: str, topology: str, rows: int, args) -> dict:
    flags = [f"--one={model}", f"--topology={topology}", f"--rows={rows}"]
    flags += [f"--length={args.length}"] + ["--debug"] * args.debug
    return json.loads(static.child("benchmarks.decode_bytes", topology, flags, {}).splitlines()[-1])


def step(args) -> dict:
    """Bytes and estimated seconds of one model's step."""
    from configs.common import load_config
    from training import dryrun

    spec = MODELS[args.one]
    changes = {"batch_size": 1, "data.length": args.length, "sample.rows": args.rows}
    spec = spec.partition(":")[0] + ":debug" if args.debug else spec
    found = dryrun.sampler(load_config(spec, **changes), args.topology)
    row = dict(model=args.one, topology=args.topology, rows=args.rows, tokens=args.length)
    row |= {k: found[k] for k in ("weight_bytes", "moved_bytes", "total_bytes", "seconds")}
    return row | dict(state_bytes_per_row=found["state_bytes"] // args.rows)


def cache(tokens: int) -> dict[str, int]:
    """Bytes of one sequence's cache in Hymba 1.5B behind `tokens` tokens, by convention."""
    from models import hymba, hymba_build

    return dict(tokens=tokens) | hymba_build.cache_report(hymba.SIZES["1.5b"], tokens)


def compare(ours: dict, theirs: dict, rows: int) -> dict:
    """Ratios of the state and of the bytes a token, both steps at `rows` rows."""

    def per_token(row):
        moved, weights = row["moved_bytes"], row["weight_bytes"]
        return weights / rows + (moved - weights) / row["rows"]

    def least(row):
        return row["weight_bytes"] / rows + row["state_bytes_per_row"]

    return {
        "compare": "Llama 3.2 3B / Hymba 1.5B", "topology": ours["topology"], "rows": rows,
        "state": theirs["state_bytes_per_row"] / ours["state_bytes_per_row"],
        "bytes_per_token": per_token(theirs) / per_token(ours),
        "least_bytes_per_token": least(theirs) / least(ours),
        "paper": PAPER,
    }  # fmt: skip


if __name__ == "__main__":
    main()
