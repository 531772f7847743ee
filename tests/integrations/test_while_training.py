"""The callback that attaches celora for the length of a training, in Trainers of this process."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import celora
from celora import CELoraConfig, CELoraError
from celora.integrations.while_training import AttachWhileTraining, in_one_line, read_settings
from celora.runtime.attachment import find, require
from celora.runtime.gate import Gated
from patching import patch_all
from small import adapter, make_base, make_batch, make_model

COLUMNS = {"keep_ratio": 0.5, "rank": 4, "refresh_every": 3}


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in make_batch(i).items()}


class Seen(TrainerCallback):
    """Remembers how many layers were grafted at each step."""

    def __init__(self) -> None:
        self.grafts: list[int] = []

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.grafts.append(len(require(model).grafts) if find(model) else -1)


def trainer(folder: Path, callback: TrainerCallback, *, model: nn.Module | None = None, **more: Any) -> Trainer:
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", **more}
    args = TrainingArguments(
        str(folder),
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=1,
        **settings,
    )
    return Trainer(make_model() if model is None else model, args, train_dataset=Rows(), callbacks=[callback])


def test_attached_from_the_first_step_to_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback, seen = AttachWhileTraining(COLUMNS), Seen()
    for _ in range(2):  # the same trainer may train again
        training = trainer(tmp_path, callback)
        training.add_callback(seen)
        training.train()
        assert find(training.model) is None
    assert seen.grafts == [14] * 8
    said = "celora: a configuration attached to LlamaForCausalLM: 14 of 14 frozen layers estimated.\n"
    assert capsys.readouterr().err.count(said) == 2


def test_trains_like_attach_and_resumes_with_its_state(tmp_path: Path) -> None:
    whole = trainer(tmp_path, AttachWhileTraining(COLUMNS), max_steps=8, save_steps=4)
    whole.train()
    by_hand = trainer(tmp_path / "by_hand", celora.Callback(), max_steps=8, save_steps=4)
    celora.attach(by_hand.model, CELoraConfig(**COLUMNS))
    by_hand.train()
    resumed = trainer(tmp_path, AttachWhileTraining(COLUMNS), max_steps=8, save_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for other in (by_hand, resumed):
        for name, value in adapter(whole.model).items():
            assert torch.equal(adapter(other.model)[name], value), name


def test_the_program_decides_if_it_attaches_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model()
    celora.attach(model, CELoraConfig(**COLUMNS))
    trainer(tmp_path, AttachWhileTraining("exact"), model=model).train()
    assert require(model).config == CELoraConfig(**COLUMNS)
    assert "celora: LlamaForCausalLM was attached by the program itself, which decides.\n" in capsys.readouterr().err


class Interrupts(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


def test_a_training_that_was_interrupted_is_not_the_programs_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    first = trainer(tmp_path, AttachWhileTraining(COLUMNS), model=model)
    first.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    trainer(tmp_path, AttachWhileTraining("exact"), model=model).train()
    assert find(model) is None
    assert "attached by the program itself" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:celora. (at step|from step)")
@pytest.mark.parametrize("changes", [{}, {"labelled_head": False}, {"head_keep_ratio": 0.5}])
def test_where_timing_decides_otherwise_a_resumed_training_goes_on_as_it_began(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another machine. Settings that a user has changed since are refused."""
    trainer(tmp_path, AttachWhileTraining("auto"), save_steps=2).train()

    def other(found: Any, config: CELoraConfig, **_: Any) -> Gated:
        return Gated(dataclasses.replace(config, overrides={"*": {"estimator": "dense"}}, head_keep_ratio=1.0))

    patch_all(monkeypatch, "celora.runtime.gate:gate", other)
    resumed = trainer(tmp_path, AttachWhileTraining({"preset": "auto", **changes}), max_steps=6)
    wrong = pytest.raises(CELoraError, match="made with another configuration") if changes else nullcontext()
    with wrong:
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert changes or resumed.state.global_step == 6


def test_a_model_without_adapters_trains_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback, model = AttachWhileTraining("exact"), make_base()
    trainer(tmp_path, callback, model=model, save_strategy="no").train()
    assert find(model) is None
    assert "celora: LlamaForCausalLM has no PEFT adapter, so it trains as without celora.\n" in capsys.readouterr().err


def test_only_the_first_process_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback, model = AttachWhileTraining("exact"), make_model()
    args, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(is_world_process_zero=False)
    callback.on_train_begin(args, state, TrainerControl(), model=model)
    assert capsys.readouterr().err == ""
    assert find(model) is not None
    callback.on_train_begin(args, state, TrainerControl(), model=model)  # as when a Trainer looks for a batch size
    callback.on_train_end()
    assert find(model) is None
    shutil.rmtree(tmp_path)


def test_layers_that_cannot_be_estimated_are_counted_with_the_reason() -> None:
    model = get_peft_model(make_base(), LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    assert in_one_line(celora.attach(model, "exact")) == (
        "none of 3 frozen layers estimated, the gradient is LoRA's own; 1 cannot be (Embedding is not a linear layer)"
    )


@pytest.mark.parametrize(
    ("written", "config", "changes"),
    [
        ("exact", "exact", {}),
        (False, "off", {}),
        ({"preset": False}, "off", {}),
        ({"preset": "auto", "labelled_head": False}, "auto", {"labelled_head": False}),
        (COLUMNS, CELoraConfig(**COLUMNS), {}),
    ],
)
def test_settings(written: object, config: object, changes: dict[str, Any]) -> None:
    assert read_settings(written) == (config, changes)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("xact", "unknown preset 'xact'; did you mean 'exact'?"),
        ({"preset": "exact", "labeled_head": False}, "unknown setting 'labeled_head'; did you mean 'labelled_head'?"),
        ({"preset": "exact", "keep_ratio": 0.5}, "keep_ratio is a setting of layers"),
        ({"keep_ration": 0.5}, "unknown celora setting 'keep_ration'"),
        (["exact"], "celora: ['exact']; expected a preset (auto, fast, exact, paper, off) or a mapping."),
        (None, "celora: None; expected a preset"),
        (True, "celora: True; expected a preset"),
    ],
)
def test_wrong_settings_are_one_line(written: object, said: str) -> None:
    with pytest.raises(CELoraError) as caught:
        AttachWhileTraining(written)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
