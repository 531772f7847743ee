"""celora in other people's Trainer: one added line, numbers in the logs, state in the checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

import celora
from celora import CELoraConfig
from celora.attach import require
from celora.state import STATE_NAME
from conftest import adapter, make_batch, make_model

CONFIG = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=3)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in make_batch(i).items()}


class Reporter(TrainerCallback):
    """Stands for TensorBoard and its kin: sees the logs when it is called."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        self.seen.append(dict(logs))


def _trainer(folder: Path, model: PeftModel, *, callbacks: list[Any], **arguments: Any) -> Trainer:
    settings = {"max_steps": 8, "save_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2, **arguments}
    args = TrainingArguments(
        output_dir=str(folder),
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=1,
        **settings,
    )
    return Trainer(model=model, args=args, train_dataset=Rows(), callbacks=callbacks)


def test_metrics_reach_the_history_and_the_reporters_behind_it(tmp_path: Path) -> None:
    model, reporter = make_model(), Reporter()
    celora.attach(model, CONFIG)
    trainer = _trainer(tmp_path, model, callbacks=[celora.Callback(), reporter], save_strategy="no")
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["celora/refreshes"] for row in history] == [1, 1, 1, 2, 2, 2, 3, 3]
    # The first refresh has no selection to measure; the second measures the first's.
    assert "celora/relative_error" not in history[2]
    for row in history[3:]:
        assert 0 < row["celora/relative_error"] <= row["celora/relative_error_worst"] < 1.5
    seen = [logs for logs in reporter.seen if "loss" in logs]
    assert [logs["celora/refreshes"] for logs in seen] == [row["celora/refreshes"] for row in history]


def test_resuming_reproduces_the_uninterrupted_run(tmp_path: Path) -> None:
    whole = make_model()
    celora.attach(whole, CONFIG)
    _trainer(tmp_path / "whole", whole, callbacks=[celora.Callback()]).train()

    parts = make_model()
    celora.attach(parts, CONFIG)
    _trainer(tmp_path / "parts", parts, callbacks=[celora.Callback()]).train()
    checkpoint = tmp_path / "parts" / "checkpoint-4"
    assert (checkpoint / STATE_NAME).is_file()

    resumed = make_model(seed=0)
    celora.attach(resumed, CONFIG)
    trainer = _trainer(tmp_path / "parts", resumed, callbacks=[celora.Callback()])
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert require(resumed).clock.step == 8
    for name, value in adapter(whole).items():
        assert value.equal(adapter(resumed)[name])


def test_a_checkpoint_without_state_is_said_and_refreshes(tmp_path: Path) -> None:
    model = make_model()
    _trainer(tmp_path, model, callbacks=[]).train()
    celora.attach(model, CONFIG)
    trainer = _trainer(tmp_path, model, callbacks=[celora.Callback()], max_steps=9)
    with pytest.warns(UserWarning, match=rf"no {STATE_NAME} in .*; the first resumed step refreshes instead"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert require(model).clock.step == 9
    assert any(graft.estimator.ready for graft in require(model).grafts.values())


def test_without_celora_it_does_nothing(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, make_model(), callbacks=[celora.Callback()], max_steps=2, save_steps=2)
    trainer.train()
    assert not any("celora" in key for row in trainer.state.log_history for key in row)
    assert not (tmp_path / "checkpoint-2" / STATE_NAME).exists()


def test_an_engine_that_steps_copies_of_the_parameters_is_counted(model):
    """As DeepSpeed: its optimizer holds flat copies, so the clock alone would never move."""
    celora.attach(model, celora.CELoraConfig(estimator="columns", refresh_every=2, rank=0))
    model.train()
    callback = celora.Callback()
    copies = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(copies, lr=0.1)
    counted = []
    for step in range(4):
        callback.on_step_begin(None, None, None, model=model)
        model(**make_batch(step)).loss.backward()
        if step != 2:  # an overflow: the engine skips its step
            for copy in copies:
                copy.grad = torch.ones_like(copy)
            optimizer.step()
        callback.on_step_end(None, None, None, model=model)
        counted.append(require(model).clock.step)
    assert counted == [1, 2, 2, 3]
