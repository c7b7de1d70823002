"""What the comparisons with other packages share: processes, equality, turns, command line.

Every peer runs in a process of its own, a script of this folder driven like torch_peer.py. Outputs
are compared before anything is timed.
"""

import argparse
import contextlib
import functools
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, cpu_peers

# Largest difference allowed between the two sides, relative to an array's largest entry.
TOLERANCE = 1e-3


@contextlib.contextmanager
def processes(args, script: str, names):
    """A process of the script for each name."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name in names:
            found[name] = cpu_peers.Peer(args.torch_python, script)
            stack.callback(found[name].close)
        yield found


def answers(others, folder: Path, what: str, **options) -> dict[str, dict[str, np.ndarray]]:
    """Arrays of one call of every peer."""
    path, found = folder / "answer.npz", {}
    for name, peer in others.items():
        peer.ask("values", what=what, out=str(path), **options)
        with np.load(path) as arrays:
            found[name] = dict(arrays)
    return found


def apart(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """Largest difference of any array, relative to its largest entry; too large a one is an error.

    For whole numbers, tokens, it is the share that differs.
    """
    if mine.keys() != theirs.keys():
        raise ValueError(f"the sides differ in {sorted(mine.keys() ^ theirs.keys())}")
    largest = 0.0
    for name, array in mine.items():
        a, b = np.asarray(array), np.asarray(theirs[name])
        exact = np.issubdtype(a.dtype, np.integer)
        difference = (a != b).mean() if exact else np.abs(a - b).max() / np.abs(b).max()
        if not difference <= TOLERANCE:  # NaN is not
            raise ValueError(f"the sides compute different {name}: {difference:.2g} apart")
        largest = max(largest, difference)
    return common.digits(largest, 2)


def turns(mine: Callable, others, rounds: int, what: str, **options) -> dict:
    """Our seconds and the peers' for the call `what`, in turns."""
    cases = {"ours": functools.partial(common.clock, mine)}
    for name, peer in others.items():
        cases[name] = lambda peer=peer: peer.ask("clock", what=what, **options)["seconds"]
    return report(common.take_turns(cases, rounds), "ours")


def report(seconds: Mapping[str, list[float]], base: str) -> dict:
    """Median and quartiles of seconds, and of their ratios to those of `base`."""
    others = [name for name in seconds if name != base]
    return {
        "seconds": {name: common.spread(values) for name, values in seconds.items()},
        **{f"{name} / {base}": common.ratio(seconds[name], seconds[base]) for name in others},
    }


def parser(doc: str, sections: Mapping[str, Callable]) -> argparse.ArgumentParser:
    """Command line of a comparison."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument(
        "--torch-python", default=sys.executable, help="interpreter with the bench extra"
    )
    made.add_argument("--what", nargs="+", choices=list(sections), default=list(sections))
    made.add_argument("--threads", type=int, default=2, help="of all sides, by CPU affinity")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    made.add_argument("--out", default="", help="JSON file for the results")
    return made


def run(args, sections: Mapping[str, Callable], sizes: Any) -> list[dict]:
    """The rows of the chosen sections, each shown when it is there."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for what in args.what:
            for row in sections[what](args, sizes, Path(folder)):
                common.show(row)
                rows.append(row)
    return rows


def measure(args, run: Callable, command: str) -> None:
    """Pinned to the threads asked for; `command` without the options that all have."""
    cpu_peers.pin(args.threads)
    common.show({"machine": common.machine()})
    options = f"--what {' '.join(args.what)} --threads={args.threads} --rounds={args.rounds}"
    common.save(args.out, f"python -m {command} {options}", run(args))
