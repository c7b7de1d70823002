"""From a config to everything a mode needs: data, model, objective, mesh, shapes."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from configs.loading import flatten, unknown
from eval import EVALUATORS
from input_pipeline import DATASETS
from models import MODELS
from training import ema, state
from training.checkpoint import Checkpoints
from training.frozen import load_frozen
from training.objectives import OBJECTIVES
from training.sharding import make_mesh, scope

# Keys that may differ between a checkpoint and the run that continues it.
FREE = {
    *("steps", "accumulate", "remat", "mesh", "init_from", "checkpoint", "log_every"),
    *("evals", "eval_every", "evaluation", "sample", "sample_every", "runs", "report"),
    *("tensorboard", "wandb", "profile"),
    *("data.dir", "data.cache_mb", "data.prefetch", "data.max_unreadable"),
}

USED = ("params", "ema", "extra")  # parts of a state that evaluation and samples need


class Setup(NamedTuple):
    """A run before its first step."""

    config: Any
    pipeline: Any
    model: Any
    objective: Any
    mesh: Any
    plan: state.Plan


def prepare(config, split: str = "train") -> Setup:
    """Build data, model and objective of a config; no parameter is made yet."""
    check(config)
    mesh = make_mesh(config.mesh)
    pipeline = _pick(DATASETS, "data", config)(
        config,
        split=split,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    config = with_vocabulary(config, pipeline)
    model = _pick(MODELS, "model", config)(config)
    objective = _pick(OBJECTIVES, "objective", config)(model, config)
    with scope(mesh):
        plan = state.plan(model, objective, config, mesh)
    return Setup(config, pipeline, model, objective, mesh, plan)


def _pick(table: dict, section: str, config):
    name = config[section].name
    if name not in table:
        raise ValueError(unknown(f"config.{section}.name", name, table))
    return table[name]


def check(config) -> None:
    """Mistakes that no later part would name well."""
    ways = jax.process_count() * config.accumulate
    for key in ("steps", "batch_size", "accumulate", "log_every"):
        if config[key] < 1:
            raise ValueError(f"config.{key}={config[key]} must be at least 1")
    if config.batch_size % ways:
        raise ValueError(
            f"config.batch_size={config.batch_size} must be a multiple of hosts x "
            f"config.accumulate = {jax.process_count()} x {config.accumulate}"
        )
    for rows, steps in config.ramp:
        if config.data.name != "text" or rows < 1 or rows % ways or steps < 1:
            raise ValueError(
                f"config.ramp has ({rows}, {steps}): allowed are rows in multiples of hosts x "
                f"config.accumulate = {ways} and steps >= 1, with config.data.name='text'"
            )
    for name in config.evals:
        if name not in EVALUATORS:
            raise ValueError(unknown("config.evals", name, EVALUATORS))
    if config.precision not in ("float32", "bfloat16"):
        raise ValueError(f"config.precision={config.precision!r} must be float32 or bfloat16")
    if config.checkpoint.every < 1 or config.checkpoint.keep < 1:
        raise ValueError(
            f"config.checkpoint.every={config.checkpoint.every} and config.checkpoint.keep="
            f"{config.checkpoint.keep} must be at least 1"
        )


def with_vocabulary(config, pipeline):
    """The config with model.vocab_size = 0 replaced by the data set's."""
    if "vocab_size" not in config.model:
        return config
    size = config.model.vocab_size
    if size == 0:
        config = config.copy_and_resolve_references()
        config.model.vocab_size = pipeline.vocab_size
        config.lock()
    elif size < pipeline.vocab_size:
        raise ValueError(
            f"config.model.vocab_size={size} is smaller than the tokenizer's "
            f"{pipeline.vocab_size} (0 takes it from the data)"
        )
    return config


def check_same(config, saved: dict, where: Path, only: tuple[str, ...] = ()) -> None:
    """Raise when a checkpoint was made with another config; the message lists the keys.

    A key that the checkpoint's config does not have was added to the code since, with a default
    that does what the code did before: it is named, not refused.
    """
    now, then = flatten(config), flatten(saved)

    def matters(key):
        head = key.partition(".")[0]
        return head in only if only else head not in FREE and key not in FREE

    plain = lambda v: list(v) if isinstance(v, tuple) else v  # noqa: E731
    lists = lambda v: [lists(x) for x in v] if isinstance(v, tuple | list) else v  # noqa: E731
    missing = "(absent)"
    different = [
        f"{key}={now.get(key, missing)} (checkpoint: {plain(then[key])})"
        for key in sorted(then)
        if matters(key) and lists(now.get(key, missing)) != lists(then[key])
    ]
    added = [f"{key}={now[key]}" for key in sorted(now.keys() - then.keys()) if matters(key)]
    if added and not different and jax.process_index() == 0:
        print(f"newer than the checkpoint in {where}: {', '.join(added)}", flush=True)
    if different:
        raise ValueError(
            f"the config does not match the checkpoint in {where}: {', '.join(different)}; "
            "choose another --workdir or the checkpoint's values"
        )


def restore(run: Setup, workdir: Path, checkpoints, iterator):
    """(state, frozen, meta) of the newest readable checkpoint, or None when there is none."""
    found = checkpoints.restore(
        run.plan.state, iterator, check=lambda meta: check_same(run.config, meta["config"], workdir)
    )
    if found is None:
        return None
    values, meta = found
    frozen = load_frozen(workdir, meta["frozen"], run.plan.frozen)
    return values, frozen, meta


def load_for_use(config, workdir: Path, step: int | None = None):
    """(run, params, step): what eval, sample and export need of a checkpoint.

    params are what model.predict takes: averaged where config.ema is on, frozen parts merged.
    The optimiser's state is never read.
    """
    run = prepare(config)
    like = {k: run.plan.state[k] for k in USED if k in run.plan.state}
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", write=False)
    try:
        with scope(run.mesh):
            only = ("model", "objective")
            found = checkpoints.restore(
                like,
                step=step,
                check=lambda meta: check_same(run.config, meta["config"], workdir, only),
            )
            if found is None:
                raise FileNotFoundError(
                    f"--workdir={workdir} holds no checkpoint; train first with --mode=train"
                )
            values, meta = found
            frozen = load_frozen(workdir, meta["frozen"], run.plan.frozen)
            return run, use_params(run, values, frozen), meta["step"]
    finally:
        checkpoints.close()


def use_params(run: Setup, values: Any, frozen: Any) -> Any:
    """Parameters for evaluation and samples out of a state (its averages, when it has them).

    A model whose parameters hold running statistics writes them in with predict["finalise"].
    """

    def use(values, frozen):
        params = run.objective.model_params(ema.merge(values), frozen)
        finalise = run.model.predict.get("finalise")
        return finalise(params, values["extra"]) if finalise else params

    return jax.jit(use)({k: values[k] for k in USED if k in values}, frozen)
