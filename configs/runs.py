"""Lists of runs, which configs/*_ablations.py are made of. Not a config."""

from ml_collections import ConfigDict

from configs import common

SEEDS = (0, 1, 2)


def ablation(spec: str, groups: dict, extra=(), columns=(), seeds=SEEDS) -> ConfigDict:
    """Task `runs`: `spec` with (*extra, *overrides) for every group's overrides and every seed,
    then a table of these metrics."""
    runs = tuple(
        (f"{group}/seed{seed}", spec, (*extra, *overrides, f"seed={seed}"))
        for group, overrides in groups.items()
        for seed in seeds
    )
    table = dict(metrics=columns)
    return common.base(
        task="runs", runs=runs, report="ablation_table", evaluation=dict(table=table)
    )
