"""The clock of optimizer steps. A step of the optimizer is the only event that all training loops have in common.

With checkpointing, accumulation and evaluation, `forward` is called a different number of times for each step. The
optimizer steps once. The clock uses torch's global post-step hook, which the first running clock installs and the last
removes. It counts the steps of optimizers that have a parameter of its model.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

_running: weakref.WeakSet[StepClock] = weakref.WeakSet()
_handle: RemovableHandle | None = None
_numbers = itertools.count()


class StepClock:
    """Calls `on_step(step)` after each optimizer step of the model with parameters `parameters()`.

    The clock asks for the parameters when an unknown optimizer steps, because sharding and new adapters replace
    parameters. Several optimizers of different parameters of one model make one step together. The next step begins
    when a parameter is stepped a second time. `on_other()` is called for steps that belong to no model with a running
    clock. All callables are bound methods, and referred to weakly, because their object owns the clock.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[nn.Parameter]],
        on_step: Callable[[int], None],
        on_other: Callable[[], None],
        *,
        step: int = 0,
    ) -> None:
        self.step = step
        self._parameters = weakref.WeakMethod(parameters)
        self._on_step = weakref.WeakMethod(on_step)
        self._on_other = weakref.WeakMethod(on_other)
        self._mine: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._stepped: set[int] = set()
        self._number = next(_numbers)

    def start(self) -> None:
        """Begin to count."""
        global _handle
        _running.add(self)
        weakref.finalize(self, _release_hook).atexit = False
        if _handle is None:
            _handle = register_optimizer_step_post_hook(_tell_clocks)

    def stop(self) -> None:
        """Stop counting. The last clock that stops, or is deleted, removes the global hook."""
        _running.discard(self)
        _release_hook()

    def advance(self) -> None:
        """Count one step by hand, for engines whose optimizer has none of the model's own parameters."""
        self.step += 1
        if (on_step := self._on_step()) is not None:
            on_step(self.step)

    def _saw(self, optimizer: Optimizer) -> bool:
        """Count this optimizer's step if it is a step of the model. Returns whether it is."""
        stepped = _ids(optimizer)
        if optimizer not in self._mine:
            parameters = self._parameters()
            if parameters is None or stepped.isdisjoint(id(p) for p in parameters()):
                return False
            self._mine.add(optimizer)
        if self._stepped and self._stepped.isdisjoint(stepped):
            self._stepped |= stepped
            return True
        self._stepped = stepped
        self.advance()
        return True

    def _saw_other(self) -> None:
        if (on_other := self._on_other()) is not None:
            on_other()


def _tell_clocks(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    if _skipped(optimizer) or _inside_another(optimizer):
        return
    running = sorted(_running, key=lambda clock: clock._number)  # in every process the same: they may reduce something
    known = [clock._saw(optimizer) for clock in running]  # every clock of this model counts it
    if not any(known):
        for clock in running:
            clock._saw_other()


def _inside_another(optimizer: Optimizer) -> bool:
    """Whether the step of another optimizer of the same parameters goes on, as in `ZeroRedundancyOptimizer`.

    Then that one's step counts. An optimizer whose step torch has not wrapped, as accelerate's, calls no hook.
    """
    frame = sys._getframe(1).f_back
    while frame is not None:
        named = frame.f_code.co_varnames[:1] if frame.f_code.co_name == "step" else ()
        caller = frame.f_locals.get(*named) if named else None
        other = (
            isinstance(caller, Optimizer) and caller is not optimizer and getattr(type(caller).step, "hooked", False)
        )
        if other and not _ids(optimizer).isdisjoint(_ids(caller)):
            return True
        frame = frame.f_back
    return False


def _ids(optimizer: Any) -> set[int]:
    """Which parameters an optimizer steps."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler found an overflow, so that a fused optimizer was called and changed nothing.

    It waits for the device only under a GradScaler, which also waits before it calls any other optimizer.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _release_hook() -> None:
    global _handle
    if _handle is not None and not any(True for _ in _running):  # len() would count clocks that are being deleted
        _handle.remove()
        _handle = None
