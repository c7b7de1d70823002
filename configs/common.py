"""What every config shares: `base()` holds each default once, `parse_arg` reads the variant.

`load_config("configs/uniflud.py:debug", steps=20)` is how notebooks and tests get a config.
"""

from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from configs.data import data_config
from configs.evals import eval_config
from configs.loading import flatten, load_config, typed, unknown

__all__ = ["base", "flatten", "load_config", "parse_arg", "unknown"]
# Sections whose keys belong to one system; everywhere else an unknown key is a typo.
OPEN = ("model", "objective", "data", "sample", "optimizer.groups")


def base(**overrides: Any) -> ConfigDict:
    """Every default of every training config; nested dicts in `overrides` are merged in."""
    config = ConfigDict(
        dict(
            task="train",  # train | tokenizer | fit | curate | runs
            seed=0,
            steps=1000,
            batch_size=8,  # examples per step over all hosts
            ramp=((0, 0),)[:0],  # ((64, 2000), ...): 64 in the first 2,000 steps (data.name=text)
            model=dict(name=""),
            # model | low_rank (rank, alpha; globs of what gets adapters) | adversarial
            objective=dict(name="model", freeze=("",)[:0], rank=8, alpha=8.0, leaves=("*kernel",)),
            data=data_config(),
            optimizer=dict(
                name="adamw",  # adamw | muon (hidden matrices; adamw for all else)
                lr=1e-3,  # peak
                b1=0.9,
                b2=0.95,
                eps=1e-8,
                momentum=0.95,  # muon
                weight_decay=0.0,
                undecayed=("",)[:0],  # paths of matrices without it
                wd_mode="decoupled",  # decoupled | fully_decoupled (decay not times the peak lr)
                clip=1.0,  # global norm; 0 switches it off
                groups={},  # group -> dict(lr_scale=1.0, weight_decay_scale=1.0)
            ),
            schedule=dict(
                name="constant",  # constant | cosine | wsd | exp_linear | piecewise | from_file
                warmup=0,  # steps of linear warm-up
                final=0.0,  # last lr over the peak (cosine, wsd)
                decay=0,  # steps of the closing decay (wsd; to 0: exp_linear, cosine)
                shape="linear",  # of wsd's decay: linear | exponential | sqrt | sqrt_cube
                cycles=(0,)[:0],  # wsd: steps up to which it also decays, to go on at the peak
                rate=0.1,  # exp_linear: the lr is this share of the peak ...
                rate_steps=1000,  # ... at this step, falling since the warm-up
                boundaries=(0,)[:0],  # piecewise: at these steps ...
                factors=(0.0,)[:0],  # ... the lr becomes peak times these
                path="",  # from_file: .npy or .csv with a column lr, scaled to the peak
            ),
            ema=dict(decay=0.0, warmup=False, groups=("",)[:0]),  # decay 0: off; groups (): all
            mesh=dict(data=-1, fsdp=1, tensor=1, seq=1),  # -1: the devices that are left
            precision="float32",  # of the computation: float32 | bfloat16
            remat="none",
            accumulate=1,  # micro-batches per step
            init_from="",  # DIR, or "vae=FILE_OR_DIR,gemma=DIR"
            evals=("",)[:0],
            evaluation=eval_config(),
            eval_every=0,  # 0: at the end only
            sample=dict(prompts=("",)[:0]),
            sample_every=0,  # 0: at the end only
            checkpoint=dict(every=1000, keep=2, keep_every=0),
            log_every=10,
            tensorboard=False,
            wandb="",  # project name
            export=dict(
                dtype="",  # of model.safetensors: float32 | float16 | bfloat16, "" as trained
                part="",  # "body": only the parameters under body/, under their names there
            ),
            profile=(0, 0),  # (10, 5): trace 5 steps after step 10
            runs=((),)[:0],  # task runs: ((name, "configs/x.py:variant", ("key=value", ...)), ...)
            report="",  # task runs: the evaluator that writes the report
        )
    )
    _merge(config, overrides, "")
    return config


def _merge(config: ConfigDict, overrides: dict, where: str) -> None:
    """Write overrides into config; new keys only inside the sections named in OPEN."""
    section = where.rstrip(".")
    free = any(section == o or section.startswith(o + ".") for o in OPEN)
    for key, value in overrides.items():
        if key not in config and not free:
            raise ValueError(unknown("config key", where + key, [where + k for k in config]))
        if isinstance(config.get(key), ConfigDict) and isinstance(value, dict | ConfigDict):
            _merge(config[key], value, f"{where}{key}.")
        else:
            config[key] = value


def parse_arg(arg: str, variants=("debug",), **defaults: Any) -> SimpleNamespace:
    """'debug,seq=512' -> namespace(variant='debug', seq=512); types follow the defaults."""
    variants = ("", *(v for v in variants if v))
    values = {"variant": "", **defaults}
    for i, part in enumerate(p.strip() for p in (arg or "").split(",")):
        key, equals, text = part.partition("=")
        if not equals:
            if i > 0 or part not in variants:
                raise ValueError(unknown("variant", part, variants[1:]))
            values["variant"] = part
        elif key not in defaults:
            allowed = ", ".join(defaults) or "none"
            raise ValueError(
                f"unknown config argument {part!r}. Allowed: {allowed}; "
                f"any config key is set with --config.{key}={text}"
            )
        else:
            values[key] = typed(key, text, defaults[key])
    return SimpleNamespace(**values)
