"""`celora compare`: trains LoRA and celora on the same rows in the same order, and says whether they differ.

An arm is one way to train, such as a preset. Every arm trains with every seed, in a folder of its own, exactly as
`celora train` does. A finished run is not repeated; an interrupted one is resumed. The arms are judged by loss and
token accuracy on held-out rows; `outcomes.py` draws the conclusions. Both are those of the adapter on the original
base, also for an arm that trains in 8 bits.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from celora.errors import CELoraError, Diverged, unknown
from celora.files import json_lines, read_json, replacing, write_json, write_text
from celora.studies.outcomes import Outcome, cells, findings
from celora.train.dtype import settle_dtype
from celora.train.fingerprint import check_same, fingerprints
from celora.train.loading import load_tokenizer, quiet_libraries, training_rows, with_folder
from celora.train.output.folder import LOCK, RUN, OutputFolder, writing_to
from celora.train.progress import progress_console
from celora.train.report import write_report
from celora.train.request.arguments import TrainRequest, fitting, make_request, recorded, sft_config
from celora.train.run import train

# Arms by name, with the settings in which they differ.
ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {"preset": "off"},
    "exact": {"preset": "exact"},
    "paper": {"preset": "paper"},
    "auto": {"preset": "auto"},
    "fast": {"preset": "fast"},
}
DEFAULT_ARMS = ("LoRA", "paper", "auto")
RESULT, RECORD = "compare.jsonl", "compare.json"
_HELD_OUT, _MOST_HELD_OUT = 0.1, 500


def compare(
    settings: Mapping[str, object],
    *,
    arms: Sequence[str] = DEFAULT_ARMS,
    seeds: int = 3,
    console: Console | None = None,
) -> list[Outcome]:
    """Train every arm with every seed into `settings["output"]`, unless that is done already, and write the results.

    Args:
        settings: the settings of `celora train` (see `make_request`). `output` is the folder of the whole comparison.
            Without `eval_data`, a tenth of the rows (500 at most) is held out.
        arms: names from `ARMS`. The others are compared with the first.
        seeds: how many seeds: 0, 1, ..., seeds - 1. A seed decides data order, adapter initialisation and all else
            that is random.
        console: where progress is printed.

    Raises:
        CELoraError: the input is bad, or the folder has a comparison of other settings, other rows or another model.
    """
    console = console or progress_console()
    for arm in arms:
        if arm not in ARMS:
            raise unknown("arm", arm, ARMS)
    if len(set(arms)) != len(arms) or len(arms) < 2:
        raise CELoraError(f"arms {', '.join(arms)}; expected two or more different ones of: {', '.join(ARMS)}.")
    for name in ("preset", "seed", "resume", "overwrite"):
        if settings.get(name):
            raise CELoraError(f"{name} is not for a comparison, which sets it for each run; leave it out.")
    if settings.get("memory"):
        raise CELoraError("memory is not for a comparison: it would give each arm another base; leave it out.")
    probe = make_request(dict(settings))
    if probe.train.get("push_to_hub"):
        raise CELoraError("push_to_hub is not for a comparison: each run would replace the one before; leave it out.")
    for arm in arms:
        make_request(_own(settings, arm))  # so that a mistake is reported before any training
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

    outcomes: list[Outcome] = []
    for seed in range(seeds):
        # Every second seed has the arms in reverse: later arms may find a warmer, or busier, machine.
        for arm in arms if seed % 2 == 0 else reversed(arms):
            if not probe.options.quiet:
                left = _time_left(outcomes, len(arms) * seeds)
                console.print(f"Run {len(outcomes) + 1} of {len(arms) * seeds}: {arm}, seed {seed}{left}", markup=False)
            folder = output / f"{arm}-seed{seed}"
            own = _own(settings, arm) | data | {"seed": seed, "output": str(folder)}
            try:
                outcomes.append(_run(arm, seed, own, folder, console))
            except CELoraError as error:
                raise CELoraError(f"{arm}, seed {seed}: {error}") from error
    outcomes.sort(key=lambda o: (arms.index(o.arm), o.seed))
    write_text(output / RESULT, json_lines(map(dataclasses.asdict, outcomes)))
    runs = {f"{o.arm}, seed {o.seed}": output / f"{o.arm}-seed{o.seed}" for o in outcomes}
    write_report(
        output / "report.html",
        runs,
        title="celora compare",
        results=cells(outcomes, arms),
        findings=findings(outcomes, arms),
        repeats={f"{o.arm}, seed {o.seed}": o.arm for o in outcomes},
    )
    return outcomes


def _own(settings: Mapping[str, object], arm: str) -> dict[str, Any]:
    """The settings of one arm."""
    own = {**settings, **ARMS[arm]}
    return fitting(own, own["preset"])


def _time_left(outcomes: Sequence[Outcome], runs: int) -> str:
    if not outcomes:
        return ""
    minutes = statistics.fmean(o.seconds for o in outcomes) * (runs - len(outcomes)) / 60
    return f", about {minutes:.1f} min of training left in all"


def _claim(output: Path, request: TrainRequest) -> None:
    """Mark the folder as this comparison's, or refuse one that is in use for something else."""
    # A later call may change what is printed, but not what is trained.
    given = {k: v for k, v in recorded(request.given).items() if k != "output"}
    record, made_from = output / RECORD, fingerprints(request, request.options.eval_data)
    if record.is_file():
        document = read_json(record)
        before = document.get("given") if isinstance(document, dict) else None
        if not isinstance(before, dict):
            raise CELoraError(f"{record} is not what a comparison wrote: 'given' is missing; choose another folder")
        changed = sorted(k for k in given.keys() | before.keys() if given.get(k) != before.get(k))
        if not any(output.glob(f"*-seed*/{RUN}")):  # nothing has been trained yet, so the settings may change
            with OutputFolder(output).locked():
                shutil.rmtree(output / "data", ignore_errors=True)
                write_json(record, {"given": given, "made_from": made_from})
            return
        if changed:
            key = changed[0]
            raise CELoraError(
                f"--output {str(output)!r} holds a comparison with {key}={before.get(key)!r}, not {given.get(key)!r}; "
                "choose another folder, or give the same arguments to continue it"
            )
        check_same(document.get("made_from"), made_from, of="comparison")
        return
    unmarked = (LOCK, f".{RECORD}.tmp")  # left by a comparison that was killed early
    with writing_to(output):
        if output.exists() and (not output.is_dir() or any(entry.name not in unmarked for entry in output.iterdir())):
            raise CELoraError(f"--output {str(output)!r} holds something else; choose a new folder")
        output.mkdir(parents=True, exist_ok=True)
    write_json(record, {"given": given, "made_from": made_from})


def _split(request: TrainRequest, output: Path, console: Console) -> dict[str, str | None]:
    """Hold some rows out, unless the user gave `eval_data`. Returns the settings that name the two files for every run.

    No copy of a held-out row stays in the training rows.
    """
    if request.options.eval_data:
        return {}
    train_file, held_out_file = output / "data" / "train.jsonl", output / "data" / "held-out.jsonl"
    if not held_out_file.is_file():
        rows = training_rows(request, load_tokenizer(with_folder(request)))
        if len(rows) < 2:
            raise CELoraError(f"{request.data!r} has {len(rows)} row; a comparison needs rows to hold out. Give more.")
        held_out = min(_MOST_HELD_OUT, max(1, int(_HELD_OUT * len(rows))))
        parts = rows.train_test_split(test_size=held_out, seed=0)
        unseen = {json.dumps(row) for row in parts["test"]}
        kept = [i for i, row in enumerate(parts["train"]) if json.dumps(row) not in unseen]
        if again := len(parts["train"]) - len(kept):
            if not kept:
                raise CELoraError(f"{request.data!r} has no row but copies of those held out; give other rows.")
            console.print(f"{again:,} rows are copies of held-out rows; they are not trained on.", markup=False)
            parts["train"] = parts["train"].select(kept)
        train_file.parent.mkdir(exist_ok=True)
        # The held-out file is written last. If it exists, both files are whole.
        for part, file in (("train", train_file), ("test", held_out_file)):
            with replacing(file) as temporary:
                parts[part].to_json(str(temporary))
    whole = {"dataset_config": None, "dataset_train_split": "train", "dataset_test_split": "test"}
    return {"data": str(train_file), "eval_data": str(held_out_file), **whole}


def _dtype(request: TrainRequest, output: Path, console: Console) -> str:
    """The base model's dtype. The first run chooses it, and all others use the same."""
    for record in sorted(output.glob(f"*-seed*/{RUN}")):
        if (begun := OutputFolder(record.parent).run()) is not None:
            return str(begun["lora"]["dtype"])
    settled, line = settle_dtype(request, sft_config(request))
    if not request.options.quiet:
        console.print(line, markup=False, soft_wrap=True)
    return str(settled.lora["dtype"])


def _run(arm: str, seed: int, own: dict[str, Any], folder: Path, console: Console) -> Outcome:
    """Train one arm with one seed, or resume it, or read its result if it is finished."""
    begun = OutputFolder(folder).run() is not None
    try:
        result = train(make_request(own | ({"resume": True} if begun else {})), console=console)
    except Diverged as error:  # a diverged run is a result, too
        console.print(f"{arm}, seed {seed}: {error}", markup=False)
        summary = OutputFolder(folder).resumable()["summary"] | {"eval_loss": None, "eval_base_loss": None}
    else:
        if result.status == "interrupted":
            raise KeyboardInterrupt
        summary = result.summary
    if "eval_loss" not in summary:
        raise CELoraError(f"{folder} has no loss on the held-out rows; remove that folder and run it again")
    # Of the model that the adapter is loaded onto.
    loss = summary.get("eval_base_loss", summary["eval_loss"])
    accuracy = summary.get("eval_base_mean_token_accuracy", summary.get("eval_mean_token_accuracy"))
    return Outcome(
        arm,
        seed,
        summary["step"],
        loss,
        None if loss is None else accuracy,
        summary.get("median_step_time_ms"),
        float(summary["seconds"]),
    )
