"""An optional callback for Trainer and its subclasses. It logs celora's numbers, and saves its state in checkpoints."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from celora.borrowed import borrow
from celora.errors import CELoraError
from celora.machine.processes import any_of_them
from celora.runtime.attachment import Attachment, find
from celora.runtime.original_base import base_losses
from celora.runtime.state import STATE_NAME, load_state, own_name, save_state, saved_config, times_differ


class Callback(TrainerCallback):  # type: ignore[misc]
    """Log `celora/*` metrics, save celora's state with each checkpoint, and restore it when training resumes.

    Metrics:

    - `celora/refreshes`: number of refreshes so far.
    - `celora/relative_error`: the mean over estimated layers and the head, at their latest refresh, of what was
      selected before it.
    - `celora/relative_error_worst`: the largest of these errors.
    - `celora/layers_made_exact`: how many of them became exact because their error was too large; absent if 0.

    - `celora/forward_error`: the mean over forwards in 8 bits, those of layers and the head's, at their latest refresh.
    - `celora/forward_error_worst`: the largest of these errors.
    - `celora/forwards_made_exact`: number of forwards that became exact because their error was too large; absent if 0.

    If the model trains in 8 bits, each evaluation evaluates its rows once more. That gives `eval_base_loss`, the
    loss of the adapter on the original base, beside `eval_loss`, the loss on the base that trained.

    The metrics reach the trainer's `log_history` and every reporter in `report_to`. For this, the callback moves to the
    front of the trainer's callbacks when training begins. Reporters would otherwise read the logs first.

    `Trainer(model_init=...)` makes a new model when training begins. If nobody has attached celora to it by the first
    step, a warning says so.
    """

    def __init__(self) -> None:
        self._before = (0, 0)
        self._restored = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        trainer = self._caller()[0]
        if trainer is not None:
            handler = trainer.callback_handler  # its list is being iterated over, so it gets a new list
            handler.callbacks = [self, *(other for other in handler.callbacks if other is not self)]
        attachment = find(model)
        if attachment is not None and attachment.forwards and getattr(args, "precompute_ref_log_probs", False):
            raise CELoraError(
                "precompute_ref_log_probs=True computes the reference before training, with other products than a "
                "forward in 8 bits; make the trainer with precompute_ref_log_probs=False, or attach a preset with an "
                "exact forward: 'auto'."
            )
        self._restored = self._restore(args, state, model)

    def _restore(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> bool:
        """Load celora's state if training resumes. Returns whether celora is attached."""
        attachment = find(model)
        if attachment is None:
            return False
        if state.global_step == 0:
            return True
        folders = self._checkpoints(args, state)
        found = next((folder for folder in folders if (folder / STATE_NAME).is_file()), None)
        reason = ""
        if found is None:
            reason = f"no {STATE_NAME} in {folders[0]}"
        elif attachment.timed and times_differ(saved_config(found), attachment.config):
            reason = f"{found / STATE_NAME} was made with other estimates, which were faster then"
        if not any_of_them(bool(reason), args.device):  # all refresh, or none: in a refresh they wait for each other
            assert found is not None
            load_state(model, found)
            return True
        reason = reason or "another process found no state that fits"
        if attachment.report.estimated or attachment.forwards or not attachment.report.exact_head:
            warnings.warn(f"celora: {reason}; the first resumed step refreshes instead.", stacklevel=2)
        attachment.clock.step = state.global_step
        attachment.set_modes(state.global_step, together=True)
        return True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        if not self._restored and not self._restore(args, state, model):  # a callback behind this one may have attached
            self._warn_of_a_new_model(model)
        self._restored = True
        attachment = find(model)
        if attachment is not None:
            self._before = (attachment.clock.step, attachment.other_steps)

    def _warn_of_a_new_model(self, model: nn.Module) -> None:
        adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
        if adapted and getattr(self._caller()[0], "model_init", None) is not None:
            warnings.warn(
                "celora: model_init made a new model when training began, and celora is not attached to it, so it "
                "trains as without celora. Instead of celora.Callback(), give the Trainer "
                'AttachWhileTraining("exact"), or another preset (from celora.integrations.while_training import '
                "AttachWhileTraining).",
                stacklevel=2,
            )

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        attachment = find(model)
        if attachment is None:
            return
        # DeepSpeed's optimizer steps copies of the parameters. The clock cannot tell that they are this model's.
        step, other_steps = self._before
        if attachment.clock.step == step and attachment.other_steps > other_steps:
            attachment.clock.advance()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        folder = self._checkpoint(args, state)
        attachment = find(model)
        if attachment is None or not folder.is_dir():
            return
        if state.is_world_process_zero or own_name(attachment) != STATE_NAME:
            save_state(model, folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        logs: dict[str, Any],
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        trainer = None if eval_dataloader is None else self._caller()[0]
        # Here, and not in `on_evaluate`, so that reporters get both losses together.
        metrics = {} if trainer is None else base_losses(trainer, eval_dataloader, logs)
        attachment = find(model)
        if attachment is not None and "loss" in logs:
            metrics |= self._metrics(attachment)
        logs.update(metrics)
        # The Trainer copied the logs into its history before it called us.
        if state.log_history:
            state.log_history[-1].update(metrics)

    def _metrics(self, attachment: Attachment) -> dict[str, float]:
        metrics: dict[str, float] = {"celora/refreshes": attachment.refreshes}
        forwards = attachment.forwards
        for what, how_many, errors, made_exact in (
            ("relative_error", "layers_made_exact", attachment.relative_errors, attachment.made_exact),
            ("forward_error", "forwards_made_exact", forwards.errors, forwards.made_exact),
        ):
            if made_exact:
                metrics[f"celora/{how_many}"] = len(made_exact)
            if kept := [error for name, error in errors.items() if name not in made_exact]:
                metrics[f"celora/{what}"] = sum(kept) / len(kept)
                metrics[f"celora/{what}_worst"] = max(kept)
        return metrics

    def _checkpoints(self, args: TrainingArguments, state: TrainerState) -> list[Path]:
        """Where the state of a resumed training may be."""
        named = [Path(name) for name in (self._caller()[1], args.resume_from_checkpoint) if isinstance(name, str)]
        return [*named, self._checkpoint(args, state)]

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The folder of this step's checkpoint. Each trial of a hyperparameter search has a folder of its own."""
        trainer, folder = self._caller()[0], args.output_dir
        if (trial := getattr(trainer, "_trial", None)) is not None:
            known = borrow("transformers:Trainer._get_output_dir") is not None
            folder = trainer._get_output_dir(trial=trial) if known else os.devnull
        return Path(folder) / f"checkpoint-{state.global_step}"

    def _caller(self) -> tuple[Any, str | None]:
        """The trainer that is calling, and the checkpoint that it resumes from.

        A trainer gives its callbacks neither itself nor the path that it resumes from. So both are looked up in the
        frames of the trainer's own methods.
        """
        trainer = None
        frame = sys._getframe(1)
        while frame.f_back is not None:
            frame = frame.f_back
            caller = frame.f_locals.get("self")
            if self in getattr(getattr(caller, "callback_handler", None), "callbacks", ()):
                trainer = caller
                if isinstance(checkpoint := frame.f_locals.get("resume_from_checkpoint"), str):
                    return trainer, checkpoint
        return trainer, None
