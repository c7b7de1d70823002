"""Runs a config's evaluators, writes eval/<step>.json, prints results with chance levels beside."""

import json
import os
import time
from pathlib import Path

import jax

from eval import EVALUATORS

# Suffixes of keys that are no result but the level to compare one with.
REFERENCES = (
    "chance",
    "unigram",
    "majority",
    "mean_picture",
    "real",
    "tokenizer",
    "xz",
    "xz_trained",
)


def run_all(config, model, params, *, step, rng, workdir, interrupted=None) -> dict[str, float]:
    """Every evaluator of config.evals -> {"name/metric": value}; also writes and prints them.

    `interrupted()` is asked before each evaluator: when it says yes, what is missing is not
    computed and nothing is written, so that the next start evaluates this step again.
    """
    evaluators = {name: _evaluator(name, config) for name in config.evals}
    results: dict[str, float] = {}
    for name, evaluate in evaluators.items():
        if interrupted is not None and interrupted():
            return results
        begin = time.monotonic()
        metrics = evaluate(model, params, step=step, rng=rng, workdir=Path(workdir))
        if metrics is None:  # it has said what it lacks
            continue
        metrics["seconds"] = time.monotonic() - begin
        results |= {f"{name}/{key}": float(value) for key, value in metrics.items()}
    if jax.process_index() == 0:
        write_json(Path(workdir) / "eval" / f"{step}.json", {"step": step, **results})
        print(table(results, title=f"evaluation at step {step}"), flush=True)
    return results


def _evaluator(name, config):
    if name not in EVALUATORS:
        raise ValueError(f"config.evals={name!r}: allowed are {', '.join(EVALUATORS)}")
    return EVALUATORS[name](config)


def write_json(path: Path, value) -> None:
    """Write JSON by one rename, so that readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(scratch, path)


def table(results: dict[str, float], title: str) -> str:
    """One line per result, its chance level or baseline beside it; seconds beside the name."""
    references: dict[str, list[str]] = {}
    for key, value in results.items():
        for suffix in REFERENCES:
            head = key.removesuffix(f"_{suffix}")
            if head != key and head in results:
                label = suffix.replace("_", " ")
                references.setdefault(head, []).append(f"{label} {value:.4g}")
    shown = {f"{head}_{suffix}" for head in references for suffix in REFERENCES}
    rows, group = [title], None
    for key, value in results.items():
        name, _, metric = key.partition("/")
        if name != group:
            group = name
            rows.append(f"  {name} ({results.get(f'{name}/seconds', 0.0):.1f} s)")
        if key not in shown and metric != "seconds":
            beside = ", ".join(references.get(key, ()))
            rows.append(f"    {metric:<34} {value:>9.4g}{beside and '   ' + beside}")
    return "\n".join(rows)
