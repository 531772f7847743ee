"""Saves checkpoints safely: write one completely, seal it, and only then remove older ones."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub import HfApi
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerState

from celora.borrowed import borrow
from celora.errors import CELoraError, Diverged, first_line
from celora.files import clear, read_json, sync
from celora.runtime.state import STATE_NAME, load_state
from celora.train.output.card import Card
from celora.train.output.folder import CARD, REPORT, RUN, SAVING, OutputFolder, is_own
from celora.train.output.manifest import seal
from celora.train.processes import is_first, wait_for_all
from celora.train.progress import MetricsWriter

STATE = "trainer_state.json"
# Exceptions of a full or failing disk, and of a damaged file.
UNUSABLE = (OSError, SafetensorError, UnpicklingError)
# In what torch's and tokenizers' writers say then. Theirs are no OSErrors.
_WRITERS_SAY = ("inline_container", "PytorchStreamWriter", "iostream error", "(os error ")


class Sealing(TrainerCallback):  # type: ignore[misc]
    """Seals each checkpoint. Add it in every process, after every callback that writes into a checkpoint.

    Only the first process has `metrics`, and seals. It waits until the others have written their parts. `limit`: how
    many checkpoints stay, besides the best one.
    """

    def __init__(self, folder: OutputFolder, metrics: MetricsWriter | None, limit: int | None) -> None:
        self.folder = folder
        self.metrics = metrics
        self.limit = limit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Trainer takes both from a checkpoint: the steps of another command, and paths of another folder."""
        state.compute_steps(args, state.max_steps)
        if args.resume_from_checkpoint:
            find_best(state, Path(args.resume_from_checkpoint))

    def on_save(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        wait_for_all()
        if self.metrics is None:
            return
        if self.metrics.path.exists():
            sync(self.metrics.path)  # so that the metrics up to a checkpoint are as durable as it is
        checkpoint = self.folder.path / f"checkpoint-{state.global_step}"
        note = {"step": state.global_step, "seconds": self.metrics.elapsed(), "resumable": not args.save_only_model}
        seal(checkpoint, note)
        self.folder.keep_last(self.limit, {checkpoint.name, Path(state.best_model_checkpoint or "").name})


class SafeSaving:
    """A mixin for Trainer. It leaves the removal of old checkpoints to `Sealing`, and writes no training_args.bin."""

    args: Any
    state: Any
    card: Card | None = None

    def create_model_card(self, *arguments: Any, **more: Any) -> None:
        """Leave out TRL's card of the output folder, where no adapter is saved yet. `_save` writes celora's card."""
        if self.card is None:
            super().create_model_card(*arguments, **more)  # type: ignore[misc]

    def _save_checkpoint(self, *arguments: Any, **more: Any) -> None:
        check_finite(self)
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            clear(checkpoint)  # unfinished, or newer than the checkpoint that the run was resumed from
        wait_for_all()  # no process may write into the new folder before this
        with _writing():
            super()._save_checkpoint(*arguments, **more)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, *arguments: Any, **more: Any) -> None:
        folder = Path(output_dir or self.args.output_dir)
        card = folder / CARD
        kept = card.read_bytes() if is_own(card) else None
        with _writing():
            super()._save(output_dir, *arguments, **more)  # type: ignore[misc]
        # training_args.bin is a pickle, and run.json says the same.
        (folder / "training_args.bin").unlink(missing_ok=True)
        if kept is not None:
            card.write_bytes(kept)  # PEFT has just written a path of this machine into it
        elif self.card is not None:
            self.card.write(folder, self)


def find_best(state: TrainerState, checkpoint: Path) -> None:
    """Find the best checkpoint beside this one. The folder may have been moved since its state was saved."""
    saved = read_json(checkpoint / STATE).get("best_model_checkpoint")
    best = checkpoint.with_name(Path(saved).name) if saved else None
    if best is not None and not best.is_dir():
        warnings.warn(
            f"{best}, the best checkpoint so far, is not there; only a better one can be loaded.", stacklevel=2
        )
        best = None
    state.best_model_checkpoint = None if best is None else str(best)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Raise as OSError what other libraries say of a full disk."""
    try:
        yield
    except Exception as error:  # tokenizers raises Exception itself
        if isinstance(error, UNUSABLE) or not any(words in str(error) for words in _WRITERS_SAY):
            raise
        raise OSError(first_line(error)) from error


def check_finite(trainer: Any) -> None:
    """Refuse to save an adapter that has diverged.

    Raises:
        Diverged: a trainable parameter holds NaN or infinity.
    """
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not bool(parameter.detach().isfinite().all()):
            raise Diverged(
                f"at step {trainer.state.global_step} {name} holds NaN or infinity, so nothing is saved; lower "
                "--learning_rate, and look at the loss and the gradient norm in metrics.jsonl"
            )


def save_adapter(trainer: Any, output: Path) -> None:
    """Write the adapter and the tokenizer into `output`, each file whole or not at all."""
    check_finite(trainer)
    aside, first = output / SAVING, trainer.is_world_process_zero()
    if first:
        clear(aside)  # left by a process that was killed here
        aside.mkdir()
    trainer.save_model(str(aside), _internal_call=True)  # in all processes: each may have a part of the model
    if first:
        for file in sorted(aside.iterdir()):
            sync(file)
            if file.name == CARD and is_own(output / CARD):
                file.unlink()
                continue
            if file.is_dir():  # of a tokenizer with several chat templates; a folder replaces no other
                clear(output / file.name)
            file.replace(output / file.name)
        aside.rmdir()
        sync(output)


def upload(trainer: Any, folder: OutputFolder) -> None:
    """Upload the saved adapter to the hub, if `push_to_hub` asks for it.

    The record and the report of the run stay here: they have paths of this machine, and its name.
    """
    if trainer.args.push_to_hub and is_first():
        HfApi().upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=folder.path,
            commit_message="Model save",
            token=trainer.args.hub_token,
            revision=trainer.args.hub_revision,
            ignore_patterns=["_*", ".*", "checkpoint-*", RUN, REPORT],
        )


def take_over(trainer: Any, checkpoint: Path) -> None:
    """Load the checkpoint of the last step, and celora's state. The run was stopped between that step and its end.

    Raises:
        CELoraError: this version of transformers has no method for it.
    """
    load, best = (borrow(f"transformers:Trainer.{name}") for name in ("_load_from_checkpoint", "_load_best_model"))
    trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
    find_best(trainer.state, checkpoint)
    wanted = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint
    if load is None or (wanted and best is None):
        raise CELoraError(
            f"{checkpoint.name} is the run's last step, and this version of transformers cannot load it without "
            "another; give a larger --max_steps"
        )
    load(trainer, str(checkpoint))
    if (checkpoint / STATE_NAME).is_file():  # what refreshes measured and moved, for the run's record
        load_state(trainer.model, checkpoint)
    if wanted:
        trainer._load_best_model()


def stopped(error: BaseException, folder: OutputFolder) -> CELoraError:
    """The error that stopped a run, in one line with the checkpoint to resume from."""
    reason = str(error).strip() or type(error).__name__
    if isinstance(error, UnpicklingError):
        reason = "a checkpoint's file holds objects other than tensors, which are never unpickled"
    whole = folder.last_checkpoint()
    then = (
        f"{whole[0].name} is whole: mend that, then --resume goes on"
        if whole
        else "no checkpoint to go on from is saved"
    )
    kind = Diverged if isinstance(error, Diverged) else CELoraError
    return kind(f"the run stopped: {reason.rstrip('.')}. {then[0].upper()}{then[1:]}.")
