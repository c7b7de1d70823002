"""Where the data iterator stands in a checkpoint: one small JSON file per host."""

import json
from pathlib import Path
from typing import Any

import jax


def set_position(iterator: Any, folder: Path) -> None:
    """Continue `iterator` where the files in `folder` say.

    With another number of hosts it works when all hosts stood at the same place, which is so for
    data sets whose hosts share each global batch.
    """
    count, index = jax.process_count(), jax.process_index()
    own = folder / f"process_{index}-of-{count}.json"
    if not own.exists():
        found = sorted(folder.glob("process_*-of-*.json"))
        if not found:
            raise FileNotFoundError(f"{folder} has no data position")
        if len({path.read_text() for path in found}) > 1:
            raise ValueError(
                f"the checkpoint was made by {len(found)} hosts at different places of the data; "
                f"it cannot continue on {count} hosts"
            )
        own = found[0]
    iterator.set_state(json.loads(own.read_text()))
