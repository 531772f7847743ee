"""What two processes do in tests/whole/test_processes.py, started by torchrun: `train_worker.py FOLDER`.

Runs of `celora train`; in the last, the second process is killed in its fifth step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from celora.cli.main import main
from celora.runtime.attachment import require
from celora.train import run

USUAL = ["--max_steps", "6", "--save_steps", "3", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2"]
COLUMNS = '{"estimator": "columns", "keep_ratio": 0.4, "rank": 4, "refresh_every": 2, "synchronise": true}'


class Signalled(TrainerCallback):  # type: ignore[misc]
    """Only the second process gets a signal, at the beginning of a step."""

    def __init__(self, number: signal.Signals, step: int) -> None:
        self.number, self.step = number, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if os.environ["RANK"] == "1" and state.global_step == self.step:
            for _ in range(2):  # once from the terminal, and once from the launcher
                os.kill(os.getpid(), self.number)


class Noted(TrainerCallback):  # type: ignore[misc]
    """Writes to `path.RANK.json` what this process has attached, and how many labels each of its batches had."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_suffix(f".{os.environ['RANK']}.json")
        self.labels: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.labels.append(int((kwargs["labels"][:, 1:] != -100).sum()))

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        attached = require(model)
        noted = {"labels": self.labels, "report": str(attached.report), "config": attached.config.to_dict()}
        self.path.write_text(json.dumps(noted), encoding="utf-8")


def train(folder: Path, name: str, *more: str, data: str = "rows.jsonl", callback: Any = None) -> int:
    own = ["--model", f"{folder}/model", "--data", f"{folder}/{data}", "--output", f"{folder}/{name}"]
    build = run.build_trainer

    def built(*args: Any, **kw: Any) -> Any:
        trainer = build(*args, **kw)
        trainer.add_callback(callback)
        return trainer

    if callback is not None:
        run.build_trainer = built
    try:
        return main(["train", *own, *USUAL, *more])
    finally:
        run.build_trainer = build


def work(folder: Path) -> None:
    with_columns = ["--celora", COLUMNS]
    assert train(folder, "whole", *with_columns, "--eval-data", f"{folder}/rows.jsonl") == 0
    assert train(folder, "exact", "--preset", "exact", callback=Noted(folder / "exact")) == 0
    short = ["--preset", "auto", "--max_steps", "2", "--save_strategy", "no"]
    assert train(folder, "auto", *short, callback=Noted(folder / "auto")) == 0
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"  # each attempt of a job may report its failure once
    assert train(folder, "bad", data="nowhere.jsonl") == 2
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
    assert train(folder, "stopped", *with_columns, callback=Signalled(signal.SIGINT, 1)) == 130
    train(folder, "killed", *with_columns, callback=Signalled(signal.SIGKILL, 4))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
