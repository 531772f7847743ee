"""Chooses the fastest candidates that together keep the wanted cosine."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from celora.planning.bench import Bench, Layer
from celora.planning.candidates import EXACT
from celora.planning.plan import PlannedLayer
from celora.settings.config import LayerConfig

_ROUNDS, _MOST_ROUNDS = 8, 12  # rounds of choosing, if some choice is good enough, and if none is
_AIM, _CLOSE = 0.96, 0.8  # as shares of the wanted squared error: the aim, and the least that is near enough


@dataclass(frozen=True)
class Try:
    """One round of choosing.

    Attributes:
        allowed: the squared error that was allowed.
        choice: a candidate for each layer.
        found: the squared error that an audit of this choice found.
    """

    allowed: float
    choice: tuple[int, ...]
    found: float


def choose_plan(
    bench: Bench,
    layers: Mapping[str, Layer],
    planned: list[PlannedLayer],
    wanted: float,
    memory_limit: int,
    tries: list[Try],
) -> tuple[list[PlannedLayer], float]:
    """The fastest choice whose audit finds a squared error of at most `wanted`; and that squared error.

    The error that the table allows and the error that an audit finds differ by a factor, which is not constant. So the
    next allowance is computed from the `tries` so far. If no choice is good enough, all layers stay dense.
    """
    table, found_of = Table(planned), {attempt.choice: attempt.found for attempt in tries}
    for round_ in range(_MOST_ROUNDS if wanted > 0 else 1):
        good = [attempt.found for attempt in tries if attempt.found <= wanted]
        if good and (round_ >= _ROUNDS or max(good) > _CLOSE * wanted):
            break
        allowed = _next_allowance(tries, wanted)
        choice = tuple(table.cheapest(allowed, memory_limit))
        if choice not in found_of:
            settings = settings_of(_chosen(planned, choice))
            found_of[choice] = squared_error(bench.audit(layers, settings).cosine) if settings else 0.0
        tries.append(Try(allowed, choice, found_of[choice]))
    fitting = (attempt for attempt in tries if attempt.found <= wanted)
    dense = Try(0.0, (0,) * len(planned), 0.0)
    best = min(fitting, key=lambda attempt: table.time(attempt.choice), default=dense)
    return _chosen(planned, best.choice), best.found


def _next_allowance(tries: Sequence[Try], wanted: float) -> float:
    """The squared error to allow next, so that an audit finds slightly less than `wanted`.

    What an audit finds grows with some power of what was allowed. Two tries give that power. If there are tries on both
    sides of `wanted`, these are the two nearest, and the next allowance is between them. Else they are the two
    furthest.
    """
    tries = [attempt for attempt in tries if attempt.allowed > 0]  # 0 has no logarithm
    if not tries or wanted == 0:
        return wanted

    def beyond(attempt: Try) -> float:
        return math.log(max(attempt.found, 1e-6 * wanted) / (_AIM * wanted))

    below = [attempt for attempt in tries if attempt.found <= wanted]
    good = max(below, key=lambda attempt: attempt.allowed, default=None)
    above = [
        attempt for attempt in tries if attempt.found > wanted and (good is None or attempt.allowed > good.allowed)
    ]
    bad = min(above, key=lambda attempt: attempt.allowed, default=None)
    if good is not None and bad is not None:
        along = beyond(good) / (beyond(good) - beyond(bad))
        return good.allowed * math.pow(bad.allowed / good.allowed, min(0.9, max(0.1, along)))
    last = cast(Try, good or bad)
    others = [attempt for attempt in tries if attempt.allowed != last.allowed]
    power = 1.0
    if others:
        other = min(others, key=lambda attempt: abs(math.log(attempt.allowed / last.allowed)))
        power = (beyond(other) - beyond(last)) / math.log(other.allowed / last.allowed)
    return last.allowed * min(100.0, max(0.01, math.exp(-beyond(last) / min(2.0, max(0.25, power)))))


def squared_error(cosine: float) -> float:
    """`1 - cosine^2`, at least 0 in spite of rounding, and 1 for a negative cosine."""
    return 1 - min(1.0, max(0.0, cosine)) ** 2


def _chosen(planned: Sequence[PlannedLayer], choice: Sequence[int]) -> list[PlannedLayer]:
    return [dataclasses.replace(p, chosen=i) for p, i in zip(planned, choice, strict=True)]


def settings_of(planned: Sequence[PlannedLayer]) -> dict[str, LayerConfig]:
    """The settings of the layers that are not dense."""
    return {p.name: p.choice.setting for p in planned if p.choice.setting.estimator != EXACT.estimator}


class Table:
    """Times, errors weighted by influence, and memory of all candidates of all layers."""

    def __init__(self, planned: Sequence[PlannedLayer]) -> None:
        width = max(len(p.candidates) for p in planned)
        padded = [list(p.candidates) + [p.candidates[0]] * (width - len(p.candidates)) for p in planned]
        numbers = functools.partial(torch.tensor, dtype=torch.float64, device="cpu")
        self._times = numbers([[c.time_ms for c in row] for row in padded])
        influence = numbers([p.influence for p in planned])[:, None]
        errors = numbers([[c.relative_error**2 for c in row] for row in padded])
        of_forwards = numbers([[c.forward_error for c in row] for row in padded])
        self._errors = (influence * errors + of_forwards).nan_to_num(math.inf, math.inf)
        self._memory = numbers([[float(c.memory) for c in row] for row in padded])

    def error(self, choice: Sequence[int]) -> float:
        """The expected squared error of the choice in the LoRA gradient: `sum s e^2`, and that of forwards."""
        return self._sum(self._errors, choice)

    def time(self, choice: Sequence[int]) -> float:
        """Milliseconds of all products of one backward, and of the forward if forwards are planned."""
        return self._sum(self._times, choice)

    def cheapest(self, error: float, memory: float) -> list[int]:
        """The fastest choice with `sum s e^2 <= error` that needs at most `memory` bytes.

        s is a layer's influence, e the relative error of its candidate. For a fidelity, `error = 1 - cosine^2`. There
        is one Lagrange multiplier for the error and one for the memory. Multipliers reach the best choice for some
        allowances only. The rest of the allowance is spent layer by layer, each time on the change that saves most.
        """

        def at(price: float, rent: float) -> list[int]:
            chosen: list[int] = (self._times + price * self._errors + rent * self._memory).argmin(1).tolist()
            return chosen

        def with_error(rent: float) -> list[int]:
            return _bisect(lambda price: at(price, rent), lambda choice: self.error(choice) <= error)

        choice = _bisect(with_error, lambda choice: self._sum(self._memory, choice) <= memory)
        while True:
            at_hand = torch.tensor(choice, device="cpu")[:, None]
            saved, lost, taken = (
                values - values.gather(1, at_hand) for values in (-self._times, self._errors, self._memory)
            )  # by moving one layer to one candidate
            fits = (lost <= error - self.error(choice)) & (taken <= memory - self._sum(self._memory, choice))
            saved = torch.where(fits, saved, 0)
            layer, candidate = divmod(int(saved.argmax()), saved.shape[1])
            if saved[layer, candidate] <= 0:
                return choice
            choice[layer] = candidate

    def _sum(self, values: Tensor, choice: Sequence[int]) -> float:
        return float(values.gather(1, torch.tensor(choice, device="cpu")[:, None]).sum())


def _bisect(choose: Callable[[float], list[int]], fits: Callable[[list[int]], bool]) -> list[int]:
    """The choice at the lowest multiplier where it fits. At the highest multiplier all is dense, which always fits."""
    if fits(choice := choose(0.0)):
        return choice
    low, high = -20.0, 20.0
    while high - low > 1e-4:  # decades
        middle = (low + high) / 2
        low, high = (low, middle) if fits(choose(10**middle)) else (middle, high)
    return choose(10**high)
