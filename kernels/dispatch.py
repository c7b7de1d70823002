"""How every op chooses among its implementations."""

import logging
from collections.abc import Callable, Mapping, Sequence

from kernels.errors import NotSupported

_logged: set[tuple[str, str]] = set()


def choose(
    op: str, impl: str, implementations: Mapping[str, Callable], auto: Sequence[str]
) -> tuple[Callable, str]:
    """(function, name) of a named implementation, or one that tries `auto` in order.

    A named implementation never falls back; "auto" goes on to the next only on NotSupported, and
    logs once what it took.
    """
    if impl != "auto":
        if impl not in implementations:
            allowed = ", ".join(implementations)
            raise ValueError(f"{op}: impl={impl!r}, allowed: auto, {allowed}")
        return implementations[impl], impl

    def first_that_can(*args, **kwargs):
        reasons = []
        for name in auto:
            try:
                out = implementations[name](*args, **kwargs)
            except NotSupported as error:
                reasons.append(f"{name}: {error}")
                continue
            if (op, name) not in _logged:
                _logged.add((op, name))
                logging.info("%s: impl=auto takes %s", op, name)
            return out
        raise NotSupported(f"{op}: no implementation takes this ({'; '.join(reasons)})")

    return first_that_can, "auto"
