"""Every check and timing on the accelerator at hand, in minutes, as one JSON file.

    python -m benchmarks.accelerator [--quick] [--sections NAME ...] [--minutes=8] [--out=FILE]

Checks compare with a plain form of the same thing, float32 at full precision. Timings are bfloat16
and say which share of the chip's peak FLOP/s or bandwidth they reach: the vendor's peak where it is
known, otherwise that of a large product and a large copy, measured first. --quick takes sizes that
a CPU does in a few minutes. A section that fails is reported and the others go on; the exit code is
1 when a check failed or a section broke. The file is written after every section; those that are
not asked for keep their rows from an earlier run on such a device.
"""

import argparse
import json
import re
import sys
import time
import traceback
from pathlib import Path

import jax

from benchmarks import accelerator_checks as checks
from benchmarks import accelerator_models as whole
from benchmarks import accelerator_ops as ops
from benchmarks import accelerator_speed as speed
from benchmarks import common

# In this order; a section starts only while there is time.
SECTIONS = {
    "device": speed.device,
    "check_attention": checks.attention,
    "check_mlstm": checks.mlstm,
    **ops.CHECKS,
    "check_cross_entropy": checks.cross_entropy,
    "check_decode": checks.decode,
    "check_generation": checks.pictures,
    "check_training": checks.training,
    "attention": speed.attention,
    "mlstm": speed.mlstm,
    **ops.TIMINGS,
    "cross_entropy": speed.cross_entropy,
    "decode": speed.decode,
    "training": speed.training,
    "generation": speed.pictures,
    "long_decode": whole.long_decode,
    "infinity": whole.infinity,
}


def run_section(name: str, quick: bool, peaks: dict) -> list[dict]:
    """Rows of one section; an exception becomes a row."""
    begin = time.perf_counter()
    try:
        rows = SECTIONS[name](quick, peaks)
    except Exception as error:  # one section out of memory must not cost the others
        traceback.print_exc()
        rows = [{"what": "failed", "error": f"{type(error).__name__}: {error}"[:500]}]
    took = common.digits(time.perf_counter() - begin, 3)
    rows.append({"what": "section", "took_s": took})
    return [{"section": name, **row} for row in rows]


def passed(rows: list[dict]) -> bool:
    """No failed section and every check within its limit."""
    return not any("error" in row or row.get("passed") is False for row in rows)


def earlier(out: str, sections: list[str]) -> list[dict]:
    """Rows of the other sections in the file of an earlier run on such a device."""
    path = Path(out)
    if not out or not path.exists():
        return []
    found, now = json.loads(path.read_text()), common.machine()
    same = all(found["machine"][key] == now[key] for key in ("device", "devices", "jax"))
    return [row for row in found["rows"] if same and row["section"] not in sections]


def in_order(rows: list[dict]) -> list[dict]:
    """Rows in the order of SECTIONS."""
    names = list(SECTIONS)
    return sorted(rows, key=lambda row: names.index(row["section"]))


def arguments(argv=None) -> argparse.Namespace:
    """Command line of this benchmark."""
    names = list(SECTIONS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="sizes for a CPU")
    parser.add_argument("--sections", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no section after this")
    parser.add_argument(
        "--out", default=None, help="JSON file (benchmarks/results/accelerator-DEVICE.json)"
    )
    return parser.parse_args(argv)


def default_out(quick: bool) -> str:
    """Where results go without --out: a file named after the device; nowhere for --quick."""
    name = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
    return "" if quick else f"benchmarks/results/accelerator-{name}.json"


def main(argv=None) -> int:
    """The chosen sections; 0 when everything passed."""
    args = arguments(argv)
    begin, rows, peaks = time.perf_counter(), [], speed.vendor_peaks()
    command = "python -m benchmarks.accelerator" + (" --quick" if args.quick else "")
    out = default_out(args.quick) if args.out is None else args.out
    others = earlier(out, args.sections)
    for name in args.sections:
        if time.perf_counter() - begin > 60 * args.minutes:
            found = [{"section": name, "what": "left out", "reason": f"{args.minutes:g} minutes"}]
        else:
            found = run_section(name, args.quick, peaks)
        for row in found:
            common.show(row)
        rows += found
        common.save(out, command, in_order(others + rows))  # the machine may go at any time
    return 0 if passed(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
