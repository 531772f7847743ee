"""Whole runs of the tiny model, for tests of what they leave behind and how they resume."""

from __future__ import annotations

import io
import signal

from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from celora.train import trainer as trainer_module
from celora.train.request.arguments import make_request
from celora.train.run import train
from patching import patch_all

# A refresh in the middle, dropout and a last partial batch: a resumed run has to get all of them right.
CELORA = {"estimator": "columns", "keep_ratio": 0.4, "rank": 4, "refresh_every": 2}


SHORT = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "celora": CELORA, "lora_dropout": 0.1}


def go(inputs, output, **more):
    console = Console(file=io.StringIO(), width=200)
    result = train(make_request({**inputs, "output": str(output), **SHORT, **more}), console=console)
    return result, console.file.getvalue()


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def on_build(patch, do):
    """Run `do(trainer)` on the trainer that a run builds."""
    build = trainer_module.build_trainer

    def built(*args, **kw):
        trainer = build(*args, **kw)
        do(trainer)
        return trainer

    patch_all(patch, "celora.train.trainer:build_trainer", built)


class PressCtrlC(TrainerCallback):
    def __init__(self, after=2, sends=signal.SIGINT):
        self.after, self.sends = after, sends

    def on_step_begin(self, args, state, control, **kw):
        if state.global_step == self.after:
            signal.raise_signal(self.sends)
