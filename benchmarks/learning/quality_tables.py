"""Tables of what is learnt on several tasks, from the committed rows of `quality.py`.

Each function returns Markdown that `tables.py` puts between its marks.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, cast

from benchmarks import rows
from benchmarks.learning import quality, quality_tasks
from celora.studies.outcomes import Difference

_ENOUGH, _POINT = 3, 0.01  # seeds; what counts as no difference
_Interval = tuple[float, float, float]  # mean, low, high
_LOSSES = ("chat", "text")  # tasks without a score in points
_RIVALS = ("LoRA, auto's time", "upper half, auto's time")


def scores() -> str:
    """Test scores by task and arm, each at its own learning rate, and the paired difference to LoRA."""
    found = quality.found()
    if not found:
        return "Not measured yet."
    timed = rows.found(quality.TIMES)
    times = {(row["task"], row["arm"]): row["time_ms"] for row in timed}
    body, compared = [], 0
    for task in (name for name in quality_tasks.NAMES if any(row["task"] == name for row in found)):
        base = chosen(found, task, "LoRA")
        for arm in (arm for arm in quality.ARMS if arm not in quality.COMMAND_ARMS):  # those have their own table
            by_seed = chosen(found, task, arm)
            if not by_seed:
                continue
            values = [row["test"] for row in by_seed.values()]
            shared = sorted(by_seed.keys() & base.keys())
            difference = ""
            if shared and arm not in ("LoRA", "untouched"):
                compared += len(shared) > 1
                difference = _difference(
                    [by_seed[s]["test"] for s in shared], [base[s]["test"] for s in shared], by_seed[shared[0]]
                ) + elsewhere(by_seed, base)
            one = next(iter(by_seed.values()))
            tried = {row["learning_rate"] for row in found if (row["task"], row["arm"], row["seed"]) == (task, arm, 0)}
            rate = "" if arm == "untouched" else f"{one['learning_rate']:g} of {len(tried)}"
            spread = f" ({_shown(min(values), one)} to {_shown(max(values), one)})" if len(values) > 1 else ""
            mean = _shown(statistics.fmean(values), one) + spread
            ms = times.get((task, arm.removesuffix(", auto's time")))
            step = f"{ms:.0f} ms" if ms else ""
            cpus = "; ".join(dict.fromkeys(row["cpu"] for row in by_seed.values()))
            line = [task, one["metric"], arm, cpus, str(one["steps"]), step, rate, str(len(values)), mean]
            body.append([*line, difference])
    header = ["task", "metric", "arm", "CPU", "steps", "step", "learning rate, of how many", "seeds", "test (range)"]
    header.append("against LoRA (95 %)")
    told = f"\n\nTrained on {'; '.join(dict.fromkeys(rows.where(row) for row in found))}; the column names the CPU. An "
    told += "interval on another CPU than LoRA's has the rounding of two CPUs in it."
    if not timed:
        return rows.markdown(header, body) + told
    by_task = {row["task"]: rows.where(row) for row in timed if row["task"] in {line[0] for line in body}}
    places = [
        f"{place} ({', '.join(task for task, its in by_task.items() if its == place)})"
        for place in dict.fromkeys(by_task.values())
    ]
    return rows.markdown(header, body) + (
        f"{told} Steps timed in turns: {'; '.join(places)}. Each interval is by itself: of {compared}, about "
        f"{0.05 * compared:.0f} leave out zero by chance."
    )


def verdict() -> str:
    """`auto` and `fast` by task: as good as LoRA at equal steps? And `auto` better than its rivals at equal time?"""
    found = quality.found()
    later = [_differences("auto", rival) for rival in _RIVALS]
    body: list[list[str]] = []
    for task in quality_tasks.NAMES:
        for preset in ("auto", "fast"):
            values = _ahead(found, task, preset, "LoRA")
            if len(values) < _ENOUGH:
                continue
            by = _hundredths(_better(values)) + elsewhere(chosen(found, task, preset), chosen(found, task, "LoRA"))
            line = [task, preset, str(len(values)), by, "yes" if _is_near(values) else "no"]
            line.append(_not_worse(_better(values), _margin(found, task)))
            line += [_hundredths(by_task[task]) if preset == "auto" and task in by_task else "" for by_task in later]
            body.append(line)
    for preset in ("auto", "fast"):
        tasks, values = _together(found, preset)
        if len(tasks) > 1 and len(values) >= _ENOUGH:
            line = [f"mean of the {len(tasks)} with labels or answers", preset, str(len(values))]
            line += [_hundredths(_better(values)), "yes" if _is_near(values) else "no"]
            body.append([*line, _not_worse(_better(values), _POINT), "", ""])
    if not body:
        return "No task has all of its runs yet."
    header = ["task", "preset", "seeds", "against LoRA, equal steps", "within a point or one standard error"]
    header += ["not worse, by the interval", "against LoRA, equal time", "against the upper half, equal time"]
    return rows.markdown(header, body) + (
        "\n\nHundredths (points, or 0.01 nats per token) by which the preset is better: means over seeds, and their "
        "95 % intervals. Not worse is `shown` if the interval lies above -1 point, or above -1 % of LoRA's "
        "improvement in loss; `no` if it lies below, `open` if on both sides."
    )


def whole_command(steps: int) -> str:
    """`auto` by task against its rivals, when each command may take as long as so many steps of LoRA."""
    found, timed = quality.found(), rows.found(quality.COMMANDS)
    names, body = {arm: quality.command_arm(arm, steps) for arm in quality.CONTENDERS}, []
    for task in quality_tasks.NAMES:
        by_arm = {arm: chosen(found, task, name) for arm, name in names.items()}
        if min(map(len, by_arm.values())) < _ENOUGH:
            continue
        first, step = quality.command_times(task)["LoRA"]
        cells = [task, f"{first + (steps - 1) * step:.0f} s"]
        for arm in by_arm.values():
            one = arm[0]
            mean = _shown(statistics.fmean(row["test"] for row in arm.values()), one)
            cells.append(f"{mean} ({one['steps']} at {one['learning_rate']:g})")
        ahead = [_ahead(found, task, names["auto"], names[arm]) for arm in ("LoRA", "upper half")]
        body.append([*cells, str(len(ahead[0])), *(_hundredths(_better(by)) for by in ahead)])
    if not body:
        return "Not measured yet."
    header = ["task", "the command", *(f"{arm} (steps, rate)" for arm in quality.CONTENDERS)]
    header += ["seeds", "auto against LoRA", "auto against the upper half"]
    places = "; ".join(dict.fromkeys(rows.where(row) for row in timed))
    trained = dict.fromkeys(rows.where(row) for row in found if row["arm"] in names.values())
    return rows.markdown(header, body) + (
        "\n\nThe last columns: hundredths (points, or 0.01 nats per token) by which `auto` is better, with 95 % "
        f"intervals. Timed on {places}. Trained on {'; '.join(trained)}."
    )


def whole_steps(steps: int) -> str:
    """How many steps of `auto` the time of a whole command allows, over the tasks."""
    timed = dict.fromkeys(row["task"] for row in rows.found(quality.COMMANDS))
    allowed = [quality.steps_in_the_time(task)[quality.command_arm("auto", steps)] for task in timed]
    return f"{min(allowed)} to {max(allowed)}"


def _together(found: Sequence[dict[str, Any]], preset: str) -> tuple[list[str], list[float]]:
    """The tasks that are scored in points, and by how much a preset is better than LoRA on their mean, seed by seed."""
    scored = {task: _by_seed(found, task, preset, "LoRA") for task in quality_tasks.NAMES if task not in _LOSSES}
    scored = {task: values for task, values in scored.items() if len(values) >= _ENOUGH}
    seeds = sorted(set.intersection(*map(set, scored.values()))) if scored else []
    return [*scored], [statistics.fmean(values[seed] for values in scored.values()) for seed in seeds]


def together(preset: str) -> str:
    """By how much a preset is better than LoRA on the mean of the tasks that are scored in points."""
    return _hundredths(_better(_together(quality.found(), preset)[1]))


def near(preset: str) -> str:
    """On how many tasks a preset is within a point or one standard error of LoRA at equal steps."""
    found = quality.found()
    values = [_ahead(found, task, preset, "LoRA") for task in _differences(preset, "LoRA")]
    return f"{sum(map(_is_near, values))} of {len(values)}"


def shown(preset: str) -> str:
    """On how many tasks the interval shows that a preset is not worse than LoRA at equal steps."""
    found, by_task = quality.found(), _differences(preset, "LoRA")
    judged = [_not_worse(by, _margin(found, task)) for task, by in by_task.items()]
    return f"{judged.count('shown')} of {len(judged)}"


def furthest(preset: str) -> str:
    """By how much a preset is below LoRA at equal steps at most, and on which task."""
    by_task = _differences(preset, "LoRA")
    task = min(by_task, key=lambda name: by_task[name][0])
    return f"{_in_words(task, -by_task[task][0])} on {task}"


def leads(rival: str, *, auto: str = "auto", surely: bool = False) -> str:
    """On how many tasks `auto` is ahead of a rival at equal time; `surely`: beyond the 95 % interval."""
    by_task = _differences(auto, rival)
    return f"{sum(by[surely] > 0 for by in by_task.values())} of {len(by_task)}"


def lead(task: str, rival: str = _RIVALS[0], *, auto: str = "auto") -> str:
    """By how much `auto` is ahead of LoRA at equal time, in words."""
    return _in_words(task, _differences(auto, rival)[task][0])


def _in_words(task: str, by: float) -> str:
    return f"{by:.2f} nats" if task in _LOSSES else f"{100 * by:.1f} points"


def _differences(preset: str, rival: str) -> dict[str, _Interval]:
    """By task, what a preset is better by than a rival. Tasks with fewer than three seeds are left out."""
    found = quality.found()
    values = {task: _ahead(found, task, preset, rival) for task in quality_tasks.NAMES}
    return {task: _better(by) for task, by in values.items() if len(by) >= _ENOUGH}


def _is_near(values: Sequence[float]) -> bool:
    """Whether an arm is below by no more than a point or one standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    # A point is a point, whatever a difference of two floats makes of it.
    return round(-statistics.fmean(values), 9) <= max(error, _POINT)


def _better(values: Sequence[float]) -> _Interval:
    """By how much an arm is better: the mean over at least two seeds, and its 95 % interval."""
    found = Difference.of(values, [0.0] * len(values))
    return found.mean, cast(float, found.low), cast(float, found.high)


def _margin(found: Sequence[dict[str, Any]], task: str) -> float:
    """What counts as no worse: a point, or a hundredth of LoRA's improvement in loss."""
    lora, before = chosen(found, task, "LoRA"), chosen(found, task, "untouched")
    if all(row["higher_is_better"] for row in lora.values()):
        return _POINT
    if not before:
        return 0.0
    return 0.01 * (float(before[0]["test"]) - statistics.fmean(row["test"] for row in lora.values()))


def _not_worse(interval: _Interval, margin: float) -> str:
    """Whether an interval lies above `-margin`: `shown`, `no` if it lies below, `open` if on both sides."""
    _, low, high = (round(bound + margin, 9) for bound in interval)
    return "shown" if low >= 0 else "no" if high < 0 else "open"


def elsewhere(arm: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> str:
    """What is said beside a difference of arms with seeds that were trained on different CPUs."""
    apart = {seed: rows.machine(arm[seed]) != rows.machine(other[seed]) for seed in arm.keys() & other.keys()}
    count = sum(apart.values())
    some = "" if all(apart.values()) else f"{count} seed{'s' if count > 1 else ''} "
    return f", {some}on another CPU" if any(apart.values()) else ""


def _ahead(found: Sequence[dict[str, Any]], task: str, arm: str, rival: str) -> list[float]:
    """By how much an arm is better than a rival with each seed that both have, whatever the metric."""
    return [*_by_seed(found, task, arm, rival).values()]


def _by_seed(found: Sequence[dict[str, Any]], task: str, arm: str, rival: str) -> dict[int, float]:
    """The same, by seed."""
    own, other = chosen(found, task, arm), chosen(found, task, rival)
    sign = 1 if all(row["higher_is_better"] for row in own.values()) else -1
    return {seed: sign * (own[seed]["test"] - other[seed]["test"]) for seed in sorted(own.keys() & other.keys())}


def _hundredths(interval: _Interval) -> str:
    mean, low, high = (f"{100 * value:+.1f}" for value in interval)
    return f"{mean} ({low} to {high})"


def missing() -> str:
    """Which parts of the study have no rows yet, and the commands that make them."""
    found = quality.found()
    absent = []
    for task in quality_tasks.NAMES:
        arms = []
        for arm in quality.ARMS:
            have = {(row["seed"], row["learning_rate"]) for row in _of(found, task, arm)}
            seeds, wanted = {seed for seed, _ in have}, 1 if arm == "untouched" else _ENOUGH
            if len(seeds) < wanted:
                arms.append(f"{arm} ({len(seeds)} of {wanted} seeds)" if have else arm)
        if len(arms) == len(quality.ARMS) and not any(row["task"] == task for row in found):
            absent.append(f"`{task}`: all arms")
        elif arms:
            absent.append(f"`{task}`: {', '.join(arms)}")
    if not absent:
        return "Nothing is missing."
    return (
        "Not run yet:\n\n"
        + "\n".join(f"- {line}" for line in absent)
        + "\n\n`python -m benchmarks.learning.quality time` on an idle "
        "machine, then `python -m benchmarks.learning.quality run`, add what is missing."
    )


def _of(found: Sequence[dict[str, Any]], task: str, arm: str) -> list[dict[str, Any]]:
    """The rows of an arm. For an arm of equal time, the rows with the number of steps that the current times allow."""
    steps = quality.steps_in_the_time(task).get(arm)
    return [row for row in found if (row["task"], row["arm"]) == (task, arm) and steps in (None, row["steps"])]


def chosen(found: Sequence[dict[str, Any]], task: str, arm: str) -> dict[int, dict[str, Any]]:
    """Seed -> row of an arm at the learning rate that seed 0's validation score prefers."""
    matching = _of(found, task, arm)
    first = [row for row in matching if row["seed"] == 0]
    if not first:
        return {}
    best, key = quality.best(first), ("learning_rate", "steps")
    return {row["seed"]: row for row in matching if all(row[name] == best[name] for name in key)}


def _difference(arm: Sequence[float], base: Sequence[float], row: dict[str, Any]) -> str:
    found = Difference.of(arm, base)
    if found.low is None or found.high is None:
        return f"{_signed(found.mean, row)} (one seed)"
    return f"{_signed(found.mean, row)} ({_signed(found.low, row)} to {_signed(found.high, row)})"


def _shown(value: float, row: dict[str, Any]) -> str:
    return f"{value:.1%}" if row["higher_is_better"] else f"{value:.3f}"


def _signed(value: float, row: dict[str, Any]) -> str:
    return f"{100 * value:+.1f} points" if row["higher_is_better"] else f"{value:+.4f}"


def _of_whole_commands(steps: int) -> dict[str, Callable[[], str]]:
    auto, lora, upper_half = (quality.command_arm(arm, steps) for arm in ("auto", "LoRA", "upper half"))
    return {
        f"whole_steps_{steps}": functools.partial(whole_steps, steps),
        f"whole_leads_{steps}": functools.partial(leads, lora, auto=auto),
        f"whole_leads_surely_{steps}": functools.partial(leads, lora, auto=auto, surely=True),
        f"whole_leads_upper_half_{steps}": functools.partial(leads, upper_half, auto=auto),
        f"whole_leads_upper_half_surely_{steps}": functools.partial(leads, upper_half, auto=auto, surely=True),
        **{
            f"whole_lead_{task}_{steps}": functools.partial(lead, task, lora, auto=auto)
            for task in ("family_relationships", "chat")
        },
    }


VALUES = {
    **{f"near_{preset}": functools.partial(near, preset) for preset in ("auto", "fast")},
    **{f"shown_{preset}": functools.partial(shown, preset) for preset in ("auto", "fast")},
    **{f"together_{preset}": functools.partial(together, preset) for preset in ("auto", "fast")},
    **{f"furthest_{preset}": functools.partial(furthest, preset) for preset in ("auto", "fast")},
    "leads": functools.partial(leads, _RIVALS[0]),
    "leads_surely": functools.partial(leads, _RIVALS[0], surely=True),
    "leads_upper_half": functools.partial(leads, _RIVALS[1]),
    **{name: value for steps in quality.LORA_STEPS for name, value in _of_whole_commands(steps).items()},
    **{f"lead_{task}": functools.partial(lead, task) for task in ("text", "chat", "chain_sum")},
}
TABLES = {
    "scores": scores,
    "verdict": verdict,
    **{f"whole_command_{steps}": functools.partial(whole_command, steps) for steps in quality.LORA_STEPS},
    "missing": missing,
}
