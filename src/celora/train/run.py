"""One training run, from a `TrainRequest` to an adapter with its metrics, checkpoints and report.

TRL's SFTTrainer trains; celora is attached to its model. The folder can be resumed at any time: Ctrl-C stops at the
end of an optimizer step and saves; a killed process loses only what came after its last whole checkpoint. Under
torchrun and `accelerate launch` every process comes through here; only the first writes and prints.
"""

from __future__ import annotations

import platform
import shlex
import statistics
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from rich.console import Console
from torch.utils.data import Sampler
from transformers import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer

import celora
from celora.attach import require
from celora.borrowed import NAMES, borrow
from celora.config import CELoraConfig
from celora.errors import CELoraError, out_of_memory
from celora.plan import Plan, device_name
from celora.synchronise import from_first
from celora.train.answers import AnswersOnly, what_is_learnt
from celora.train.arguments import TrainRequest, check_record, recorded, sft_config
from celora.train.card import Card
from celora.train.checkpointing import choose_checkpointing
from celora.train.doctor import PACKAGES
from celora.train.dtype import settle_dtype
from celora.train.fingerprint import check_same, fingerprints
from celora.train.folder import CONFIG, METRICS, PLAN, REPORT, RUN, OutputFolder, write_json, writing_to
from celora.train.interrupt import StopAtStepEnd
from celora.train.loading import (
    evaluation_rows,
    evaluation_source,
    load_adapter,
    load_model,
    load_tokenizer,
    lora_config,
    quiet_libraries,
    training_rows,
)
from celora.train.planning import choose, make_plan, planned, planned_errors
from celora.train.processes import introduce_deepspeed, is_first, losing_contact, lost_contact, processes
from celora.train.progress import MetricsWriter, Phases, ProgressLine, read_metrics
from celora.train.report import write_report
from celora.train.saving import UNUSABLE, SafeSaving, Sealing, save_adapter, stopped, take_over
from celora.train.template import refused_row
from celora.train.truncation import truncation_lines

# What is left out where nothing is evaluated: a file of settings may be the training's.
_NO_EVALUATION = {"eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False, "save_strategy": "no"}
_LAST = ("loss", "eval_loss", "tokens_seen", "mean_token_accuracy", "eval_mean_token_accuracy")


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind. `status` is "finished", "interrupted" or "already finished"; only a run that was not
    finished before comes with its model, trained and still attached."""

    status: str
    output: Path
    step: int
    summary: dict[str, Any]
    model: Any = field(default=None, repr=False)


class OrderOfEpoch(Sampler[int]):
    """The order of a sampler that draws, from the seed and the epoch alone; Accelerate tells the epoch."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed = sampler, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that of this epoch."""
        self.sampler.generator = torch.Generator().manual_seed(self.seed + epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class Trainer(SafeSaving, AnswersOnly, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that says where its time goes, and tells nobody about it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.phases = Phases()
        super().__init__(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's, timed while training."""
        with self.phases.timing("forward") if self.model.training else nullcontext():
            return super().compute_loss(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's, timed: all of it that is not the forward is the backward."""
        with self.phases.timing("backward", without="forward"):
            return super().training_step(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; what a library refuses before the first step is one line."""
        with refused("training", self):
            return super().train(*args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, in an order that a run which is resumed in a later epoch has, too."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = OrderOfEpoch(sampler, seed)
        return sampler

    def get_train_dataloader(self) -> Any:
        """As the Trainer's; none without a batch."""
        loader = super().get_train_dataloader()
        if len(loader) == 0:
            raise CELoraError(
                f"dataloader_drop_last={self.args.dataloader_drop_last} leaves no batch: {len(self.train_dataset):,} "
                f"rows for batches of {self.args.train_batch_size:,}; leave it out, or make batches smaller"
            )
        return loader

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; a metric that no evaluation has is one line."""
        with refused("best model"):
            return super()._determine_best_metric(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *rest: Any) -> Any:
        """As TRL's; a row that the chat template refuses is named."""
        try:
            return super()._prepare_dataset(dataset, processing_class, *rest)
        except OSError:
            raise
        except Exception as error:
            refused = refused_row(dataset, processing_class, getattr(self, "chat_template", None))
            if refused is None:
                raise
            (number, reason), data = refused, "training" if rest[-1] == "train" else "evaluation"
            said = " ".join(str(reason).split())
            raise CELoraError(f"the chat template refuses row {number:,} of the {data} data: {said}") from error

    def _send_telemetry(self) -> None:
        """TRL reports every construction to the hub; training a model here stays here."""


# What `Trainer` and its mixins override, as `celora.borrowed` lists it.
OVERRIDDEN = tuple(name for name in NAMES if name.startswith(("transformers:Trainer._", "trl:SFTTrainer._")))


@contextmanager
def refused(what: str, trainer: Any = None) -> Iterator[None]:
    """What a library says of the values that it is given for `what`, in one line.

    What our own code raises is a bug and left as it is; so is what is wrong with the machine and, with a `trainer`,
    with files, and all that comes after the first step.
    """
    try:
        yield
    except CELoraError:
        raise
    except Exception as error:
        late = trainer is not None and (isinstance(error, UNUSABLE) or trainer.state.global_step > 0)
        if late or out_of_memory(error) or lost_contact(error) or _raised_here(error):
            raise
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise CELoraError(f"no {what} with these settings: {kind}{' '.join(str(error).split())}") from error


def _raised_here(error: Exception) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("celora.")


def train(request: TrainRequest, *, console: Console | None = None) -> TrainResult:
    """Train as `request` says and leave the result in `request.output`.

    Raises:
        CELoraError: bad input, found before anything in the output folder is touched; another run in that folder; or
            a disk that takes no more.
    """
    with losing_contact(request.output), ExitStack() as held:
        console = (console or Console(stderr=True)) if is_first() else Console(quiet=True)
        return _train(request, console, held)


def _train(request: TrainRequest, console: Console, held: ExitStack) -> TrainResult:
    options, folder, first = request.options, OutputFolder(request.output), is_first()
    begun = folder.begun
    if first and begun:
        held.enter_context(folder.locked())
        folder.recover()
    if first:
        folder.check(resume=options.resume, overwrite=options.overwrite)
    earlier = folder.run() if options.resume else None
    if earlier:
        check_record(folder.path / RUN, earlier)
        answers = {"assistant_only_loss": earlier["train"].get("assistant_only_loss", False)}
        request = replace(request, train=request.train | answers)  # as it began, if by a celora of another default
    finished = earlier is not None and earlier.get("status") == "finished"
    lost: list[str] = []
    if earlier and finished and not _longer(earlier, request.given, folder.path / METRICS):
        lost = folder.missing()
        if not lost:
            return _already_finished(request, earlier, folder, console)
        _say(console, options.quiet, f"{request.output} is finished, and {', '.join(lost)} is written again.")

    with quiet_libraries():
        tokenizer = load_tokenizer(request)
        args = sft_config(request)
        if args.deepspeed and processes() > 1:
            introduce_deepspeed()
        with args.main_process_first():
            rows, eval_rows = training_rows(request, tokenizer), evaluation_rows(request, tokenizer)
        made_from = fingerprints(request, evaluation_source(request)) if first else {}
        if earlier and first:
            check_same(earlier.get("made_from"), made_from)
        request, of_dtype = settle_dtype(request, args, earlier)
        _say(console, options.quiet, of_dtype)
        model = load_model(request)
        trainer = build_trainer(request, args, model, tokenizer, rows, eval_rows, peft=lora_config(request))
        for line in truncation_lines(trainer, rows, eval_rows):
            _say(console, False, line)  # a warning
        learnt = what_is_learnt(trainer, rows)
        with refused("training"):
            config, plan = choose(request, trainer, console, begun=earlier is not None)
            attached = celora.attach(trainer.model, config)
            require(trainer.model).plan = plan
            choice = choose_checkpointing(trainer, asked="gradient_checkpointing" in request.given)
        _smooth_in_the_head(trainer)
        for line in (rank_line(request), str(learnt), attached_text(attached, plan), choice):
            _say(console, options.quiet, line)

        # What is wrong with a checkpoint is a warning: said even when quiet.
        resumed: tuple[Path, dict[str, Any]] | None = from_first(
            folder.last_checkpoint(lambda line: _say(console, False, line)) if options.resume and first else None
        )
        if finished and resumed is None:
            what = f"{request.output} is finished" + (f", without {', '.join(lost)}," if lost else "")
            raise CELoraError(f"{what} and no checkpoint to go on from is left; --overwrite trains anew")
        checkpoint, marker = resumed or (None, {"step": 0, "seconds": 0.0})
        if 0 < args.max_steps < marker["step"]:
            raise CELoraError(f"max_steps={args.max_steps}, but the run is saved at step {marker['step']}; give more")
        aside = metrics = None
        record: dict[str, Any] = {"summary": {}}
        if first:
            with writing_to(request.output):
                request.output.mkdir(parents=True, exist_ok=True)
            if not begun:
                held.enter_context(folder.locked())
                folder.check(resume=options.resume, overwrite=options.overwrite)
            aside = folder.set_aside() if options.overwrite else None
            if options.resume:
                folder.clear_after(marker["step"])
            record = _record(request, args, attached) | {"made_from": made_from}
            write_json(request.output / RUN, record)
            if plan is not None:
                plan.save(request.output / PLAN)
            config.save(request.output / CONFIG)  # last: with it and without a plan, the run goes on without one
            metrics = MetricsWriter(
                request.output / METRICS, after_step=marker["step"], seconds=marker["seconds"], phases=trainer.phases
            )
            name = args.hub_model_id or request.output.absolute().name
            trainer.card = Card(name, record, len(rows), learnt, metrics.elapsed)
        if options.resume:
            where = (
                f"from {checkpoint.name}" if checkpoint else "from the beginning: there is no checkpoint to go on from"
            )
            new = f"No run in {request.output} to resume: starting a new one."
            _say(console, options.quiet, f"Resuming {where}." if earlier else new)
        progress, stop = ProgressLine(console, quiet=options.quiet), StopAtStepEnd(console)
        own = (celora.Callback(), trainer.phases, stop, metrics, progress, Sealing(folder, metrics))
        for callback in filter(None, own):
            trainer.add_callback(callback)

        status = "failed"
        try:
            with stop.listening():
                # Where celora's callback looks for its state.
                args.resume_from_checkpoint = str(checkpoint) if checkpoint else None
                if checkpoint and marker["step"] == args.max_steps:
                    take_over(trainer, checkpoint)
                else:
                    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
                early = stop.asked and trainer.state.global_step < trainer.state.max_steps
                if not early:
                    evaluated = from_first(metrics is not None and _evaluated(metrics.path, trainer))
                    if eval_rows is not None and not evaluated:
                        trainer.evaluate()
                    save_adapter(trainer, request.output)
                status = "interrupted" if early else "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        except (CELoraError, *UNUSABLE) as error:
            raise stopped(error, folder) from error
        finally:
            trained = status == "finished" or trainer.state.global_step > 0
            if first and trained:
                folder.forget_earlier()
            elif aside is not None:
                folder.restore()  # nothing was trained: the earlier run is worth more than what failed
            progress.close()
            if metrics is not None and (trained or (status == "interrupted" and aside is None)):
                errors = {
                    "errors": require(trainer.model).relative_errors,
                    "planned_errors": planned_errors(require(trainer.model).plan, attached.estimated),
                }
                record |= {
                    "status": status,
                    "summary": _summary(trainer, metrics, attached) | _worst(**errors),
                } | errors
                # What made the run fail may make this fail, too, and is what the user should hear of.
                with suppress(CELoraError) if status == "failed" else nullcontext():
                    write_json(request.output / RUN, record)
                    write_report(request.output / REPORT, {request.preset or "celora": request.output})
    if status == "interrupted":
        saved = folder.last_checkpoint()
        how = f"Saved {saved[0].name}; continue" if saved else "No checkpoint to go on from is saved; start again"
        _say(console, False, f"{how} with: celora train --output {shlex.quote(str(request.output))} --resume")
    return TrainResult(status, request.output, int(trainer.state.global_step), record["summary"], trainer.model)


def _already_finished(
    request: TrainRequest, earlier: dict[str, Any], folder: OutputFolder, console: Console
) -> TrainResult:
    """What a finished run came to; its report is written if the run was killed before that."""
    step, first = int(earlier["summary"]["step"]), is_first()
    _say(
        console,
        request.options.quiet,
        f"{request.output} is finished, at step {step}; a larger --max_steps, or more "
        "--num_train_epochs with --max_steps -1, continues it.",
    )
    if first and not folder.reported():
        write_report(request.output / REPORT, {request.preset or "celora": request.output})
        _say(console, request.options.quiet, f"{REPORT} was not written to its end; it is now.")
    return TrainResult("already finished", request.output, step, earlier["summary"] if first else {})


def build_trainer(
    request: TrainRequest,
    args: Any,
    model: Any,
    tokenizer: Any,
    rows: Any,
    eval_rows: Any = None,
    *,
    peft: LoraConfig | None,
) -> Any:
    """The SFTTrainer of this run, without celora and without progress. What it refuses is one line."""
    for name in OVERRIDDEN:
        borrow(name)  # says what is not done where the method is gone: nobody calls ours then
    with refused("trainer"):
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            peft_config=peft,
            answers=request.train.get("assistant_only_loss"),
        )
    trainer.remove_callback(PrinterCallback)
    for dataset, source in ((trainer.train_dataset, request.data), (trainer.eval_dataset, request.options.eval_data)):
        if dataset is not None and not _teaches(dataset):
            raise CELoraError(
                f"no row of {source or request.data!r} has a token to learn within max_length={args.max_length} "
                "(the first of a row predicts, and is not predicted); give longer rows or a larger --max_length"
            )
    return trainer


def _teaches(dataset: Any) -> bool:
    """Whether any row of a prepared data set has a label after its first token."""
    column = "labels" if "labels" in dataset.column_names else "input_ids"
    return any(label != -100 for labels in dataset[column] for label in labels[1:])


def rank_line(request: TrainRequest) -> str:
    """One line on the rank that trains, and why it is not the one asked for where it is not."""
    if request.r == request.lora_r:
        return f"LoRA r = {request.r}."
    return (
        f"LoRA r = frozen factor r0 = {request.r}: floor(7/8 of lora_r={request.lora_r}), so that both fit "
        f"LoRA's memory (scaling lora_alpha/r = {request.lora['lora_alpha'] / request.r:.3g})."
    )


def attached_text(attached: Any, plan: Plan | None) -> str:
    """What is estimated with what. Beside a plan, whose table says it by measured time, no second one by FLOPs."""
    if plan is None:
        return str(attached)
    reasons = Counter(attached.skipped.values())
    return "\n".join(
        [
            f"{len(attached.estimated)} of {len(attached.layers)} frozen layers estimated"
            + (f", refreshed every {attached.refresh_every} optimizer steps." if attached.estimated else "."),
            *(f"Left exact, {count} layers: {reason}." for reason, count in reasons.items()),
            *attached.notes,
        ]
    )


def _smooth_in_the_head(trainer: Any) -> None:
    """Trainer's label smoothing wants all logits; the head over labelled tokens smooths as it goes."""
    forward, args = require(trainer.model).forward, trainer.args
    plain = args.loss_type == "nll" and not args.torch_compile  # a graph takes in the model's own loss
    if forward is not None and trainer.label_smoother is not None and plain:
        forward.smoothing, trainer.label_smoother = float(trainer.args.label_smoothing_factor), None


def _say(console: Console, quiet: bool, line: str) -> None:
    if not quiet:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _longer(earlier: dict[str, Any], now: dict[str, Any], metrics: Path) -> bool:
    """Whether the run now asked for goes on where the finished one ended."""
    if (steps := now.get("max_steps", -1)) > 0:
        return bool(steps > earlier["summary"]["step"])
    if earlier["given"].get("max_steps", -1) > 0:
        before = next((row["epoch"] for row in reversed(read_metrics(metrics)) if "epoch" in row), 0.0)
    else:
        before = float(earlier["given"].get("num_train_epochs", 3))
    return float(now.get("num_train_epochs", 3)) > before


def _evaluated(metrics: Path, trainer: Any) -> bool:
    """Whether the last evaluation is that of the adapter which is saved."""
    step, best = trainer.state.global_step, trainer.state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best and Path(best).name != f"checkpoint-{step}":
        return False
    return any(row["step"] == step and "eval_loss" in row for row in read_metrics(metrics))


def _record(request: TrainRequest, args: Any, attached: Any) -> dict[str, Any]:
    return {
        "celora": celora.__version__,
        "status": "running",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "given": recorded(request.given),
        "preset": request.preset,
        "config": request.config.to_dict(),
        "r": request.r,
        "processes": processes(),
        "lora": request.lora,
        # Which hides every name that ends so, the words of the vocabulary among them.
        "train": args.to_dict() | {name: request.train.get(name) for name in ("eos_token", "pad_token")},
        "estimated_layers": len(attached.estimated),
        "layers": [asdict(layer) for layer in attached.layers],
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
        "machine": {"device": device_name(args.device), "type": args.device.type, "threads": torch.get_num_threads()},
    }


def _summary(trainer: Any, metrics: MetricsWriter, attached: Any) -> dict[str, Any]:
    """Numbers of the whole run, over all resumptions."""
    rows = read_metrics(metrics.path)
    steps = [row["step_time_ms"] for row in rows if "step_time_ms" in row]
    last: dict[str, Any] = {}
    for row in rows:
        last |= {key: row[key] for key in _LAST if key in row}
    return {
        "step": int(trainer.state.global_step),
        "seconds": round(metrics.elapsed(), 3),
        **last,
        "median_step_time_ms": statistics.median(steps) if steps else None,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "estimated_cost": attached.cost,
    }


def _worst(errors: dict[str, float], planned_errors: dict[str, float]) -> dict[str, Any]:
    """The largest relative error that a refresh has measured, of how many layers, and what the plan says of the rest.

    A layer's first refresh has nothing to compare with, so that in a short run few layers are measured.
    """
    rest = [error for name, error in planned_errors.items() if name not in errors]
    return {
        "layers_measured": len(errors),
        "worst_relative_error": max(errors.values(), default=None),
        "layers_not_measured": len(rest),
        "worst_planned_error": max(rest, default=None),
    }


def plan_model(request: TrainRequest, *, rows: int | None, adapter: Path | None, console: Console) -> Plan:
    """`celora.make_plan` for a new adapter, or for the one in `adapter`, on batches made as training makes them."""
    with prepared(request, rows, adapter) as (trainer, _), refused("plan"):
        return make_plan(request, trainer, console)


def audit_model(
    request: TrainRequest,
    *,
    rows: int | None,
    adapter: Path | None = None,
    reference: Literal["float32"] | None = None,
) -> Any:
    """`celora.audit` of a new adapter, or of the one in `adapter`, on a batch made exactly as training makes it."""
    with prepared(request, rows, adapter) as (trainer, config), refused("audit"):
        if request.preset == "auto" and config is request.config:
            config, _ = planned(request, trainer, Console(stderr=True, quiet=True))
        celora.attach(trainer.model, config)
        batch = next(iter(trainer.get_train_dataloader()))
        return celora.audit(trainer.model, batch, reference=reference)


@contextmanager
def prepared(request: TrainRequest, rows: int | None, adapter: Path | None) -> Iterator[tuple[Any, CELoraConfig]]:
    """The trainer of this request and what to attach to its model; nothing is written.

    `rows` are in a batch or, without, as many as training has.
    """
    with quiet_libraries(), tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_tokenizer(request)
        data = training_rows(request, tokenizer)
        train = request.train | _NO_EVALUATION | ({} if rows is None else {"per_device_train_batch_size": rows})
        args = sft_config(replace(request, train=train, output=Path(scratch)))
        request, _ = settle_dtype(request, args)
        model, peft, config = load_model(request), lora_config(request), request.config
        if adapter is not None:
            model, peft = load_adapter(model, adapter), None
            if (adapter / CONFIG).is_file() and request.options.preset is None and request.options.celora is None:
                config = CELoraConfig.load(adapter)  # the one the adapter was trained with
        yield build_trainer(request, args, model, tokenizer, data, peft=peft), config
