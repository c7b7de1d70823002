"""What the H100 compilers make of the kernels: registers, spills, wgmma, TMA; no GPU is needed.

    python -m benchmarks.gpu_static --out=benchmarks/results/gpu_static.json

For every kernel of the mLSTM, forward and backward at xLSTM 7B's head sizes: ptxas's report, wgmma
and TMA instructions in the PTX, and the least time that the chip's peak and memory bandwidth allow
for the FLOPs and bytes of the whole call. How long it takes, only a GPU can say
(`python -m benchmarks.accelerator`). Needs the extra `aot`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"^\.visible \.entry mlstm_(\w+?)_mosaic_gpu_kernel", re.M)
# Kernels of each program; C is computed again for the gradient.
USES = {"forward": ["C", "h"], "forward + backward": ["C", "C", "dC", "dk", "dq", "dv", "h"]}


def arguments(argv=None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", default="")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """Compiles in a process of its own: dumps are switched on before jax is imported."""
    args = arguments(argv)
    if args.one:
        return compile_one(args.one, args.tokens)
    rows = [row for program in USES for row in _program(program, args.tokens)]
    for row in rows:
        print(json.dumps(row))
    if args.out:
        command = f"python -m benchmarks.gpu_static --tokens={args.tokens}"
        text = json.dumps({"command": command, "rows": rows}, indent=1)
        Path(args.out).write_text(text + "\n")
        print(f"written to {args.out}")


def _program(program: str, tokens: int) -> list[dict]:
    from training import topology

    where = topology.parse("h100:1")
    topology.check_installed(where)
    env = os.environ | topology.environment(where)
    env |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu_static", f"--one={program}"]
    done = subprocess.run([*command, f"--tokens={tokens}"], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    rows = kernels(done.stdout)
    if sorted(row["kernel"] for row in rows) != USES[program]:
        raise SystemExit(f"{program}: the kernels are {[row['kernel'] for row in rows]}")
    rows.append(json.loads(done.stdout.splitlines()[-1]))
    return [dict(program=program) | row for row in rows]


def kernels(text: str) -> list[dict]:
    """One row per kernel, from the PTX and ptxas's reports that were printed."""
    starts = [m.start() for m in ENTRY.finditer(text)]
    rows = []
    for begin, end in zip(starts, [*starts[1:], len(text)]):
        part = text[begin:end]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        rows.append(
            dict(
                kernel=ENTRY.match(part)[1],
                registers=int(re.search(r"Used (\d+) registers", part)[1]),
                spill_stores=int(spills[1]),
                spill_loads=int(spills[2]),
                spills_in_loops=_in_loops(part) and int(spills[1]) > 0,
                wgmma=len(re.findall(r"wgmma\.mma_async", part)),
                tma=len(re.findall(r"cp\.async\.bulk\.tensor", part)),
            )
        )
    return rows


def _in_loops(ptx: str) -> bool:
    """Whether a wgmma stands between a label and a later jump back to it."""
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$\w+):", ptx, re.M)}
    for jump in re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+);", ptx):
        begin = labels.get(jump[1], len(ptx))
        if begin < jump.start() and "wgmma.mma_async" in ptx[begin : jump.start()]:
            return True
    return False


def compile_one(program: str, tokens: int) -> None:
    """Compiles one program; its last line is its cost beside the chip's limits."""
    import jax
    import jax.numpy as jnp

    from kernels.mlstm import mlstm
    from training import topology

    where = topology.parse("h100:1")
    place = jax.sharding.SingleDeviceSharding(topology.devices(where)[0])
    b, h, t, k, v, length = 1, 8, tokens, 256, 512, 128

    def array(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    gates = [array(b, h, t, dtype=jnp.float32)] * 2
    inputs = (array(b, h, t, k), array(b, h, t, k), array(b, h, t, v), *gates)

    def loss(*x):
        return (mlstm(*x, impl="gpu")[0].astype(jnp.float32) ** 2).sum()

    backward = program != "forward"
    function = jax.grad(loss, argnums=(0, 1, 2, 3, 4)) if backward else loss
    with topology.described(where):
        traced = jax.jit(function).trace(*inputs)
        compiled = traced.lower(lowering_platforms=("cuda",)).compile(
            topology.compiler_options(where)
        )
    # Per token and head: products of 2 FLOPs; half of the scores are never needed.
    scores, values, memory = length * k, length * v, k * v
    flops, moved = scores + values + 4 * memory, 2 * (2 * k + 2 * v)
    if backward:
        flops += 3 * scores + 3 * values + 10 * memory
        moved += 2 * (4 * k + 3 * v)
    chip = where.chip
    row = dict(
        tokens=t,
        ms_matrix_unit=round(b * h * t * flops / chip.peak * 1e3, 3),
        ms_memory=round(b * h * t * moved / chip.hbm_rate * 1e3, 3),
        temporary_mib=round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
    )
    print("\n" + json.dumps(row))


if __name__ == "__main__":
    main()
