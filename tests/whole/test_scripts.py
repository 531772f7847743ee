"""celora in scripts that know nothing about it, apart from one added line: TRL's trainers, Accelerate, a bare loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import celora
from celora import CELoraConfig
from celora.runtime.attachment import require
from celora.runtime.state import STATE_NAME
from small import adapter, make_batch, make_model
from tiny import save_tiny_model

HALF = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=3)

ROWS = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 5} w3"} for i in range(16)]
PAIRS = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w3", "rejected": f" w{i + 4}"} for i in range(16)]

TRAINERS: dict[str, tuple[Any, Any, Any, list[dict[str, str]], LoraConfig]] = {
    "sft": (SFTTrainer, SFTConfig, LlamaForCausalLM, ROWS, LoraConfig(target_modules="all-linear", lora_dropout=0.1)),
    "dpo": (DPOTrainer, DPOConfig, LlamaForCausalLM, PAIRS, LoraConfig(target_modules="all-linear", lora_dropout=0.1)),
    "reward": (
        RewardTrainer,
        RewardConfig,
        LlamaForSequenceClassification,
        PAIRS,
        LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"]),
    ),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def trl(kind: str, tiny: Path, output: Path, **more: Any) -> Any:
    """The trainer of a user's script, with celora's lines added."""
    trainer_class, config_class, model_class, rows, lora = TRAINERS[kind]
    extra = {"num_labels": 1} if kind == "reward" else {}
    torch.manual_seed(0)
    args = config_class(
        str(output), max_steps=8, save_steps=4, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
        gradient_accumulation_steps=2, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
        dataloader_pin_memory=False, **more,
    )  # fmt: skip
    trainer = trainer_class(
        model_class.from_pretrained(tiny, dtype=torch.float32, **extra),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny),
        peft_config=lora,
    )
    celora.attach(trainer.model, HALF)
    trainer.add_callback(celora.Callback())
    return trainer


@pytest.mark.filterwarnings("ignore")  # TRL and Transformers warn about each other
@pytest.mark.parametrize("kind", TRAINERS)
def test_trl_trains_on_estimates_logs_them_and_resumes_exactly(kind: str, tiny: Path, tmp_path: Path) -> None:
    whole = trl(kind, tiny, tmp_path)
    whole.train()
    assert (require(whole.model).clock.step, require(whole.model).refreshes) == (8, 3)
    history = [row for row in whole.state.log_history if "loss" in row]
    assert [row["celora/refreshes"] for row in history] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert all(0 < row["celora/relative_error"] <= row["celora/relative_error_worst"] for row in history[3:])

    resumed = trl(kind, tiny, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, value in adapter(whole.model).items():
        assert value.equal(adapter(resumed.model)[name]), name

    whole.save_model(str(tmp_path / "adapter"))
    *_, model_class, _, _ = TRAINERS[kind]
    base = model_class.from_pretrained(tiny, dtype=torch.float32, **({"num_labels": 1} if kind == "reward" else {}))
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs = {"input_ids": torch.arange(6, 16)[None]}
    with torch.no_grad():
        torch.testing.assert_close(stock(**inputs).logits, whole.model.eval()(**inputs).logits, rtol=0, atol=1e-5)


def accelerate(folder: Path | None, start: int, stop: int, *, resume: bool = False) -> PeftModel:
    """A loop around Accelerate, written by hand, with accumulation, evaluation and a checkpoint at its end."""
    model = make_model()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows = [{key: value[0] for key, value in make_batch(i).items()} for i in range(40)]
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=2))
    celora.attach(model, HALF)
    if resume and folder is not None:
        accelerator.load_state(str(folder))
        celora.load_state(model, folder)
    for micro, batch in enumerate(loader):
        if not 2 * start <= micro < 2 * stop:
            continue
        model.train()
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            model(**batch)
    if folder is not None and not resume:
        accelerator.save_state(str(folder))
        celora.save_state(model, folder)
    result: PeftModel = accelerator.unwrap_model(model)
    return result


def test_a_loop_around_accelerate_counts_steps_and_resumes_exactly(tmp_path: Path) -> None:
    whole = accelerate(None, 0, 8)
    assert (require(whole).clock.step, require(whole).refreshes) == (8, 3)
    assert require(whole).relative_errors
    accelerate(tmp_path, 0, 5)
    assert (tmp_path / STATE_NAME).is_file()
    resumed = accelerate(tmp_path, 5, 8, resume=True)
    assert require(resumed).clock.step == 8
    found = adapter(resumed)
    for name, value in adapter(whole).items():
        assert value.equal(found[name]), name


def test_a_bare_loop_of_any_optimizer_needs_one_line() -> None:
    model = make_model()
    celora.attach(model, HALF)  # the one line
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for step in range(7):
        optimizer.zero_grad(set_to_none=False)
        model(**make_batch(step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert (require(model).clock.step, require(model).refreshes) == (7, 3)
    assert require(model).relative_errors
