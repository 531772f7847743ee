"""An optional callback for Trainer and its kin: celora's numbers in the logs, its state in the checkpoints."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from celora.runtime.attachment import find
from celora.runtime.state import STATE_NAME, load_state, own_name, save_state


class Callback(TrainerCallback):  # type: ignore[misc]
    """Log `celora/*` metrics, save celora's state with each checkpoint, restore it when training resumes.

    Metrics: `celora/refreshes` (so far), and, measured at the latest refresh with the selection that had been in use
    until then, `celora/relative_error` (mean over estimated layers) and `celora/relative_error_worst`; and, once there
    are any, `celora/layers_made_exact`, whose estimate had a relative error of 1 or more twice in a row. They reach the
    trainer's `log_history` and every reporter that `report_to` names: when training begins, the callback moves to the
    front of the trainer's callbacks, since reporters read the logs in their turn and stand before whatever a user adds.
    """

    def __init__(self) -> None:
        self._before = (0, 0)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        trainer, checkpoint = self._caller()
        if trainer is not None:
            handler = trainer.callback_handler  # whose list is being walked through just now, so it gets a new one
            handler.callbacks = [self, *(other for other in handler.callbacks if other is not self)]
        attachment = None if model is None else find(model)
        if model is None or attachment is None or state.global_step == 0:
            return
        folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
        folders[:0] = [Path(name) for name in (checkpoint, args.resume_from_checkpoint) if isinstance(name, str)]
        for folder in folders:
            if (folder / STATE_NAME).is_file():
                load_state(model, folder)
                return
        warnings.warn(
            f"celora: no {STATE_NAME} in {folders[0]}; the first resumed step refreshes instead.", stacklevel=2
        )
        attachment.clock.step = state.global_step
        attachment.set_modes(state.global_step)

    def on_step_begin(self, *_: Any, model: nn.Module | None = None, **__: Any) -> None:
        attachment = None if model is None else find(model)
        if attachment is not None:
            self._before = (attachment.clock.step, attachment.other_steps)

    def on_step_end(self, *_: Any, model: nn.Module | None = None, **__: Any) -> None:
        attachment = None if model is None else find(model)
        if attachment is None:
            return
        # DeepSpeed's optimizer steps copies of the parameters, which the clock cannot know for this model's.
        step, other_steps = self._before
        if attachment.clock.step == step and attachment.other_steps > other_steps:
            attachment.clock.advance()

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        attachment = None if model is None else find(model)
        if model is None or attachment is None or not folder.is_dir():
            return
        if state.is_world_process_zero or own_name(attachment) != STATE_NAME:
            save_state(model, folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        attachment = None if model is None else find(model)
        if attachment is None or logs is None or "loss" not in logs:
            return
        metrics: dict[str, float] = {"celora/refreshes": attachment.refreshes}
        made_exact = attachment.made_exact
        if made_exact:
            metrics["celora/layers_made_exact"] = len(made_exact)
        errors = [error for name, error in attachment.relative_errors.items() if name not in made_exact]
        if errors:
            metrics["celora/relative_error"] = sum(errors) / len(errors)
            metrics["celora/relative_error_worst"] = max(errors)
        logs.update(metrics)
        # The Trainer copied the logs into its history before it called us.
        if state.log_history:
            state.log_history[-1].update(metrics)

    def _caller(self) -> tuple[Any, str | None]:
        """The trainer that is calling, and the checkpoint it resumes from.

        A trainer hands its callbacks everything but itself and the path it was asked to resume from, so both are looked
        up where they are: in the frames of its own methods.
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
