"""Ctrl-C: training stops at the end of an optimizer step and saves, so that resuming is exact."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from celora.machine.processes import any_of_them
from celora.train.processes import processes

_SAME_S = 1.0  # a signal this soon after another is the same one: launchers and supervisors repeat it


class StopAtStepEnd(TrainerCallback):  # type: ignore[misc]
    """The first Ctrl-C stops at the end of the step and saves, so that resuming is exact. The second stops at once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.asked = False
        self._last = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGINT, and SIGTERM by which a container or a cluster ends a run. In the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        alone = processes() == 1
        ended = signal.signal(signal.SIGTERM, self._on_signal if alone else self._on_end)
        before = signal.signal(signal.SIGINT, self._on_signal)
        failed = True
        try:
            yield
            failed = False
        finally:
            signal.signal(signal.SIGINT, before)
            # After a failure, one of several processes still has to say why it ends.
            if ended is not None and (alone or not failed):
                signal.signal(signal.SIGTERM, ended)

    def _on_end(self, *_: object) -> None:
        """The launcher is ending all processes. If one of them failed, the next collective notices and says so."""
        self.asked = True

    def _on_signal(self, number: int, _: object) -> None:
        now = time.monotonic()
        repeats = number == signal.SIGTERM or processes() > 1
        if self.asked and not (repeats and now - self._last <= _SAME_S):
            raise KeyboardInterrupt
        self._last = now
        if self.asked:
            return
        self.asked = True
        self.console.print("Stopping after this step (Ctrl-C again to stop without saving).", highlight=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        # All processes agree: one that got no signal would wait for the others.
        self.asked = any_of_them(self.asked, args.device)
        # A run that has done its last step is finished, even if the signal came during that step.
        if self.asked and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_save = True
