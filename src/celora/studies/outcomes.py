"""The results of `celora compare`: outcomes of runs, differences between arms, sentences and tables.

All arms have the same seeds. So each arm is compared with the first one seed by seed. The interval is Student's
interval for the mean of these differences.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

_SURE = 0.95  # probability that all intervals of a comparison are right


@dataclass(frozen=True)
class Outcome:
    """The result of one arm with one seed; a line of `compare.jsonl`.

    Attributes:
        eval_loss: loss on the held-out rows in nats per token, the mean over batches, on the original base model; None
            if training diverged.
        eval_accuracy: share of held-out tokens that are predicted, given the true tokens before them, on the original
            base model.
        seconds: wall-clock of the training.
    """

    arm: str
    seed: int
    steps: int
    eval_loss: float | None
    eval_accuracy: float | None
    step_time_ms: float | None
    seconds: float


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of an arm's value minus the first arm's, and its interval. One seed gives no interval."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, arm: Sequence[float], base: Sequence[float], *, comparisons: int = 1) -> Difference:
        """Compare two lists of values, which have the same seeds in the same order.

        With several `comparisons`, all of their intervals are right with a probability of 95 % (Bonferroni).
        """
        differences = [a - b for a, b in zip(arm, base, strict=True)]
        mean, n = statistics.fmean(differences), len(differences)
        if n < 2:
            return cls(mean, None, None)
        width = students_t(1 - (1 - _SURE) / comparisons, n - 1) * statistics.stdev(differences) / math.sqrt(n)
        return cls(mean, mean - width, mean + width)

    @property
    def real(self) -> bool | None:
        """Whether the interval excludes zero; None if there is no interval."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0


def students_t(confidence: float, degrees: int) -> float:
    """The t with `P(-t < T < t) = confidence`, for Student's T with `degrees` degrees of freedom.

    With `t = sqrt(degrees) tan a`, `P = integral_0^a cos^(degrees - 1) / integral_0^(pi / 2) cos^(degrees - 1)`.
    """

    def integral(to: float, parts: int = 512) -> float:  # Simpson's rule
        values = [math.cos(to * i / parts) ** (degrees - 1) for i in range(parts + 1)]
        return to / parts / 3 * (values[0] + values[-1] + 4 * sum(values[1::2]) + 2 * sum(values[2:-1:2]))

    low, high, wanted = 0.0, math.pi / 2, confidence * integral(math.pi / 2)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if integral(middle) < wanted else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _by_arm(outcomes: Sequence[Outcome], arm: str, value: Callable[[Outcome], Any]) -> list[Any]:
    return [value(outcome) for outcome in outcomes if outcome.arm == arm]


def _losses(outcomes: Sequence[Outcome], arm: str) -> dict[int, float]:
    """Held-out loss by seed, without the seeds where the arm diverged."""
    return {o.seed: o.eval_loss for o in outcomes if o.arm == arm and o.eval_loss is not None}


def differences(outcomes: Sequence[Outcome], arms: Sequence[str]) -> dict[str, Difference]:
    """The held-out loss of every other arm minus the first arm's. All intervals are right with 95 % probability.

    Seeds where one of the two arms diverged do not count. An arm without a common seed is absent.
    """
    base, found = _losses(outcomes, arms[0]), {}
    for arm in arms[1:]:
        losses = _losses(outcomes, arm)
        if seeds := sorted(base.keys() & losses.keys()):
            own, against = ([each[seed] for seed in seeds] for each in (losses, base))
            found[arm] = Difference.of(own, against, comparisons=len(arms) - 1)
    return found


def _diverged(outcomes: Sequence[Outcome], arm: str) -> str:
    """A phrase that says with how many seeds an arm diverged; "" if with none."""
    losses = _by_arm(outcomes, arm, lambda o: o.eval_loss)
    count = f"{losses.count(None)} of {len(losses)} seed{'s' if len(losses) > 1 else ''}"
    return f"diverged with {count}" if None in losses else ""


def findings(outcomes: Sequence[Outcome], arms: Sequence[str]) -> list[str]:
    """Plain sentences about each arm: whether it diverged, whether its loss differs from the first arm's, its speed."""
    base = arms[0]
    lines = [f"{arm}: {said}, which the losses leave out." for arm in arms if (said := _diverged(outcomes, arm))]
    for arm, found in differences(outcomes, arms).items():
        speed = _speed_up(outcomes, arm, base)
        pace = "" if speed is None else f" Its step takes {1 / speed:.2f} of {base}'s."
        amount, word = f"{abs(found.mean):.4f}", "higher" if found.mean > 0 else "lower"
        against = f"{amount} {word} than" if float(amount) else "the same to four decimals as"
        size = f"{arm}: held-out loss {against} {base}'s"
        seeds = len(_losses(outcomes, arm).keys() & _losses(outcomes, base).keys())
        if found.low is None or found.high is None:
            lines.append(f"{size} with one seed, which cannot tell a difference from chance.{pace}")
            continue
        sure = "95 % interval" if len(arms) == 2 else "simultaneous 95 % interval"
        interval = f"{sure} {found.low:+.4f} to {found.high:+.4f} over {seeds} seeds"
        verdict = "not distinguishable from chance" if found.low < found.high else "identical"
        if found.real:
            verdict = "the difference is real, on these rows" if float(amount) else "too small to matter"
        lines.append(f"{size} ({interval}): {verdict}.{pace}")
    return lines


def _speed_up(outcomes: Sequence[Outcome], arm: str, base: str) -> float | None:
    times = [[t for t in _by_arm(outcomes, name, lambda o: o.step_time_ms) if t] for name in (base, arm)]
    return statistics.median(times[0]) / statistics.median(times[1]) if all(times) else None


def as_json(outcomes: Sequence[Outcome], arms: Sequence[str]) -> dict[str, Any]:
    """All results as plain values: outcomes, differences with their intervals, sentences."""
    found = differences(outcomes, arms)
    return {
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        "against": arms[0],
        "held_out_loss_difference": {arm: dataclasses.asdict(d) | {"real": d.real} for arm, d in found.items()},
        "speed_up": {arm: _speed_up(outcomes, arm, arms[0]) for arm in arms[1:]},
        "findings": findings(outcomes, arms),
    }


def _spread(values: Sequence[float], form: str) -> str:
    text = format(statistics.fmean(values), form)
    return text if len(values) < 2 else f"{text} ± {format(statistics.stdev(values), form)}"


def summary(outcomes: Sequence[Outcome], arms: Sequence[str]) -> list[tuple[str, ...]]:
    """The cells of the result table, as text: mean and standard deviation over seeds."""
    rows: list[tuple[str, ...]] = []
    found = differences(outcomes, arms)
    for arm in arms:
        losses, said = list(_losses(outcomes, arm).values()), _diverged(outcomes, arm)
        accuracies = [a for a in _by_arm(outcomes, arm, lambda o: o.eval_accuracy) if a is not None]
        times = [t for t in _by_arm(outcomes, arm, lambda o: o.step_time_ms) if t]
        speed = _speed_up(outcomes, arm, arms[0])
        difference = ""
        if arm in found:
            d = found[arm]
            difference = f"{d.mean:+.4f}" + ("" if d.low is None else f" ({d.low:+.4f} to {d.high:+.4f})")
        rows.append(
            (
                arm,
                ", ".join(filter(None, [_spread(losses, ".4f") if losses else "", said])),
                difference,
                _spread(accuracies, ".1%") if accuracies else "",
                f"{statistics.median(times):.0f} ms" if times else "",
                "" if speed is None else f"{speed:.2f}",
            )
        )
    return rows


HEADER = ("", "held-out loss", "against the first (95 %)", "token accuracy", "time per step", "speed-up")


def result_table(outcomes: Sequence[Outcome], arms: Sequence[str]) -> Table:
    """The table that `celora compare` prints."""
    seeds = len(_by_arm(outcomes, arms[0], lambda o: o.seed))
    table = Table(title=f"{max(o.steps for o in outcomes)} steps, {seeds} seed{'s' if seeds > 1 else ''}")
    for column in HEADER:
        table.add_column(column, justify="left" if not column else "right")
    for cells in summary(outcomes, arms):
        table.add_row(*cells)
    return table


def cells(outcomes: Sequence[Outcome], arms: Sequence[str]) -> dict[str, dict[str, str]]:
    """The cells of the result table for a report: column -> arm -> text."""
    rows = summary(outcomes, arms)
    return {name: {row[0]: row[i] for row in rows} for i, name in enumerate(HEADER) if name}
