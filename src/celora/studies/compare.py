"""`celora compare`: LoRA and celora on the same rows, seeds, order and learning rate, and whether they differ.

Every arm trains with every seed, in a folder of its own, as `celora train` would; what is finished is not run again,
and what was interrupted is resumed. The judge is the loss (and token accuracy) on held-out rows. Arms share seeds, so
what is compared is their difference seed by seed, with Student's confidence interval.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from celora.errors import CELoraError, Diverged, unknown
from celora.files import read_json, replacing, write_text
from celora.planning.plan import Plan
from celora.train.dtype import settle_dtype
from celora.train.fingerprint import check_same, fingerprints
from celora.train.loading import load_tokenizer, quiet_libraries, training_rows
from celora.train.output.folder import LOCK, PLAN, RUN, OutputFolder, write_json, writing_to
from celora.train.report import write_report
from celora.train.request.arguments import PLANNING, TrainRequest, make_request, recorded, sft_config
from celora.train.run import train

# Arms by name: the preset, and what else differs from plain LoRA.
ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {"preset": "off"},
    "exact": {"preset": "exact"},
    "paper": {"preset": "paper"},
    "auto": {"preset": "auto"},
}
DEFAULT_ARMS = ("LoRA", "paper", "auto")
RESULT, RECORD = "compare.jsonl", "compare.json"
_HELD_OUT, _MOST_HELD_OUT = 0.1, 500
_SURE = 0.95  # of all intervals of a comparison together


@dataclass(frozen=True)
class Outcome:
    """One arm with one seed; a line of `compare.jsonl`.

    Attributes:
        eval_loss: on the held-out rows, nats per token, mean over batches; None if the training diverged.
        eval_accuracy: of the next token, with the right ones before it.
        seconds: wall-clock of the training, planning left out.
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
    """An arm against the first, seed by seed: mean, and the interval of the mean; none with one seed."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, arm: Sequence[float], base: Sequence[float], *, comparisons: int = 1) -> Difference:
        """From values of the same seeds, in the same order.

        With several `comparisons`, the intervals of all of them together hold with 95 % (Bonferroni).
        """
        differences = [a - b for a, b in zip(arm, base, strict=True)]
        mean, n = statistics.fmean(differences), len(differences)
        if n < 2:
            return cls(mean, None, None)
        width = students_t(1 - (1 - _SURE) / comparisons, n - 1) * statistics.stdev(differences) / math.sqrt(n)
        return cls(mean, mean - width, mean + width)

    @property
    def real(self) -> bool | None:
        """Whether the interval leaves out zero; None if there is none."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0


def students_t(confidence: float, degrees: int) -> float:
    """The t with `P(-t < T < t) = confidence` for Student's T with so many degrees of freedom.

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


def compare(
    settings: Mapping[str, object],
    *,
    arms: Sequence[str] = DEFAULT_ARMS,
    seeds: int = 3,
    console: Console | None = None,
) -> list[Outcome]:
    """Run what is missing of `arms` x `seeds` into `settings["output"]`, and write what came out.

    Args:
        settings: as for `celora train` (`make_request`); `output` is the folder of the whole comparison. Without
            `eval_data`, a tenth of the rows (500 at most) is held out.
        arms: names from `ARMS`; the first is what the others are compared with.
        seeds: 0 ... seeds - 1, which set data order, adapter initialisation and everything random.
        console: for progress.

    Raises:
        CELoraError: bad input, or a folder that holds another comparison, or one of other rows or another model.
    """
    console = console or Console(stderr=True, highlight=False)
    for arm in arms:
        if arm not in ARMS:
            raise unknown("arm", arm, ARMS)
    if len(set(arms)) != len(arms) or len(arms) < 2:
        raise CELoraError(f"arms {', '.join(arms)}; expected two or more different ones of: {', '.join(ARMS)}.")
    for name in ("preset", "seed", "resume", "overwrite", "plan"):
        if settings.get(name):
            raise CELoraError(f"{name} is not for a comparison, which sets it for each run; leave it out.")
    if "auto" not in arms and (given := [name for name in PLANNING if settings.get(name) is not None]):
        raise CELoraError(f"{given[0]} belongs to a plan, which none of the arms {', '.join(arms)} has; leave it out.")
    probe = make_request(dict(settings))
    for arm in arms:
        make_request(_own(settings, arm))  # whose mistakes are to be known before anything is trained
    output = probe.output
    _claim(output, probe)
    with OutputFolder(output).locked():
        return _compare(settings, probe, arms, seeds, console)


def _compare(
    settings: Mapping[str, object], probe: TrainRequest, arms: Sequence[str], seeds: int, console: Console
) -> list[Outcome]:
    output = probe.output
    with quiet_libraries():
        data = _split(probe, output, console) | {"dtype": _dtype(probe, output, console)}
        if "auto" in arms:
            _check_plan(output, probe, seeds)

    outcomes: list[Outcome] = []
    for seed in range(seeds):
        for arm in arms if seed % 2 == 0 else reversed(arms):  # whoever goes second finds a warmer, or busier, machine
            if not probe.options.quiet:
                left = _time_left(outcomes, len(arms) * seeds)
                console.print(f"Run {len(outcomes) + 1} of {len(arms) * seeds}: {arm}, seed {seed}{left}", markup=False)
            folder = output / f"{arm}-seed{seed}"
            own = _own(settings, arm) | data | {"seed": seed, "output": str(folder)}
            plan = output / f"{arm}-seed0" / PLAN
            if own["preset"] == "auto" and seed > 0 and plan.is_file():
                own["plan"] = str(plan)  # planned once; the model, the machine and the shapes are the same
            try:
                outcomes.append(_run(arm, seed, own, folder, console))
            except CELoraError as error:
                raise CELoraError(f"{arm}, seed {seed}: {error}") from error
    outcomes.sort(key=lambda o: (arms.index(o.arm), o.seed))
    write_text(output / RESULT, "".join(json.dumps(dataclasses.asdict(outcome)) + "\n" for outcome in outcomes))
    runs = {f"{o.arm}, seed {o.seed}": output / f"{o.arm}-seed{o.seed}" for o in outcomes}
    write_report(
        output / "report.html",
        runs,
        title="celora compare",
        results=_cells(outcomes, arms),
        findings=findings(outcomes, arms),
        repeats={f"{o.arm}, seed {o.seed}": o.arm for o in outcomes},
    )
    return outcomes


def _own(settings: Mapping[str, object], arm: str) -> dict[str, Any]:
    """What an arm trains with."""
    own = {**settings, **ARMS[arm]}
    nothing = (() if own["preset"] == "auto" else PLANNING) + (("celora",) if own["preset"] == "off" else ())
    return {name: value for name, value in own.items() if name not in nothing}


def _time_left(outcomes: Sequence[Outcome], runs: int) -> str:
    if not outcomes:
        return ""
    minutes = statistics.fmean(o.seconds for o in outcomes) * (runs - len(outcomes)) / 60
    return f", about {minutes:.1f} min of training left in all"


def _claim(output: Path, request: TrainRequest) -> None:
    """Mark the folder as this comparison's, or refuse one that is another's."""
    # How the runs are shown may change between one call and the next; what they do may not.
    given = {k: v for k, v in recorded(request.given).items() if k not in ("output", "quiet")}
    record, made_from = output / RECORD, fingerprints(request, request.options.eval_data)
    if record.is_file():
        document = read_json(record)
        before = document.get("given") if isinstance(document, dict) else None
        if not isinstance(before, dict):
            raise CELoraError(f"{record} is not what a comparison wrote: 'given' is missing; choose another folder")
        changed = sorted(k for k in given.keys() | before.keys() if given.get(k) != before.get(k))
        if not any(output.glob(f"*-seed*/{RUN}")):  # nothing was trained yet that has to be compared with
            with OutputFolder(output).locked():
                shutil.rmtree(output / "data", ignore_errors=True)
                write_json(record, {"given": given, "made_from": made_from})
            return
        if changed:
            key = changed[0]
            raise CELoraError(
                f"--output {str(output)!r} holds a comparison with {key}={before.get(key)!r}, not {given.get(key)!r}; "
                "choose another folder, or give the same arguments to go on with it"
            )
        check_same(document.get("made_from"), made_from, of="comparison")
        return
    unmarked = (LOCK, f".{RECORD}.tmp")  # left by a comparison that was killed before it marked the folder
    with writing_to(output):
        if output.exists() and (not output.is_dir() or any(entry.name not in unmarked for entry in output.iterdir())):
            raise CELoraError(f"--output {str(output)!r} holds something else; choose a new folder")
        output.mkdir(parents=True, exist_ok=True)
    write_json(record, {"given": given, "made_from": made_from})


def _split(request: TrainRequest, output: Path, console: Console) -> dict[str, str | None]:
    """Training and held-out rows: as given, or some of the training rows held out, the same for every run.

    What is held out is not trained on, in whatever place it comes again.
    """
    if request.options.eval_data:
        return {}
    train_file, held_out_file = output / "data" / "train.jsonl", output / "data" / "held-out.jsonl"
    if not held_out_file.is_file():
        rows = training_rows(request, load_tokenizer(request))
        if len(rows) < 2:
            raise CELoraError(f"{request.data!r} has {len(rows)} row; a comparison needs rows to hold out. Give more.")
        held_out = min(_MOST_HELD_OUT, max(1, int(_HELD_OUT * len(rows))))
        parts = rows.train_test_split(test_size=held_out, seed=0)
        unseen = {json.dumps(row) for row in parts["test"]}
        kept = [i for i, row in enumerate(parts["train"]) if json.dumps(row) not in unseen]
        if again := len(parts["train"]) - len(kept):
            if not kept:
                raise CELoraError(f"{request.data!r} has no row but copies of those held out; give other rows.")
            console.print(f"{again:,} rows that come among the held-out ones, too, are not trained on.", markup=False)
            parts["train"] = parts["train"].select(kept)
        train_file.parent.mkdir(exist_ok=True)
        for part, file in (("train", train_file), ("test", held_out_file)):  # last: where it is, both are whole
            with replacing(file) as temporary:
                parts[part].to_json(str(temporary))
    return {"data": str(train_file), "eval_data": str(held_out_file), "dataset_config": None}


def _dtype(request: TrainRequest, output: Path, console: Console) -> str:
    """The base model's dtype, the same for every run: that of those begun or, before there is one, as chosen now."""
    for record in sorted(output.glob(f"*-seed*/{RUN}")):
        if (begun := OutputFolder(record.parent).run()) is not None:
            return str(begun["lora"]["dtype"])
    settled, line = settle_dtype(request, sft_config(request))
    if not request.options.quiet:
        console.print(line, markup=False, soft_wrap=True)
    return str(settled.lora["dtype"])


def _check_plan(output: Path, request: TrainRequest, seeds: int) -> None:
    """Refuse before anything is trained what a run to come would refuse: the plan of the first was made elsewhere."""
    plan, *others = (output / f"auto-seed{seed}" / PLAN for seed in range(seeds))
    if not plan.is_file() or all(other.is_file() for other in others):  # a run goes on with its own
        return
    if reason := Plan.load(plan).elsewhere(sft_config(request).device):
        raise CELoraError(
            f"{reason}; run the comparison as it was begun (OMP_NUM_THREADS sets the threads) or choose another folder"
        )


def _run(arm: str, seed: int, own: dict[str, Any], folder: Path, console: Console) -> Outcome:
    """Train one arm with one seed, or go on with it, or read what it came to."""
    begun = OutputFolder(folder).run() is not None
    try:
        result = train(make_request(own | ({"resume": True} if begun else {})), console=console)
    except Diverged as error:  # which is an answer, too
        console.print(f"{arm}, seed {seed}: {error}", markup=False)
        summary = OutputFolder(folder).resumable()["summary"] | {"eval_loss": None}
    else:
        if result.status == "interrupted":
            raise KeyboardInterrupt
        summary = result.summary
    if "eval_loss" not in summary:
        raise CELoraError(f"{folder} has no loss on the held-out rows; remove that folder and run it again")
    loss = summary["eval_loss"]
    return Outcome(
        arm,
        seed,
        summary["step"],
        loss,
        None if loss is None else summary.get("eval_mean_token_accuracy"),
        summary.get("median_step_time_ms"),
        float(summary["seconds"]),
    )


def _by_arm(outcomes: Sequence[Outcome], arm: str, of: Callable[[Outcome], Any]) -> list[Any]:
    return [of(outcome) for outcome in outcomes if outcome.arm == arm]


def _losses(outcomes: Sequence[Outcome], arm: str) -> dict[int, float]:
    """Held-out loss by seed, of those with which the arm did not diverge."""
    return {o.seed: o.eval_loss for o in outcomes if o.arm == arm and o.eval_loss is not None}


def differences(outcomes: Sequence[Outcome], arms: Sequence[str]) -> dict[str, Difference]:
    """Held-out loss of every arm but the first against the first; 95 % are those of all intervals together.

    Seeds with which one of the two diverged are left out, and so is an arm without others.
    """
    base, found = _losses(outcomes, arms[0]), {}
    for arm in arms[1:]:
        losses = _losses(outcomes, arm)
        if seeds := sorted(base.keys() & losses.keys()):
            of, against = ([each[seed] for seed in seeds] for each in (losses, base))
            found[arm] = Difference.of(of, against, comparisons=len(arms) - 1)
    return found


def _diverged(outcomes: Sequence[Outcome], arm: str) -> str:
    """With how many seeds an arm diverged, or nothing."""
    of = _by_arm(outcomes, arm, lambda o: o.eval_loss)
    return f"diverged with {of.count(None)} of {len(of)} seed{'s' if len(of) > 1 else ''}" if None in of else ""


def findings(outcomes: Sequence[Outcome], arms: Sequence[str]) -> list[str]:
    """Plain sentences for each arm: did it diverge, is its held-out loss another than the first's, how fast is it."""
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
    """Everything that was found, as plain values: outcomes, differences with their intervals, sentences."""
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
    """The table that is printed."""
    seeds = len(_by_arm(outcomes, arms[0], lambda o: o.seed))
    table = Table(title=f"{max(o.steps for o in outcomes)} steps, {seeds} seed{'s' if seeds > 1 else ''}")
    for column in HEADER:
        table.add_column(column, justify="left" if not column else "right")
    for cells in summary(outcomes, arms):
        table.add_row(*cells)
    return table


def _cells(outcomes: Sequence[Outcome], arms: Sequence[str]) -> dict[str, dict[str, str]]:
    rows = summary(outcomes, arms)
    return {name: {row[0]: row[i] for row in rows} for i, name in enumerate(HEADER) if name}
