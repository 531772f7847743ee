"""The mode of a grafted layer, and the switch that all layers of one attachment share."""

from __future__ import annotations

import enum
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class Mode(enum.Enum):
    """What a grafted layer does in backward."""

    ESTIMATE = "estimate"
    OBSERVE = "observe"  # exact backward that gathers statistics: a refresh step
    EXACT = "exact"


class Switch:
    """The switch that the grafts of one attachment share. It is off once the attachment is gone, and in every copy.

    A copy of a part of a model (by deepcopy, by pickle, or by `merge_and_unload`) has no clock that refreshes it. So
    its layers compute the exact backward, and warn when they train. A copy of the whole model switches itself on again.

    Attributes:
        forwards: whether 8-bit forwards are on. An audit turns them off.
        astray: whether padding on the left predicts a label of the latest call.
        compact: whether passes save activations for backward in fewer bits.
        step: number of optimizer steps that have ended. The first forward of each looks whether weights have changed.
        compiled: whether layers have run in graphs of torch.compile. A graph is specific to the modes of its layers.
        modes: the values of `module.training` with which layers have run since the last step.
        left: layers that keep PEFT's own backward, with the reasons.
    """

    astray = False
    step = 0

    def __init__(self) -> None:
        self.on = True
        self.forwards = True
        self.compact = False
        self.compiled = False
        self.modes: set[bool] = set()
        self.left: dict[str, str] = {}
        self._more: list[str] = []
        self._copied = False
        self._said: set[str] = set()
        self._layers: set[weakref.ref[nn.Module]] = set()  # of which one lives

    @property
    def saves_compactly(self) -> bool:
        """Whether passes do so now: if something is saved at all, and if nothing has to be exact."""
        return self.compact and self.forwards and torch.is_grad_enabled()

    @contextmanager
    def own_forwards(self) -> Iterator[None]:
        """For a while, all layers compute their own, exact forward."""
        before, self.forwards = self.forwards, False
        try:
            yield
        finally:
            self.forwards = before

    @contextmanager
    def off(self) -> Iterator[None]:
        """For a while, the model is PEFT's."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "on": False, "compiled": False, "_copied": True, "_layers": set()}

    def ends_with(self, modules: Callable[[], Iterable[nn.Module]]) -> None:
        """Be off once the last adapted layer of these is gone: PEFT's `unload` and merges keep the base's hooks."""
        if self._layers:
            return
        left, switch = self._layers, weakref.ref(self)

        def forget(layer: weakref.ref[nn.Module]) -> None:
            left.discard(layer)
            if not left and (off := switch()) is not None:
                off.on = off._copied = False

        left.update(weakref.ref(module, forget) for module in modules() if isinstance(module, BaseTunerLayer))

    def warn_of_a_copy(self) -> None:
        """Warn that a layer trains while the switch is off."""
        if self._copied and not torch.compiler.is_compiling():
            self._copied = False
            warnings.warn(
                "celora: this is a copy of a part of the model that celora was attached to, so its backward is exact. "
                "Copy the whole model, or call celora.attach on the copy.",
                stacklevel=2,
            )

    def leave(self, name: str, reason: str) -> None:
        """Record that a layer keeps PEFT's own backward. Warn of the first for each reason; others are named later."""
        if torch.compiler.is_compiling() or name in self.left:
            return
        self.left[name] = reason
        if reason in self._said:
            self._more.append(name)
        self.say_once(reason, f"{name} keeps PEFT's own backward: {reason}.")

    def name_the_rest(self) -> None:
        """Warn of layers recorded by `leave` since the last step that no warning has named."""
        names, self._more = self._more, []
        if names:
            warnings.warn(f"celora: PEFT's own backward also in {', '.join(names)}.", stacklevel=2)

    def say_once(self, kind: str, text: str) -> None:
        """Warn of the first event of this kind in this attachment."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(f"celora: {text}", stacklevel=2)
