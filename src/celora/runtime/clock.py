"""The optimizer-step clock: counts optimizer steps, the only event that training loops agree on.

Checkpointing, accumulation and evaluation all call `forward` differently; an optimizer steps once per step. The
clock listens to every optimizer through torch's global post-step hook, which is installed with the first running
clock and removed with the last, and counts the ones that hold a parameter of its model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

_running: weakref.WeakSet[StepClock] = weakref.WeakSet()
_handle: RemovableHandle | None = None


class StepClock:
    """Calls `on_step(step)` after each optimizer step of the model whose parameters are `parameters()`.

    Parameters are looked up when an unknown optimizer steps, not when the clock starts: sharding and new adapters
    replace them. Several optimizers over different parameters of one model make one step together: the next begins
    when parameters are stepped that have been stepped already. `on_other()` hears of steps that were of no model with
    a running clock. All callables are bound methods, held weakly: their object owns the clock.
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

    def start(self) -> None:
        """Begin to listen."""
        global _handle
        _running.add(self)
        weakref.finalize(self, _release_hook).atexit = False
        if _handle is None:
            _handle = register_optimizer_step_post_hook(_tell_clocks)

    def stop(self) -> None:
        """Stop listening; the last clock to stop, or to be dropped, takes the global hook away."""
        _running.discard(self)
        _release_hook()

    def advance(self) -> None:
        """Count one step by hand, for engines whose optimizer holds none of the model's own parameters."""
        self.step += 1
        if (on_step := self._on_step()) is not None:
            on_step(self.step)

    def _saw(self, optimizer: Optimizer) -> bool:
        """Count this optimizer's step if it is one of the model's; say whether it is."""
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
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
    if _skipped(optimizer):
        return
    running = list(_running)
    known = [clock._saw(optimizer) for clock in running]  # by every one whose model it is
    if not any(known):
        for clock in running:
            clock._saw_other()


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler has found an overflow, and a fused optimizer, which is called all the same, changed nothing.

    Waits for the device under a GradScaler alone, which does so itself before it calls any other optimizer.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _release_hook() -> None:
    global _handle
    if _handle is not None and not any(True for _ in _running):  # len() would count clocks that are just dying
        _handle.remove()
        _handle = None
