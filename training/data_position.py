"""Where the data iterator stands in a checkpoint: one small JSON file per host."""

import json
from pathlib import Path
from typing import Any

import jax


def read_positions(folder: Path) -> dict[str, Any]:
    """{"0-of-2": iterator state, ...} as the hosts that saved them wrote it."""
    found = sorted(folder.glob("process_*-of-*.json"))
    if not found:
        raise FileNotFoundError(f"{folder} has no data position")
    return {p.stem.removeprefix("process_"): json.loads(p.read_text()) for p in found}


def set_position(iterator: Any, places: dict[str, Any]) -> None:
    """Continue `iterator` at this host's place.

    With another number of hosts it works when all hosts stood at the same place, which is so for
    data sets whose hosts share each global batch.
    """
    own = places.get(f"{jax.process_index()}-of-{jax.process_count()}")
    if own is None:
        own, *others = places.values()
        if any(other != own for other in others):
            raise ValueError(
                f"the checkpoint was made by {len(places)} hosts at different places of the data; "
                f"it cannot continue on {jax.process_count()} hosts"
            )
    iterator.set_state(own)
