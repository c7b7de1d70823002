"""Seconds from the command to the first training step.

    python -m benchmarks.startup [--config=configs/uniflud.py:debug] [--rounds=3] [--out=FILE]

nothing cached: no prepared data, no compiled programs, as on a new machine.
cold:           data prepared, compile cache empty.
warm:           both there: the second run of the same command.
Each run is a process of its own with folders of its own, ended at the line that tells of the first
step. Imports count, the disk cache of the operating system is as it is.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import common

ROOT = Path(__file__).resolve().parents[1]
FIRST_STEP = re.compile(r"^first step after")


def first_step(config: str, folder: Path) -> float:
    """Seconds from starting main.py to its report of the first step; the process ends there."""
    workdir = folder / "workdir"
    shutil.rmtree(workdir, ignore_errors=True)
    caches = {
        "UNIFLUD_CACHE": str(folder / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, str(ROOT / "main.py"), f"--config={config}", f"--workdir={workdir}"]
    begin, lines = time.perf_counter(), []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | caches,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            for line in process.stdout:
                lines.append(line)
                if FIRST_STEP.match(line):
                    return time.perf_counter() - begin
        finally:
            process.kill()
    raise RuntimeError(f"{config} ended before its first step:\n" + "".join(lines[-20:]))


def measure(config: str, rounds: int) -> list[dict]:
    """One row per state of the caches, in turns."""
    seconds = {"nothing cached": [], "cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(rounds):
            for state, values in seconds.items():
                if state != "warm":
                    shutil.rmtree(folder / "compiled", ignore_errors=True)
                if state == "nothing cached":
                    shutil.rmtree(folder / "data", ignore_errors=True)
                values.append(first_step(config, folder))
    return [
        {"what": f"first step, {state}", "config": config, "seconds": common.spread(values)}
        for state, values in seconds.items()
    ]


def arguments(argv=None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/uniflud.py:debug")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="", help="JSON file for the results")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """All rows."""
    args = arguments(argv)
    rows = measure(args.config, args.rounds)
    for row in rows:
        common.show(row)
    options = f"--config={args.config} --rounds={args.rounds}"
    common.save(args.out, f"python -m benchmarks.startup {options}", rows)


if __name__ == "__main__":
    main()
