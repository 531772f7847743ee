"""celora in other people's Trainer: one added line, numbers in the logs, state in the checkpoints."""

from __future__ import annotations

import functools
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, integration_utils

import celora
from celora import CELoraConfig, CELoraError
from celora.runtime.attachment import require
from celora.runtime.state import STATE_NAME
from machine import refuses
from small import adapter, make_base, make_batch, make_model

CONFIG = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=3)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in make_batch(i).items()}


class Reporter(TrainerCallback):
    """Stands for TensorBoard and similar reporters: it sees the logs when it is called."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        self.seen.append(dict(logs))


def _trainer(
    folder: Path, model: PeftModel | None, *, callbacks: list[Any], model_init: Any = None, **arguments: Any
) -> Trainer:
    settings = {"max_steps": 8, "save_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2}
    settings |= {"report_to": "none", **arguments}
    args = TrainingArguments(
        output_dir=str(folder),
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=1,
        **settings,
    )
    rows = Rows()
    evaluated = rows if args.eval_strategy != "no" else None
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=evaluated, model_init=model_init)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def test_metrics_reach_the_history_and_the_reporters_behind_it(tmp_path: Path) -> None:
    model, reporter = make_model(), Reporter()
    celora.attach(model, CONFIG)
    trainer = _trainer(tmp_path, model, callbacks=[celora.Callback(), reporter], save_strategy="no")
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["celora/refreshes"] for row in history] == [1, 1, 1, 2, 2, 2, 3, 3]
    # The first refresh has no selection to measure. The second measures the first one's.
    assert "celora/relative_error" not in history[2]
    for row in history[3:]:
        assert 0 < row["celora/relative_error"] <= row["celora/relative_error_worst"] < 1.5
    seen = [logs for logs in reporter.seen if "loss" in logs]
    assert [logs["celora/refreshes"] for logs in seen] == [row["celora/refreshes"] for row in history]


@pytest.mark.parametrize("forward", ["int8", "exact"])
def test_a_reference_from_before_training_and_a_forward_in_8_bits_do_not_go_together(forward: str) -> None:
    """TRL's DPO and KTO compute it when the trainer is made, without celora or before layers know their scales."""
    model, arguments = make_model(), SimpleNamespace(precompute_ref_log_probs=True)
    if forward == "int8" and refuses():
        return
    celora.attach(model, CELoraConfig(estimator="dense" if forward == "exact" else "int8", forward=forward))
    begin = functools.partial(celora.Callback().on_train_begin, arguments, TrainerState(), None, model=model)
    if forward == "exact":
        begin()
        return
    with pytest.raises(CELoraError, match="make the trainer with precompute_ref_log_probs=False, or attach a preset"):
        begin()


@pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")
def test_the_errors_of_forwards_in_8_bits_are_logged(tmp_path: Path) -> None:
    model = make_model()
    celora.attach(model, CELoraConfig(estimator="int8", forward="int8", refresh_every=3))
    trainer = _trainer(tmp_path, model, callbacks=[celora.Callback()], save_strategy="no", max_steps=4)
    trainer.train()
    forwards, history = require(model).forwards, trainer.state.log_history
    errors = list(forwards.errors.values())
    assert history[3]["celora/forward_error"] == pytest.approx(sum(errors) / 14)
    assert 0 < history[3]["celora/forward_error"] < history[3]["celora/forward_error_worst"] == max(errors)
    assert "celora/forwards_made_exact" not in history[3]
    worst = max(forwards.errors, key=lambda name: forwards.errors[name])
    forwards[worst].give_up()
    trainer.log({"loss": 1.0})
    assert trainer.state.log_history[-1]["celora/forwards_made_exact"] == 1
    assert trainer.state.log_history[-1]["celora/forward_error_worst"] == sorted(errors)[-2]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_whatever_report_to_names_gets_the_metrics(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer puts reporters before a user's callbacks. Here a class of ours replaces the service's own reporter."""
    seen: list[dict[str, Any]] = []

    class Service(Reporter):
        def __init__(self) -> None:
            self.seen = seen

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, Service)
    model = make_model()
    celora.attach(model, CONFIG)
    callback = celora.Callback()
    trainer = _trainer(tmp_path, model, callbacks=[callback], max_steps=5, save_strategy="no", report_to=name)
    trainer.train()
    rows = [logs for logs in seen if "loss" in logs]
    assert [logs["celora/refreshes"] for logs in rows] == [1, 1, 1, 2, 2]
    assert rows[-1]["celora/relative_error"] == trainer.state.log_history[4]["celora/relative_error"]
    order = trainer.callback_handler.callbacks
    assert [one for one in order if one is callback] == order[:1]
    trainer.train()  # train again: the callback is still there once, and still first
    assert trainer.callback_handler.callbacks == order


def test_a_trial_of_a_search_saves_into_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hyperparameter_search` trains each trial in a folder of its own. Other runs' checkpoints stay as they were."""
    model = make_model()
    celora.attach(model, CONFIG)
    trainer = _trainer(tmp_path, model, callbacks=[celora.Callback()])
    trainer.train()
    before = (tmp_path / "checkpoint-4" / STATE_NAME).read_bytes()
    # As if a search had begun a trial, without the package that would draw its settings.
    monkeypatch.setattr(trainer, "_hp_search_setup", lambda _: setattr(trainer, "_trial", "the seventh"))
    monkeypatch.setattr(trainer, "_get_output_dir", lambda trial: str(tmp_path / "run-7"))
    trainer.train()
    assert (tmp_path / "checkpoint-4" / STATE_NAME).read_bytes() == before
    assert (tmp_path / "run-7" / "checkpoint-4" / STATE_NAME).exists()


@pytest.mark.parametrize("lora", [True, False])
def test_a_new_model_of_model_init_without_celora_is_said(
    lora: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    trainer = _trainer(
        tmp_path, None, callbacks=[celora.Callback()], model_init=lambda: make_model() if lora else make_base()
    )
    if lora:
        celora.attach(trainer.model, CONFIG)  # the model that training replaces
    trainer.train()
    said = [text for warning in recwarn if "celora" in (text := str(warning.message))]  # old versions warn of others
    assert len(said) == lora
    assert all("model_init made a new model when training began, and celora is not attached" in line for line in said)


class Attaches(TrainerCallback):
    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        celora.attach(model, CONFIG)


def test_a_callback_behind_may_attach_the_new_model(tmp_path: Path) -> None:
    """Also when training resumes: celora's state is restored before the first step."""
    whole, resumed = (
        _trainer(tmp_path, None, callbacks=[celora.Callback(), Attaches()], model_init=lambda: make_model())
        for _ in range(2)
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert require(resumed.model).clock.step == 8
    for name, value in adapter(whole.model).items():
        assert value.equal(adapter(resumed.model)[name])


def test_tensorboard_shows_the_metrics(tmp_path: Path) -> None:
    model = make_model()
    celora.attach(model, CONFIG)
    writer = TensorBoardCallback(SummaryWriter(str(tmp_path / "board")))
    trainer = _trainer(tmp_path, model, callbacks=[celora.Callback(), writer], max_steps=5, save_strategy="no")
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    points = {(point.step, point.value) for point in board.Scalars("train/celora/refreshes")}
    assert points == {(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)}
    (error,) = {point.value for point in board.Scalars("train/celora/relative_error")}
    assert error == pytest.approx(trainer.state.log_history[4]["celora/relative_error"])


def _full(folder: Path, model: PeftModel, *more: Any, **arguments: Any) -> Trainer:
    """A Trainer with everything beside training: evaluation, the best model, accumulation, checkpointing."""
    settings: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True,
        "gradient_accumulation_steps": 2, "metric_for_best_model": "eval_loss",
    }  # fmt: skip
    return _trainer(folder, model, callbacks=[celora.Callback(), *more], **settings | arguments)


# transformers 5.24 renames them; celora supports versions that have only the old names.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [None, "reentrant", "non-reentrant"])
def test_the_whole_trainer_resumes_exactly(kind: str | None, tmp_path: Path) -> None:
    if kind is None:
        more = {}
    else:
        kwargs = {"use_reentrant": kind == "reentrant"}
        more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}

    def make() -> PeftModel:
        model = make_model(lora_dropout=0.1)
        model.enable_input_require_grads()
        celora.attach(model, CONFIG)
        return model

    whole = make()
    trainer = _full(tmp_path / "whole", whole, **more)
    trainer.train()
    assert require(whole).refreshes == 3
    best = Path(trainer.state.best_model_checkpoint)
    for name, value in load_file(best / "adapter_model.safetensors").items():
        assert value.equal(get_peft_model_state_dict(whole)[name])

    # Resume from a copy of the checkpoint in another folder: it holds everything that is needed.
    moved = tmp_path / "moved" / "checkpoint"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", moved)
    resumed = make()
    again = _full(tmp_path / "resumed", resumed, **more)
    again.train(resume_from_checkpoint=str(moved))
    assert require(resumed).clock.step == 8
    for name, value in load_file(tmp_path / "whole" / "checkpoint-8" / "adapter_model.safetensors").items():
        assert value.equal(load_file(tmp_path / "resumed" / "checkpoint-8" / "adapter_model.safetensors")[name])
    losses = [[row["eval_loss"] for row in t.state.log_history if "eval_loss" in row] for t in (trainer, again)]
    assert losses[0] == losses[1]


def test_early_stopping_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    model = make_model()
    celora.attach(model, CONFIG)
    patience = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    trainer = _full(tmp_path, model, patience)
    trainer.train()
    assert trainer.state.global_step == require(model).clock.step == 4
    assert (tmp_path / "checkpoint-4" / STATE_NAME).is_file()


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
    found = adapter(resumed)
    for name, value in adapter(whole).items():
        assert value.equal(found[name])


def test_a_checkpoint_without_state_is_said_and_refreshes(tmp_path: Path) -> None:
    model = make_model()
    _trainer(tmp_path, model, callbacks=[]).train()
    celora.attach(model, CONFIG)
    trainer = _trainer(tmp_path, model, callbacks=[celora.Callback()], max_steps=9)
    with pytest.warns(UserWarning, match=rf"no {STATE_NAME} in .*; the first resumed step refreshes instead"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert require(model).clock.step == 9
    assert any(graft.estimator.ready for graft in require(model).grafts.values())


def test_exact_needs_no_state(tmp_path: Path) -> None:
    """It has nothing to refresh."""
    model = make_model()
    _trainer(tmp_path, model, callbacks=[]).train()
    celora.attach(model, "exact")
    trainer = _trainer(tmp_path, model, callbacks=[celora.Callback()], max_steps=6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # warnings are errors
    assert require(model).clock.step == 6


def test_without_state_all_layers_refresh_at_the_resumed_step(tmp_path: Path) -> None:
    """Also layers that take turns and need no first observation."""
    model = make_model()
    _trainer(tmp_path, model, callbacks=[], max_steps=12).train()
    celora.attach(model, CELoraConfig(estimator="tokens", keep_ratio=0.5, rank=0, spread=True))
    trainer = _trainer(tmp_path, model, callbacks=[celora.Callback()], max_steps=13)
    with pytest.warns(UserWarning, match="the first resumed step refreshes instead"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    graft_of = require(model).grafts
    assert {name for name, graft in graft_of.items() if graft.observed} == {n for n, g in graft_of.items() if g.needed}
    assert len(require(model).relative_errors) > 7


def test_another_machines_times_refresh_instead_of_a_refusal(tmp_path: Path) -> None:
    """Preset `fast` estimates other layers where other products are faster."""
    model = make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a CPU without 8-bit products
        celora.attach(model, "fast")
    _trainer(tmp_path, model, callbacks=[celora.Callback()]).train()
    attachment = require(model)
    config, (name, *_) = attachment.config, attachment.grafts or ["other"]
    attachment.config = replace(config, overrides={**config.overrides, f"={name}": {"keep_ratio": 0.5}})
    trainer = _trainer(tmp_path, model, callbacks=[celora.Callback()], max_steps=9)
    with pytest.warns(
        UserWarning, match="was made with other estimates, which were faster then; the first resumed step refreshes"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert attachment.clock.step == 9
    attachment.config = replace(attachment.config, seed=7)
    with pytest.raises(CELoraError, match="made with another configuration"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_without_celora_it_does_nothing(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, make_model(), callbacks=[celora.Callback()], max_steps=2, save_steps=2)
    trainer.train()
    assert not any("celora" in key for row in trainer.state.log_history for key in row)
    assert not (tmp_path / "checkpoint-2" / STATE_NAME).exists()


def test_an_engine_that_steps_copies_of_the_parameters_is_counted(model):
    """DeepSpeed is such an engine: its optimizer holds flat copies, so the clock alone would never move."""
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
