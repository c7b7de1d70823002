"""What main.py needs beside its flags: help, one-line errors, start-up. Imports no jax."""

import ast
import importlib
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from absl import flags

from configs import loading
from training import platform

MODES = ("train", "eval", "sample", "export", "dryrun")
USAGE = (
    "python main.py --config=configs/NAME.py[:variant[,key=value...]] [--workdir=DIR] "
    "[--mode=MODE] [--config.any.key=value]"
)


def list_configs() -> str:
    """Every config with its first docstring line, and how to run one."""
    lines = ["configs:"]
    for path in loading.list_configs():
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines.append(f"  configs/{path.name:<22} {doc.splitlines()[0] if doc else ''}".rstrip())
    first = loading.list_configs()
    name = "uniflud.py" if any(p.name == "uniflud.py" for p in first) else "NAME.py"
    lines += ["", f"run one:  python main.py --config=configs/{name}", f"usage:    {USAGE}"]
    return "\n".join([*lines, "help:     python main.py --help"])


def overview(values: flags.FlagValues) -> str:
    """The flags of main.py, one line each."""
    lines = [USAGE, ""]
    for name in ("workdir", "mode", "step", "prompt", "image", "topology", "debug_errors"):
        flag = values[name]
        lines.append(f"  --{name:<13} {flag.help.splitlines()[0].rstrip(';')}")
    lines += [
        "  --config.KEY    any config key, e.g. --config.optimizer.lr=1e-4 --config.mesh.fsdp=4",
        "",
        "The same command again continues a run. python main.py alone lists the configs.",
    ]
    return "\n".join(lines)


def spec_of(argv: list[str]) -> str:
    """The value of --config as typed."""
    for i, text in enumerate(argv):
        if text.startswith(("--config=", "-config=")):
            return text.partition("=")[2]
        if text in ("--config", "-config") and not "".join(argv[i + 1 : i + 2]).startswith("-"):
            argv[i : i + 2] = [f"--config={argv[i + 1]}"]
            return spec_of(argv)
    return ""


def default_workdir(spec: str) -> str:
    """'configs/x.py:debug,seq=8' -> 'runs/x-debug,seq=8'."""
    path, _, arg = spec.partition(":")
    return f"runs/{Path(path).stem}{'-' + arg.replace('/', '_') if arg else ''}"


def parse(values: flags.FlagValues, argv: list[str]):
    """Parse argv into `values`; returns the locked config."""
    if not spec_of(argv):
        raise ValueError(f"--config is missing. {USAGE}")
    loading.define_config_flag(values, argv)
    config, rest = loading.parse_flags(values, argv)
    if rest:
        raise ValueError(f"{rest[0]!r} is no flag; flags are written --name=value")
    flags.FLAGS.mark_as_parsed()  # grain reads absl's global flags
    return config


def start(mode: str) -> None:
    """Choose devices quietly and join the other hosts."""
    platform.before_jax()
    if mode in ("train", "eval", "sample"):
        platform.join_hosts()


def load(name: str) -> Callable:
    """'package.module:function'."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def check_mode(mode: str, task: str) -> None:
    """Modes beside train are about a trained model."""
    if mode != "train" and task != "train":
        raise ValueError(f"--mode={mode} is for configs of task train; this one is task {task!r}")


def task(tasks: dict[str, str], config, workdir: Path) -> None:
    """What config.task names."""
    if config.task not in tasks:
        raise ValueError(loading.unknown("config.task", config.task, tasks))
    function = load(tasks[config.task])
    if config.task == "runs":
        function(config, workdir, lambda job, folder: task(tasks, job, folder))
    else:
        function(config, workdir)


@contextmanager
def one_line_errors(debug: bool):
    """Turns an exception into one line and an exit code; programming errors keep their trace."""
    outcome = SimpleNamespace(code=0)
    try:
        yield outcome
    except (ValueError, LookupError, OSError, ImportError, ArithmeticError) as error:
        if debug:
            traceback.print_exc()
        line = loading.one_line(error)
        if isinstance(error, KeyError | ImportError):
            line = f"{type(error).__name__}: {line}"
        hint = "" if debug else "  (--debug_errors shows where)"
        print(f"error: {line}{hint}", file=sys.stderr)
        outcome.code = 1 if isinstance(error, ArithmeticError | OSError) else 2
        if isinstance(error, FileNotFoundError):
            outcome.code = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        outcome.code = 130
    except Exception as error:
        if type(error).__name__ != "Preempted":
            raise
        print(error, file=sys.stderr)
        outcome.code = error.code
