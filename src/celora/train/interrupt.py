"""Ctrl-C: training stops and saves at the end of an optimizer step, the only place from which resuming is exact."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from celora.train.processes import any_of_them, processes

_SAME_S = 1.0  # a launcher passes on the signal that the terminal has sent already


class StopAtStepEnd(TrainerCallback):  # type: ignore[misc]
    """The first Ctrl-C saves at the end of the step, where resuming is exact, and stops; the second stops at once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.asked = False
        self._last = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT while the body runs, and in company SIGTERM, too. Only the main thread may."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ended = signal.signal(signal.SIGTERM, self._on_end) if processes() > 1 else None
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if ended is not None:  # after a failure this process has still to say why it ends
            signal.signal(signal.SIGTERM, ended)

    def _on_end(self, *_: object) -> None:
        """The launcher ends all processes, perhaps because one has failed: that is for a collective to find and say."""
        self.asked = True

    def _on_signal(self, *_: object) -> None:
        now = time.monotonic()
        if self.asked and (processes() == 1 or now - self._last > _SAME_S):
            raise KeyboardInterrupt
        self._last = now
        if self.asked:
            return
        self.asked = True
        self.console.print("Stopping after this step (Ctrl-C again to stop without saving).", highlight=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self.asked = any_of_them(self.asked, args.device)  # or those that heard nothing would wait for the others
        # A finished run is finished, even if the signal came during its last step.
        if self.asked and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_save = True
