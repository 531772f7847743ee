"""What two processes do in tests/test_processes.py, started by torchrun: `train_worker.py FOLDER`.

Three runs of `celora train`; in the last, the second process is killed in its fifth step.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from celora.cli import main
from celora.train import run

USUAL = ["--max_steps", "6", "--save_steps", "3", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2"]
COLUMNS = '{"estimator": "columns", "keep_ratio": 0.4, "rank": 4, "refresh_every": 2, "synchronise": true}'


class Killed(TrainerCallback):  # type: ignore[misc]
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if os.environ["RANK"] == "1" and state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, name: str, *more: str) -> None:
    own = ["--model", f"{folder}/model", "--data", f"{folder}/rows.jsonl", "--output", f"{folder}/{name}"]
    assert main(["train", *own, *USUAL, *more]) == 0


def work(folder: Path) -> None:
    train(folder, "whole", "--celora", COLUMNS, "--eval-data", f"{folder}/rows.jsonl")
    train(folder, "auto", "--preset", "auto", "--max_steps", "2", "--save_strategy", "no")
    build = run.build_trainer

    def built(*args: Any, **kw: Any) -> Any:
        trainer = build(*args, **kw)
        trainer.add_callback(Killed())
        return trainer

    run.build_trainer = built
    train(folder, "killed", "--celora", COLUMNS)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
