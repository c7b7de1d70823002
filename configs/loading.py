"""Find, load and override configs: through the same flags for main.py, notebooks and tests."""

import ast
import difflib
import re
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

ROOT = Path(__file__).resolve().parents[1]


def unknown(kind: str, name: str, allowed) -> str:
    """One line for a name that is not there: what was given, the nearest, and what is allowed."""
    allowed = sorted(map(str, allowed))
    near = difflib.get_close_matches(str(name), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Allowed: {', '.join(allowed) or 'none'}"


def typed(key: str, text: str, default: Any) -> Any:
    """Text as the type of the default."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text.capitalize() if isinstance(default, bool) else text)
        if isinstance(default, float) and isinstance(value, int):
            value = float(value)
        if type(value) is type(default):
            return value
    except (ValueError, SyntaxError):
        pass
    raise ValueError(f"config argument {key}={text!r} must be a {type(default).__name__}")


def one_line(error: Exception, limit: int = 10_000) -> str:
    """An error's text on one line, or its type where it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def find_config(spec: str) -> str:
    """'configs/x.py:arg', 'x.py:arg' or 'x:arg' -> existing path with the same argument."""
    name, colon, arg = spec.partition(":")
    for path in (Path(name), ROOT / name, ROOT / "configs" / name, ROOT / "configs" / f"{name}.py"):
        if path.suffix == ".py" and path.is_file():
            return f"{path}{colon}{arg}"
    raise FileNotFoundError(unknown("config", name, [f"configs/{p.name}" for p in list_configs()]))


def list_configs() -> list[Path]:
    """The config files a user can run, by name."""
    found = sorted((ROOT / "configs").glob("*.py"))
    return [p for p in found if "\ndef get_config(" in p.read_text("utf-8")]


def load_config(spec: str, *assignments: str, **overrides: Any) -> ConfigDict:
    """Load 'configs/x.py:variant' with 'key=value' texts and keyword overrides, locked.

    Dotted keys: load_config("configs/uniflud.py:debug", **{"optimizer.lr": 1e-4}, steps=20).
    """
    texts = [*assignments, *(f"{key}={value}" for key, value in overrides.items())]
    argv = ["config", f"--config={spec}", *(f"--config.{text}" for text in texts)]
    values = flags.FlagValues()
    define_config_flag(values, argv)
    return parse_flags(values, argv)[0]


def define_config_flag(values: flags.FlagValues, argv: list[str]) -> None:
    """--config and --config.any.key=value on `values`; rewrites argv's config to a real path."""
    for i, text in enumerate(argv):
        if text.startswith(("--config=", "-config=")):
            argv[i] = f"--config={find_config(text.partition('=')[2])}"
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)


def parse_flags(values: flags.FlagValues, argv: list[str]) -> tuple[ConfigDict, list[str]]:
    """(locked config, what is left of argv); a mistake is a ValueError of one line."""
    # Of a key that is set twice the last counts, also of a tuple, which the parser would extend.
    keys = [re.match(r"--?(config\.[^=]+)=", text) for text in argv]
    argv = list({key[1] if key else i: argv[i] for i, key in enumerate(keys)}.values())
    try:
        rest = values(argv)[1:]
        config = values["config"].value
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(_explain(error, argv)) from error
    if len(config.evals) == 1:  # --config.evals=a,b arrives as one text
        config.evals = tuple(name.strip() for name in config.evals[0].split(","))
    return config, rest


def _explain(error: Exception, argv: list[str]) -> str:
    """A parser's complaint as one line that names the key, the value and what is allowed."""
    text = " ".join(str(error).replace("\\n", " ").split())
    if "Error whilst parsing config file" in text:  # ml_collections wraps a whole traceback
        return str(error).strip().splitlines()[-1].partition(": ")[2]
    if isinstance(error, KeyError | AttributeError):
        name = re.search(r"\w+", text)
        pattern = rf"--?(?:no)?config\.((?:\w+\.)*{name.group() if name else ''})\b"
        typed = next((m for m in (re.match(pattern, a) for a in argv) if m), None)
        near = re.search(r'Did you mean "(\w+)"', text)
        hint = f" Did you mean {near.group(1)!r}?" if near else ""
        key = (typed or name).group(typed is not None)
        section = load_config(next(a for a in argv if a.startswith("--config=")).partition("=")[2])
        for part in key.split(".")[:-1]:
            section = section.get(part, {})
        return f"unknown config key {key!r}.{hint} Allowed: {', '.join(sorted(section))}"
    return text.replace("invalid literal for int() with base 10:", "must be a whole number, not")


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{'optimizer.lr': 0.001, ...}: every leaf by its dotted key."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
