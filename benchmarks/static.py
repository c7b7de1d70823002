"""What tpu_static and gpu_static share: a child process per program, abstract inputs, the file.

Their figures come from compilers and do not depend on the machine, so the file names none.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Program(NamedTuple):
    """Something to compile."""

    function: Callable
    arrays: Sequence[Any]  # abstract
    donate: Sequence[int] = ()


class TpuKernel(NamedTuple):
    """A Pallas kernel as it is found in the compiler's dump and in the program."""

    name: str
    steps: int  # of its grid
    # Of the loops in its body, in order: how often a grid step runs each, on average.
    trips: tuple[float, ...] = ()
    # What the mathematics asks of the vector unit and of that for exponentials, in registers of
    # 1024 numbers for the whole call; 0 where others bind.
    vector: float = 0.0
    exponentials: float = 0.0
    parallel: bool = True  # whether a chip's cores may divide the grid


class TpuOp(NamedTuple):
    """What tpu_static compiles of one op."""

    columns: Mapping[str, Any]  # of every kernel's row
    kernels: Mapping[str, TpuKernel]
    programs: Mapping[str, Program]  # the op with its kernels, fusions around them included
    uses: Mapping[str, Sequence[str]]  # kernels of each program
    # Some of them in plain XLA, for every chunk to try.
    xla: Mapping[str, Mapping[int, Program]]


class GpuProgram(NamedTuple):
    """What gpu_static compiles in one process."""

    function: Callable
    arrays: Sequence[Any]  # abstract
    kernels: Sequence[str]  # sorted; `op_` in front of each in the PTX
    columns: Mapping[str, Any]  # the whole program's limits
    temporaries: bool = True  # whether their size is reported


def parser(doc: str, ops: Iterable[str]) -> argparse.ArgumentParser:
    """--op, --tokens, --out, and what the child process is asked for."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--op", default=",".join(ops), help="a list; --out keeps the others' rows")
    made.add_argument("--tokens", type=int, default=8192)
    made.add_argument("--out", default="")
    made.add_argument("--one", default="", help=argparse.SUPPRESS)
    return made


def report(rows: Sequence[Mapping], command: str, out: str) -> None:
    """One JSON line a row, and all of them with their command in a file; rows of ops and chips (and
    comparisons) that did not run stay there. The command is the one for all of them."""
    for row in rows:
        print(json.dumps(row))
    if not out:
        return
    path, ran = Path(out), set(map(_where, rows))
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in before if _where(row) not in ran] + list(rows)
    rows.sort(key=_where)
    path.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    print(f"written to {out}")


def _where(row: Mapping) -> tuple[str, str, bool]:
    return row["op"], row.get("chip", ""), "compare" in row


def compile_gpu(topology, device, function: Callable, *inputs, donate=()):
    """A program compiled for a GPU that is described, not attached."""
    import jax

    from training import topology as topologies

    with jax.set_mesh(jax.sharding.Mesh([device], ("data",))):
        traced = jax.jit(function, donate_argnums=donate).trace(*inputs)
        lowered = traced.lower(lowering_platforms=("cuda",))
        return lowered.compile(topologies.compiler_options(topology))


def child(module: str, topology: str, flags: Sequence[str], env: Mapping[str, str]) -> str:
    """What `python -m module flags` prints with the compilers of this topology; dumps must be
    switched on by variables before jax is imported."""
    from training import topology as topologies

    where = topologies.parse(topology)
    topologies.check_installed(where)
    done = subprocess.run(
        [sys.executable, "-m", module, *flags],
        env=os.environ | topologies.environment(where) | dict(env),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{topology}: {done.stderr[-2000:]}")
    return done.stdout


def compiled_everywhere(
    module: str, compiled: Callable[[str], list[dict]], topologies: Sequence[str]
) -> list[dict]:
    """compiled("") here, then its rows for each topology, from processes that a module's --one
    starts and that print them as JSON."""
    rows = compiled("")
    for topology in topologies:
        rows += json.loads(child(module, topology, [f"--one={topology}"], {}).splitlines()[-1])
    return rows


def mlstm_7b(device, tokens: int):
    """(array(*sizes, dtype), (q, k, v, i, f)) on an unattached device: xLSTM 7B's head sizes, one
    sequence of 8 heads, bfloat16."""
    import jax
    import jax.numpy as jnp

    place = jax.sharding.SingleDeviceSharding(device)

    def array(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    lead = (1, 8, tokens)
    gates = [array(*lead, dtype=jnp.float32)] * 2
    return array, (array(*lead, 256), array(*lead, 256), array(*lead, 512), *gates)
