"""One training run, from a `TrainRequest` to an adapter with its metrics, checkpoints and report.

TRL's SFTTrainer trains, with celora attached to its model. A run can be resumed at any time. Ctrl-C stops it at the end
of an optimizer step and saves. A killed process loses only the steps after its last whole checkpoint. Under torchrun
and `accelerate launch` every process runs this code; only the first writes and prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import celora
from celora.errors import CELoraError
from celora.files import quoted, write_json, write_text
from celora.machine.processes import from_first
from celora.modeling.report import AttachReport
from celora.runtime.attachment import require
from celora.train.checkpointing import choose_checkpointing
from celora.train.choose import Chosen, choose
from celora.train.decisions import rank_line
from celora.train.dtype import settle_dtype
from celora.train.fingerprint import check_same, fingerprints
from celora.train.forecast.estimate import fitted
from celora.train.interrupt import StopAtStepEnd
from celora.train.live import LiveReport
from celora.train.loading import (
    check_files,
    check_modules,
    evaluation_rows,
    evaluation_source,
    load_model,
    load_tokenizer,
    lora_config,
    quiet_libraries,
    training_rows,
    with_folder,
)
from celora.train.output.card import Card
from celora.train.output.folder import CONFIG, METRICS, REPORT, RUN, OutputFolder, writing_to
from celora.train.output.saving import UNUSABLE, Sealing, save_adapter, stopped, take_over, upload
from celora.train.processes import introduce_deepspeed, is_first, losing_contact, processes
from celora.train.progress import MetricsWriter, ProgressLine, progress_console, say
from celora.train.record import TrainResult, is_evaluated, longer, make_record, of_forwards, summarise, worst
from celora.train.report import make_page, write_report
from celora.train.request.arguments import TrainRequest, check_record, sft_config
from celora.train.rows.answers import Learnt, what_is_learnt
from celora.train.rows.data import has_turns
from celora.train.rows.truncation import truncation_lines
from celora.train.trainer import build_trainer, check_tokens, refused
from celora.train.wall_clock import WallClock
from celora.train.without import seconds_of_peft


def train(
    request: TrainRequest, *, console: Console | None = None, began: float | None = None, compares: bool = False
) -> TrainResult:
    """Train as `request` says, and leave the result in `request.output`.

    `began`: when the command began, by `time.perf_counter`; by default now. `compares`: at the end, also measure what
    PEFT alone would have taken (`celora.train.without`).

    Raises:
        CELoraError: the input is bad (nothing in the output folder has changed then), another run uses that folder, or
            the disk is full.
    """
    with losing_contact(request.output), ExitStack() as stack:
        console = (console or progress_console()) if is_first() else Console(quiet=True)
        return _train(request, console, stack, WallClock(began), compares=compares)


@dataclass(frozen=True)
class _Entered:
    """A run whose output folder is checked: its final request, and the earlier run that it continues, if any."""

    request: TrainRequest
    folder: OutputFolder
    begun: bool  # an earlier run used the folder; it is locked by now
    earlier: dict[str, Any] | None

    @property
    def finished(self) -> bool:
        return self.earlier is not None and self.earlier.get("status") == "finished"


@dataclass(frozen=True)
class _Ready:
    """A trainer with celora attached to its model, and the facts that the run records about both."""

    request: TrainRequest  # with the dtype of the base model settled
    trainer: Any
    rows: Any
    eval_rows: Any
    learnt: Learnt
    chosen: Chosen
    attached: AttachReport
    made_from: dict[str, str]
    asked: dict[str, Any]  # what was asked for where --memory has chosen something else


_Marker = dict[str, Any]  # step and seconds of a checkpoint, and the steps of the whole run


@dataclass
class _Written:
    """What the first process writes. The other processes write nothing."""

    record: dict[str, Any] = field(default_factory=lambda: {"summary": {}})
    metrics: MetricsWriter | None = None
    aside: Path | None = None  # where the run that is being replaced waits
    new: bool = False  # no earlier run is continued


def _train(
    request: TrainRequest, console: Console, stack: ExitStack, clock: WallClock, *, compares: bool
) -> TrainResult:
    with clock.spending("start"):
        run = _enter(request, stack)
    folder = run.folder
    lost: list[str] = []
    if run.earlier and run.finished and not longer(run.earlier, run.request.given, folder.path / METRICS):
        lost = folder.missing()
        if not lost:
            return _already_finished(run.request, run.earlier, folder, console)
        say(console, request.options.quiet, f"{request.output} is finished, and {', '.join(lost)} is written again.")
    with quiet_libraries():
        ready = _prepare(run, console, clock)
        checkpoint, marker = _beginning(run, ready.trainer, lost, console)
        written = _open(run, ready, marker, stack) if is_first() else _Written()
        if request.options.resume:
            where = (
                f"from {checkpoint.name}" if checkpoint else "from the beginning: there is no checkpoint to go on from"
            )
            new = f"No run in {request.output} to resume: starting a new one."
            say(console, request.options.quiet, f"Resuming {where}." if run.earlier else new)
        status = _carry_out(ready, folder, written, checkpoint, marker, console)
        if compares and status == "finished" and is_first():
            _compare_with_peft(ready, folder, written.record, marker["step"], console)
    if status == "interrupted":
        saved = folder.last_checkpoint()
        how = f"Saved {saved[0].name}; continue" if saved else "No checkpoint to go on from is saved; start again"
        say(console, False, f"{how} with: celora train --output {quoted(request.output)} --resume")
    trainer = ready.trainer
    return TrainResult(status, request.output, int(trainer.state.global_step), written.record["summary"], trainer.model)


def _enter(request: TrainRequest, stack: ExitStack) -> _Entered:
    """Check the output folder, and lock it if an earlier run used it. `stack` releases the lock."""
    options, folder, first = request.options, OutputFolder(request.output), is_first()
    begun = folder.begun
    if first and begun:
        stack.enter_context(folder.locked())
        folder.recover()
    if first:
        folder.check(resume=options.resume, overwrite=options.overwrite)
    earlier = folder.run() if options.resume else None
    if earlier:
        check_record(folder.path / RUN, earlier)
    return _Entered(request, folder, begun, earlier)


def _prepare(run: _Entered, console: Console, clock: WallClock) -> _Ready:
    """Load model, tokenizer and rows, make the trainer and attach celora. Prints a line about each decision."""
    request, earlier, first = run.request, run.earlier, is_first()
    check_files(request)
    quiet, asked = request.options.quiet, (earlier or {}).get("asked", {})
    if request.options.memory is not None and earlier is None:
        with clock.spending("choose"):
            request, line = fitted(request, request.options.memory)
        asked = {name: value for name, value in run.request.given.items() if request.given.get(name) != value}
        say(console, quiet, line)
    with clock.spending("load"):
        request = with_folder(request, lambda line: say(console, quiet, line))
        tokenizer = load_tokenizer(request)
    with clock.spending("start"):
        args = sft_config(request)
    if args.deepspeed and processes() > 1:
        introduce_deepspeed()
    with clock.spending("load"), args.main_process_first():
        rows, eval_rows = training_rows(request, tokenizer), evaluation_rows(request, tokenizer)
    with clock.spending("load"):
        made_from = fingerprints(request, evaluation_source(request)) if first else {}
    if earlier and first:
        check_same(earlier.get("made_from"), made_from)
    with clock.spending("load"):
        request, dtype_line = settle_dtype(request, args, earlier)
        say(console, quiet, dtype_line)
        peft, model = lora_config(request), load_model(request)
        check_modules(request, model)
    with clock.spending("tokenise"):
        trainer = build_trainer(request, args, model, tokenizer, rows, eval_rows, peft=peft)
        check_tokens(trainer, request)
    trainer.wall_clock = clock
    with clock.spending("tokenise"):
        cut, learnt = [*truncation_lines(trainer, rows, eval_rows)], what_is_learnt(trainer, rows)
    for line in cut:
        say(console, False, line)  # a warning
    with clock.spending("choose"), refused("training"):
        chosen = choose(request, trainer, begun=earlier is not None)
        attached = celora.attach(trainer.model, chosen.config)
    with clock.spending("load"), refused("training"):
        choice = choose_checkpointing(trainer, asked=request.asks_for_checkpointing)
    _smooth_in_the_head(trainer)
    for line in (rank_line(request), str(learnt), str(attached), choice):
        say(console, quiet, line)
    return _Ready(request, trainer, rows, eval_rows, learnt, chosen, attached, made_from, asked)


def _beginning(run: _Entered, trainer: Any, lost: Sequence[str], console: Console) -> tuple[Path | None, _Marker]:
    """The checkpoint to continue from, its step and seconds, and the steps of the whole run. Collective.

    Without a checkpoint (None) the whole run is counted when it begins.
    """
    options, output = run.request.options, run.request.output
    # A damaged checkpoint is worth a warning, so the line is printed even when quiet.
    resumed: tuple[Path, _Marker] | None = from_first(
        run.folder.last_checkpoint(lambda line: say(console, False, line)) if options.resume and is_first() else None
    )
    if run.finished and resumed is None:
        what = f"{output} is finished" + (f", without {', '.join(lost)}," if lost else "")
        raise CELoraError(f"{what} and no checkpoint to go on from is left; --overwrite trains anew")
    if resumed is None:
        return None, {"step": 0, "seconds": 0.0, "steps": None}
    checkpoint, marker = resumed
    return checkpoint, marker | {"steps": trainer.count_steps(checkpoint, marker["step"])}


def _open(run: _Entered, ready: _Ready, marker: _Marker, stack: ExitStack) -> _Written:
    """Begin the output folder: write this run's record, configuration and metrics. In the first process only."""
    folder, options, output, trainer = run.folder, run.request.options, run.request.output, ready.trainer
    with writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
    if not run.begun:
        stack.enter_context(folder.locked())
        folder.check(resume=options.resume, overwrite=options.overwrite)
    aside = folder.set_aside() if options.overwrite else None
    if options.resume:
        folder.clear_after(marker["step"])
    chosen = ready.chosen
    record = make_record(ready.request, trainer.args, chosen.config, ready.attached)
    gate = list(chosen.timings) or (run.earlier or {}).get("gate", [])  # a resumed run does not time again
    record |= {"gate": gate, "made_from": ready.made_from, "asked": ready.asked, "turns": has_turns(ready.rows)}
    adapter_step = (run.earlier or {}).get("adapter_step")  # of the adapter beside this file
    record |= {"adapter_step": adapter_step, "steps": marker["steps"]}
    write_json(output / RUN, record)
    chosen.config.save(output / CONFIG)
    metrics = MetricsWriter(
        output / METRICS, after_step=marker["step"], seconds=marker["seconds"], phases=trainer.phases
    )
    name = trainer.args.hub_model_id or output.absolute().name
    trainer.card = Card(name, record, len(ready.rows), ready.learnt, metrics.elapsed)
    return _Written(record, metrics, aside, new=run.earlier is None)


def _carry_out(
    ready: _Ready, folder: OutputFolder, written: _Written, checkpoint: Path | None, marker: _Marker, console: Console
) -> str:
    """Train on from the checkpoint, save, and complete the files. Returns "finished" or "interrupted"."""
    trainer, metrics = ready.trainer, written.metrics
    progress, stop = ProgressLine(console, quiet=ready.request.options.quiet), StopAtStepEnd(console)
    name, clock = report_name(ready.request), trainer.wall_clock
    live = None if metrics is None else LiveReport(folder.path, name, written.record, clock)
    # Transformers would also remove checkpoints when training ends, the newest one too.
    limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    own = (celora.Callback(), trainer.phases, stop, metrics, live, progress, Sealing(folder, metrics, limit))
    for callback in filter(None, own):
        trainer.add_callback(callback)
    status = "failed"
    try:
        with stop.listening():
            # celora's callback reads its state from there.
            trainer.args.resume_from_checkpoint = str(checkpoint) if checkpoint else None
            if checkpoint and marker["step"] == marker["steps"]:
                take_over(trainer, checkpoint)
            else:
                with clock.spending("train"):
                    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
            early = stop.asked and trainer.state.global_step < trainer.state.max_steps
            if not early:
                evaluated = from_first(metrics is not None and is_evaluated(metrics.path, trainer))
                if ready.eval_rows is not None and not evaluated:
                    trainer.evaluate()
                with clock.spending("save"):
                    save_adapter(trainer, folder.path)
                    written.record["adapter_step"] = int(trainer.state.global_step)
                    upload(trainer, folder)
            status = "interrupted" if early else "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except (CELoraError, *UNUSABLE) as error:
        raise stopped(error, folder) from error
    finally:
        progress.close()
        _leave(ready, folder, written, status)
    return status


def _leave(ready: _Ready, folder: OutputFolder, written: _Written, status: str) -> None:
    """Complete the record and the report. If nothing was trained, put back the run that was to be replaced.

    A setting that is refused as late as the first step leaves no run, so that the command can be given again.
    """
    trainer, metrics, aside = ready.trainer, written.metrics, written.aside
    trained = status == "finished" or trainer.state.global_step > 0
    if is_first() and trained:
        folder.forget_earlier()
    elif aside is not None or (written.new and status == "failed"):
        folder.restore()  # nothing was trained, so the earlier run stays, or none
    if metrics is None or not (trained or (status == "interrupted" and aside is None)):
        return
    errors = require(trainer.model).relative_errors
    forwards = require(trainer.model).forwards
    exact = sorted(forwards.made_exact)
    summary = summarise(trainer, metrics, ready.attached) | worst(errors) | of_forwards(forwards.errors, exact)
    moves = [asdict(move) for move in require(trainer.model).ladder.moves]
    written.record |= {"forward_errors": forwards.errors, "forwards_made_exact": exact}
    written.record |= {"status": status, "summary": summary, "moves": moves, "errors": errors}
    # If the run failed, writing may fail for the same reason. The user should hear the first reason.
    with suppress(CELoraError) if status == "failed" else nullcontext():
        _write(ready, folder, written.record)


def _write(ready: _Ready, folder: OutputFolder, record: dict[str, Any]) -> None:
    """Write record and report. The record is written twice, because it also has the time that the report took."""
    clock = ready.trainer.wall_clock
    record["summary"] |= clock.summary()
    write_json(folder.path / RUN, record)
    with clock.spending("report"):
        page = make_page({report_name(ready.request): folder.path})
    record["summary"] |= clock.summary()
    write_json(folder.path / RUN, record)
    write_text(folder.path / REPORT, page)  # last: a run whose report is older than its record writes it again


def _compare_with_peft(
    ready: _Ready, folder: OutputFolder, record: dict[str, Any], step: int, console: Console
) -> None:
    """Add what PEFT alone would have taken to record and report. The run has ended well whatever happens here."""
    request, trainer, clock = ready.request, ready.trainer, ready.trainer.wall_clock
    if request.preset == "off" or request.options.memory is not None:
        return
    line = "Measuring what PEFT would have taken (Ctrl-C skips it) ..."
    seconds, steps = clock.seconds["train"], trainer.state.global_step - step
    try:
        with clock.spending("compare"):
            found = seconds_of_peft(trainer, seconds, steps, lambda: say(console, request.options.quiet, line))
        if found is None:
            return
        record["summary"]["train_seconds_of_peft"] = round(found, 3)
    except (KeyboardInterrupt, RuntimeError, CELoraError) as error:
        say(console, request.options.quiet, f"Not measured: {str(error) or 'interrupted'}.")
    try:
        _write(ready, folder, record)
    except CELoraError as error:
        say(console, request.options.quiet, f"Not recorded: {error}.")


def _already_finished(
    request: TrainRequest, earlier: dict[str, Any], folder: OutputFolder, console: Console
) -> TrainResult:
    """The result of a finished run. Writes its report if the run was killed before that."""
    step, first = int(earlier["summary"]["step"]), is_first()
    say(
        console,
        request.options.quiet,
        f"{request.output} is finished, at step {step}; a larger --max_steps, or more "
        "--num_train_epochs with --max_steps -1, continues it.",
    )
    if first and not folder.reported():
        write_report(request.output / REPORT, {report_name(request): request.output})
        say(console, request.options.quiet, f"{REPORT} was not written to its end; it is now.")
    return TrainResult("already finished", request.output, step, earlier["summary"] if first else {})


def report_name(request: TrainRequest) -> str:
    """What a run is called in its own report."""
    return request.preset or "celora"


def _smooth_in_the_head(trainer: Any) -> None:
    """Move label smoothing from Trainer, which needs all logits, into the head that computes only labelled tokens."""
    forward, args = require(trainer.model).forward, trainer.args
    plain = args.loss_type == "nll" and not args.torch_compile  # a compiled graph contains the model's own loss
    if forward is not None and trainer.label_smoother is not None and plain:
        forward.smoothing, trainer.label_smoother = float(trainer.args.label_smoothing_factor), None
