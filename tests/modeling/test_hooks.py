"""celora recognises its own hooks and forwards, and removes only these."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from celora.modeling.hooks import Hook, is_ours, remove, settle, settle_all


class Ours(Hook):
    """Counts how often it is asked to put something back."""

    def __init__(self) -> None:
        self.settled: list[nn.Module] = []

    def __call__(self, *_: Any) -> None:
        pass

    def before(self, *_: Any) -> None:
        pass

    def settle(self, module: nn.Module) -> None:
        self.settled.append(module)


class Theirs:
    def __call__(self, *_: Any) -> None:
        pass

    def before(self, *_: Any) -> None:
        pass


def test_what_is_ours() -> None:
    assert is_ours(Ours())
    assert is_ours(Ours().before)
    assert not any(map(is_ours, (Theirs(), Theirs().before, lambda *_: None, nn.Linear(1, 1).forward, None)))


def hooked(ours: Ours, theirs: Theirs) -> nn.Module:
    module = nn.Linear(2, 2)
    for owner in (ours, theirs):
        module.register_forward_pre_hook(owner.before, with_kwargs=True)
        module.register_forward_hook(owner)
        module.register_forward_hook(owner.before, with_kwargs=True, always_call=True)
    return module


def test_ours_are_removed_and_others_stay() -> None:
    theirs = Theirs()
    module = hooked(Ours(), theirs)
    remove(module)
    assert list(module._forward_pre_hooks.values()) == [theirs.before]
    assert list(module._forward_hooks.values()) == [theirs, theirs.before]
    for hooks, marks in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_always_called),
    ):
        assert len(marks) == 1
        assert marks.keys() <= hooks.keys()


@pytest.mark.parametrize("place", ["forward", "_old_forward"])
def test_a_forward_of_ours_gives_way_to_the_class_s(place: str) -> None:
    """This holds also if accelerate has stored the forward."""
    module, theirs = nn.Linear(2, 2), Theirs()
    module.__dict__[place] = Ours()
    remove(module)
    assert getattr(module, place) == module.forward
    module.__dict__[place] = theirs
    remove(module)
    assert module.__dict__[place] is theirs


def test_what_an_interrupted_forward_left_is_put_back_before_removal_or_when_asked() -> None:
    ours = Ours()
    module = hooked(ours, Theirs())
    settle(module)
    assert ours.settled == [module]
    settle_all(nn.Sequential(module, nn.Linear(2, 2)))
    assert ours.settled == [module] * 2
    remove(module)
    assert ours.settled == [module] * 3
