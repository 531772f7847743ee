"""Choose the cheapest candidates that together keep the cosine asked for."""

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

_ROUNDS, _MOST_ROUNDS = 8, 12  # of choosing: with a choice that will do, and without
_AIM, _CLOSE = 0.96, 0.8  # shares of the wanted squared error: what to aim for, and what is near enough


@dataclass(frozen=True)
class Try:
    """One round of choosing.

    Attributes:
        allowed: the squared error that the table was given.
        choice: a candidate for each layer.
        found: the squared error that the audit of this choice found.
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
    """The cheapest choice whose audit finds a squared error of at most `wanted`, and that squared error.

    A table's allowance and an audit's finding differ by a factor that is not constant, so the next allowance follows
    from the `tries` so far. If no choice will do, all layers stay dense.
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
    """What to allow next so that an audit finds somewhat less than `wanted`.

    The finding grows with some power of the allowance, and two tries give that power. With tries on both sides of
    `wanted` these are the nearest two, and the next allowance lies between them. Else they are the furthest two.
    """
    tries = [attempt for attempt in tries if attempt.allowed > 0]  # powers of nothing tell nothing
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
    """What was chosen for the layers that are not left dense."""
    return {p.name: p.choice.setting for p in planned if p.choice.setting.estimator != EXACT.estimator}


class Table:
    """Times, errors by influence and memory of all candidates of all layers, to choose from."""

    def __init__(self, planned: Sequence[PlannedLayer]) -> None:
        width = max(len(p.candidates) for p in planned)
        padded = [list(p.candidates) + [p.candidates[0]] * (width - len(p.candidates)) for p in planned]
        numbers = functools.partial(torch.tensor, dtype=torch.float64, device="cpu")
        self._times = numbers([[c.time_ms for c in row] for row in padded])
        errors = numbers([[c.relative_error**2 for c in row] for row in padded])
        self._errors = numbers([p.influence for p in planned])[:, None] * errors
        self._memory = numbers([[float(c.memory) for c in row] for row in padded])

    def error(self, choice: Sequence[int]) -> float:
        """The squared error that the choice is expected to cause in the LoRA gradient: `sum s e^2` over the layers."""
        return self._sum(self._errors, choice)

    def time(self, choice: Sequence[int]) -> float:
        """Milliseconds of one backward pass's products."""
        return self._sum(self._times, choice)

    def cheapest(self, error: float, memory: float) -> list[int]:
        """The choice of least time with `sum s e^2 <= error` and within the memory; one Lagrange multiplier for each.

        s is a layer's influence, e the relative error of its candidate. For a fidelity, `error = 1 - cosine^2`.
        Multipliers reach the best choice for some allowances only. What remains of this allowance is spent layer by
        layer, each time on the move that saves most.
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
    """The choice at the lowest multiplier at which it fits. At the highest all is dense, and everything fits."""
    if fits(choice := choose(0.0)):
        return choice
    low, high = -20.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(choose(10**middle)) else (middle, high)
    return choose(10**high)
