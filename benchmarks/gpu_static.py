"""What the H100 compilers make of the kernels: registers, spills, wgmma, TMA; no GPU is needed.

    python -m benchmarks.gpu_static --out=benchmarks/results/gpu_static.json

For every kernel of the mLSTM, forward and backward at xLSTM 7B's head sizes: ptxas's report, wgmma
and TMA instructions in the PTX, and the least time that the chip's peak and memory bandwidth allow
for the FLOPs and bytes of the whole call. How long it takes, only a GPU can say
(`python -m benchmarks.accelerator`). Needs the extra `aot`.
"""

import json
import re

from benchmarks import static

CHIP = "h100:1"
ENTRY = re.compile(r"^\.visible \.entry mlstm_(\w+?)_mosaic_gpu_kernel", re.M)
# Kernels of each program; C is computed again for the gradient.
USES = {"forward": ["C", "h"], "forward + backward": ["C", "C", "dC", "dk", "dq", "dv", "h"]}


def arguments(argv=None):
    """Command line of this benchmark."""
    return static.parser(__doc__).parse_args(argv)


def main(argv=None) -> None:
    """Compiles each program in a process of its own."""
    args = arguments(argv)
    if args.one:
        return compile_one(args.one, args.tokens)
    rows = [row for program in USES for row in _program(program, args.tokens)]
    static.report(rows, f"python -m benchmarks.gpu_static --tokens={args.tokens}", args.out)


def _program(program: str, tokens: int) -> list[dict]:
    flags = [f"--one={program}", f"--tokens={tokens}"]
    dumps = {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    printed = static.child("benchmarks.gpu_static", CHIP, flags, dumps)
    rows = kernels(printed)
    if sorted(row["kernel"] for row in rows) != USES[program]:
        raise SystemExit(f"{program}: the kernels are {[row['kernel'] for row in rows]}")
    rows.append(json.loads(printed.splitlines()[-1]))
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

    where = topology.parse(CHIP)
    device = topology.devices(where)[0]
    _, inputs = static.mlstm_7b(device, tokens)
    (b, h, t, k), v, length = inputs[0].shape, inputs[2].shape[3], 128

    def loss(*x):
        return (mlstm(*x, impl="gpu")[0].astype(jnp.float32) ** 2).sum()

    backward = program != "forward"
    function = jax.grad(loss, argnums=(0, 1, 2, 3, 4)) if backward else loss
    with jax.set_mesh(jax.sharding.Mesh([device], ("data",))):
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
