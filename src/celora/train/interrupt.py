"""Ctrl-C, SIGTERM or a closed terminal: training stops at the end of a step and saves, so that resuming is exact."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from celora.machine.processes import any_of_them
from celora.train.processes import processes

_SAME_S = 1.0  # a signal this soon after another is the same one: launchers and supervisors repeat it


def like_ctrl_c() -> contextlib.AbstractContextManager[None]:
    """Take whatever ends a command from outside for Ctrl-C, so that what is done is saved."""
    return _handling(_ends(), _interrupt)


def _interrupt(*_: object) -> None:
    for number in _ends():
        signal.signal(number, signal.SIG_IGN)  # a closed terminal may send several
    raise KeyboardInterrupt


def _ends() -> list[signal.Signals]:
    """SIGTERM, by which containers and clusters end a run, and SIGHUP of a closed terminal unless nohup ignores it."""
    closed = getattr(signal, "SIGHUP", None)  # Windows has none
    return [signal.SIGTERM, *([] if closed is None or signal.getsignal(closed) is signal.SIG_IGN else [closed])]


@contextlib.contextmanager
def _handling(
    signals: Iterable[signal.Signals],
    handler: Callable[[int, FrameType | None], object],
    *,
    after_failures: bool = False,
) -> Iterator[None]:
    """Handle these signals while the body runs. In the main thread only; others cannot.

    `after_failures`: keep the handler if the body fails.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    failed = True
    try:
        yield
        failed = False
    finally:
        for number, earlier in before.items():
            if earlier is not None and not (failed and after_failures):  # None: Python did not set it
                signal.signal(number, earlier)


class StopAtStepEnd(TrainerCallback):  # type: ignore[misc]
    """The first Ctrl-C stops at the end of the step and saves, so that resuming is exact. The second stops at once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.asked = False
        self._last = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle Ctrl-C, and what ends a run from outside. In the main thread only."""
        alone = processes() == 1
        with (
            _handling([signal.SIGINT], self._on_signal),
            # After a failure, one of several processes still has to say why it ends.
            _handling(_ends(), self._on_signal if alone else self._on_end, after_failures=not alone),
        ):
            yield

    def _on_end(self, *_: object) -> None:
        """The launcher is ending all processes. If one of them failed, the next collective notices and says so."""
        self.asked = True

    def _on_signal(self, number: int, _: object) -> None:
        now = time.monotonic()
        repeats = number != signal.SIGINT or processes() > 1
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
