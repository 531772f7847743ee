"""The mode of a grafted layer, and the switch that all layers of one attachment share."""

from __future__ import annotations

import enum
import warnings
from typing import Any

import torch


class Mode(enum.Enum):
    """What a grafted layer does in backward."""

    ESTIMATE = "estimate"
    OBSERVE = "observe"  # exact backward that gathers statistics: a refresh step
    EXACT = "exact"


class Switch:
    """Shared by the grafts of one attachment; off once the attachment is gone, and in every copy of it.

    Copies of a model's parts (deepcopy, pickle, what is left after `merge_and_unload`) have no clock that would refresh
    them, so their layers must compute the exact backward, which a copy says when it trains. A copy of the whole model
    switches itself on again.

    Attributes:
        compiled: whether layers have run in graphs of torch.compile; each is made for all layers' modes at once.
        modes: whether layers were in training mode when they ran since the last step, as far as it matters.
        left: layers that could not be taken over when they ran, with the reason.
    """

    def __init__(self) -> None:
        self.on = True
        self.compiled = False
        self.modes: set[bool] = set()
        self.left: dict[str, str] = {}
        self._more: list[str] = []
        self._copied = False
        self._said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "on": False, "compiled": False, "_copied": True}

    def trains(self) -> None:
        """A layer trains while this is off."""
        if self._copied and not torch.compiler.is_compiling():
            self._copied = False
            warnings.warn(
                "celora: this is a copy of a part of the model that celora was attached to, so its backward is exact. "
                "Copy the whole model, or call celora.attach on the copy.",
                stacklevel=2,
            )

    def leave(self, name: str, reason: str) -> None:
        """A layer keeps PEFT's own backward. The first with this reason says so; others are named after the step."""
        if torch.compiler.is_compiling() or name in self.left:
            return
        self.left[name] = reason
        if reason in self._said:
            self._more.append(name)
        self.say_once(reason, f"{name} keeps PEFT's own backward: {reason}.")

    def name_the_rest(self) -> None:
        """Of the layers that have been left since the last step, those that have not been named."""
        names, self._more = self._more, []
        if names:
            warnings.warn(f"celora: PEFT's own backward also in {', '.join(names)}.", stacklevel=2)

    def say_once(self, kind: str, text: str) -> None:
        """Warn of a `kind` of event the first time that it happens to a layer of this attachment."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(f"celora: {text}", stacklevel=2)
