"""SIGTERM and Ctrl-C: finish the step, save, stop. A second Ctrl-C stops at once."""

import signal
import threading
from contextlib import contextmanager

import jax


class Preempted(Exception):
    """The run was asked to stop; its checkpoint is saved. `code` is the exit code."""

    def __init__(self, signum: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(signum).name} at step {step}; the checkpoint is saved, "
            "the same command continues"
        )
        self.code = 128 + signum


class Interrupted(BaseException):
    """Raised inside an evaluation or a sampler, wherever it is, when the stop is asked for."""


class Watch:
    """Listens for the stop signals while it is entered.

    Before `guard` is set there is nothing to save: a signal ends the process at once.
    """

    def __init__(self):
        self.signum = 0
        self.guard = False
        self._inside = False
        self._old = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self  # a notebook's worker: only the main thread may listen
        for signum in (signal.SIGTERM, signal.SIGINT):
            if jax.process_count() > 1 and signum == signal.SIGTERM:
                continue  # jax's own service listens, so that all hosts stop at the same step
            self._old[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_):
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _note(self, signum, _frame):
        if not self.guard or self.signum == signal.SIGINT == signum:
            raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)
        self.signum = signum
        if self._inside and jax.process_count() == 1:
            self._inside = False
            raise Interrupted

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`; with several hosts they agree on the step."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.signum = signal.SIGTERM
                return True
            return False
        return bool(self.signum)

    @contextmanager
    def interruptible(self):
        """Code in here may be left at any line: it changes no state that is saved."""
        self._inside = True
        try:
            if self.signum and jax.process_count() == 1:
                raise Interrupted
            yield
        except Interrupted:
            pass
        finally:
            self._inside = False
