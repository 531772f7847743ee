from __future__ import annotations

import weakref
from collections.abc import Iterable

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim import optimizer as optim

from celora.runtime import clock
from celora.runtime.clock import StepClock


class Owner:
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.steps: list[int] = []
        self.others = 0
        self.clock = StepClock(self.parameters, self.on_step, self.on_other)
        self.clock.start()

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.module.parameters()

    def on_step(self, step: int) -> None:
        self.steps.append(step)

    def on_other(self) -> None:
        self.others += 1


def _optimizer(module: nn.Module) -> SGD:
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    return SGD(module.parameters(), lr=0.1)


def test_counts_only_the_optimizers_of_its_own_model() -> None:
    mine, other = Owner(nn.Linear(2, 2)), Owner(nn.Linear(2, 2))
    optimizer = _optimizer(mine.module)
    for _ in range(3):
        optimizer.step()
    assert mine.steps == [1, 2, 3]
    assert other.steps == []
    assert mine.others == other.others == 0
    _optimizer(nn.Linear(2, 2)).step()
    assert mine.others == other.others == 1  # the parameters of neither model
    mine.clock.stop()
    other.clock.stop()


def test_several_optimizers_over_one_model_make_one_step() -> None:
    owner = Owner(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    first, second = _optimizer(owner.module[0]), _optimizer(owner.module[1])
    for _ in range(4):
        first.step()
        second.step()
    assert owner.clock.step == 4
    owner.clock.stop()


def test_a_later_optimizer_takes_over() -> None:
    owner = Owner(nn.Linear(2, 2))
    first = _optimizer(owner.module)
    first.step()
    second = Adam(owner.module.parameters())
    second.step()
    second.step()
    assert owner.clock.step == 3
    first.step()
    assert owner.clock.step == 4
    owner.clock.stop()


def test_replaced_parameters_are_found() -> None:
    owner = Owner(nn.Linear(2, 2))
    owner.module.weight = nn.Parameter(torch.zeros(2, 2))  # sharding does this
    _optimizer(owner.module).step()
    assert owner.clock.step == 1
    owner.clock.stop()


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_does_not_count(fused: bool) -> None:
    """A fused optimizer is called all the same, and skips the step itself."""
    owner = Owner(nn.Linear(2, 2))
    optimizer = Adam(owner.module.parameters(), fused=True) if fused else _optimizer(owner.module)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (1.0, float("inf"), 1.0):
        scaler.scale(torch.ones((), requires_grad=True)).backward()
        for p in owner.module.parameters():
            p.grad = torch.full_like(p, value)
        scaler.step(optimizer)
        scaler.update()
    assert owner.clock.step == 2
    owner.clock.stop()


@pytest.fixture
def no_other_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process. Otherwise models of other tests might be alive, with their clocks running."""
    monkeypatch.setattr(clock, "_running", weakref.WeakSet())
    monkeypatch.setattr(clock, "_handle", None)


@pytest.mark.usefixtures("no_other_clocks")
def test_the_global_hook_lives_as_long_as_the_first_and_last_clock() -> None:
    before = len(optim._global_optimizer_post_hooks)
    first, second = Owner(nn.Linear(2, 2)), Owner(nn.Linear(2, 2))
    assert len(optim._global_optimizer_post_hooks) == before + 1
    first.clock.stop()
    assert len(optim._global_optimizer_post_hooks) == before + 1
    second.clock.stop()
    assert len(optim._global_optimizer_post_hooks) == before


@pytest.mark.usefixtures("no_other_clocks")
def test_a_dropped_owner_takes_its_clock_along() -> None:
    before = len(optim._global_optimizer_post_hooks)
    owner = Owner(nn.Linear(2, 2))
    assert len(clock._running) == 1
    del owner
    assert not any(True for _ in clock._running)
    assert len(optim._global_optimizer_post_hooks) == before


class Outer(SGD):
    """Its step is that of another optimizer, as that of torch's `ZeroRedundancyOptimizer` is."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module.parameters(), lr=0.1)
        self.inner = _optimizer(module)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.inner.step()


def test_a_step_inside_a_step_counts_once() -> None:
    owner = Owner(nn.Linear(2, 2))
    optimizer = Outer(owner.module)
    for _ in range(3):
        optimizer.step()
    optimizer.inner.step()
    assert owner.steps == [1, 2, 3, 4]
    assert owner.others == 0
    owner.clock.stop()


def test_clocks_are_told_in_the_order_of_their_models() -> None:
    """In every process the same: what a clock calls may wait for the other processes."""
    owners = [Owner(nn.Linear(2, 2)) for _ in range(20)]
    told: list[int] = []
    for i, owner in enumerate(owners):
        owner.on_step = lambda step, i=i: told.append(i)  # type: ignore[method-assign, misc]
        owner.clock._on_step = lambda owner=owner: owner.on_step  # type: ignore[assignment, misc]
    SGD([p for owner in owners for p in owner.module.parameters()], lr=0.1).step()
    assert told == list(range(20))
    for owner in owners:
        owner.clock.stop()
