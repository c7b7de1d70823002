"""What tpu_static and gpu_static share: a child process per program, abstract inputs, the file.

Their figures come from compilers and do not depend on the machine, so the file names none.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def parser(doc: str) -> argparse.ArgumentParser:
    """--tokens, --out, and what the child process is asked for."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--tokens", type=int, default=8192)
    made.add_argument("--out", default="")
    made.add_argument("--one", default="", help=argparse.SUPPRESS)
    return made


def report(rows: Sequence[Mapping], command: str, out: str) -> None:
    """One JSON line a row, and all of them with their command in a file."""
    for row in rows:
        print(json.dumps(row))
    if out:
        Path(out).write_text(json.dumps({"command": command, "rows": list(rows)}, indent=1) + "\n")
        print(f"written to {out}")


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
