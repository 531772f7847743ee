"""TRL's trainers and Transformers' Trainer log and train the same with celora and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)
from transformers import TrainingArguments as Arguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import celora
from celora.numerics import head
from celora.runtime.attachment import require
from labelled import masked_batch
from small import make_model
from tiny import save_tiny_model

# --- TRL ------------------------------------------------------------


def sft(folder: Path, preset: str | None, **changes: Any) -> tuple[list[dict[str, float]], PeftModel]:
    save_tiny_model(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [
        {"prompt": " ".join(f"w{(i + j) % 40}" for j in range(2 + i % 4)), "completion": f" w{i} w{i + 1}"}
        for i in range(12)
    ]
    settings: dict[str, Any] = {
        "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False, "eval_strategy": "steps", "eval_steps": 3,
    }  # fmt: skip
    trainer = SFTTrainer(
        LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=SFTConfig(str(folder / "out"), **settings | changes),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    if preset:
        celora.attach(trainer.model, preset)
    trainer.train()
    return trainer.state.log_history, trainer.model


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss_type": "dft"}, {"padding_free": True, "max_length": None}, {"label_smoothing_factor": 0.1}],
    ids=["nll", "dft", "padding_free", "smoothing"],
)
@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_logs_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    """Compares loss, gradient norm, token accuracy and entropy, in training and in evaluation."""
    plain, _ = sft(tmp_path / "a", None, **changes)
    exact, model = sft(tmp_path / "b", "exact", **changes)
    assert len(plain) == len(exact)
    for expected, found in zip(plain, exact, strict=True):
        for key in expected:
            if not any(word in key for word in ("runtime", "per_second", "flos")):
                assert found[key] == pytest.approx(expected[key], rel=2e-5, abs=1e-6), key
    assert require(model).forward.logits == head.Logits()  # celora has taken over the head


class Attaching(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        celora.attach(model, "exact")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("late", [False, True])
def test_an_adapter_in_the_model_itself_is_served_as_one_around_it(late: bool, tmp_path: Path) -> None:
    """With bf16=True accelerate wraps the forward that TRL has fused with the loss."""
    save_tiny_model(tmp_path / "model")
    said, heads, losses = [], [], []
    for way in ("around", "injected"):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        if way == "injected":
            inject_adapter_in_model(config, model)
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                str(tmp_path / "out"), max_steps=2, logging_steps=1, per_device_train_batch_size=2, report_to="none",
                use_cpu=True, bf16=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}", "completion": " w3"} for i in range(8)]),
            processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
            peft_config=config if way == "around" else None,
        )  # fmt: skip
        if late:
            trainer.add_callback(Attaching())
        else:
            celora.attach(trainer.model, "exact")
        trainer.train()
        said.append(str(require(trainer.model).report).replace("base_model.model.", ""))
        heads.append(require(trainer.model).forward.logits)
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert heads == [head.Logits()] * 2
    assert said[1] == said[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_trl_is_only_served_what_is_computed() -> None:
    from trl.trainer.utils import add_fused_lm_head

    from celora.modeling import others

    model = make_model().base_model.model
    assert "no such head" in str(others.fused_head(model))
    for settings, served in (
        ({}, True),
        ({"outputs": ("log_probs", "is_top1", "entropy")}, True),
        ({"outputs": ("log_probs", "mean_logits")}, True),
        ({"outputs": ("log_probs", "log_sum_sq_probs")}, False),
        ({"temperature": 0.7}, True),
        ({"cast_lm_head_to_fp32": True}, False),
    ):
        model.__dict__.pop("forward", None)
        add_fused_lm_head(model, **settings)
        assert isinstance(others.fused_head(model), others.FusedHead) is served


@pytest.mark.filterwarnings("ignore")
def test_dpo_trainer_trains_the_same(tmp_path: Path) -> None:
    losses = []
    for preset in (None, "exact"):
        save_tiny_model(tmp_path / "model")
        rows = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w3", "rejected": f" w{i + 4}"} for i in range(8)]
        trainer = DPOTrainer(
            LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32),
            args=DPOConfig(
                str(tmp_path / "out"), max_steps=3, logging_steps=1, per_device_train_batch_size=2, report_to="none",
                use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
            peft_config=LoraConfig(target_modules="all-linear"),
        )  # fmt: skip
        if preset:
            celora.attach(trainer.model, preset)
        trainer.train()
        names = ("loss", "logits/chosen", "logits/rejected")
        losses.append([row[name] for row in trainer.state.log_history if "loss" in row for name in names])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-6)
    assert require(trainer.model).forward.logits == head.Logits()  # celora has taken over the head


@pytest.mark.filterwarnings("ignore")
def test_grpo_trainer_trains_by_its_entropy_bonus(tmp_path: Path) -> None:
    """All rewards are equal, so the entropy alone has a gradient."""
    norms = []
    for preset in (None, "exact"):
        save_tiny_model(tmp_path / "model")
        trainer = GRPOTrainer(
            LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32),
            args=GRPOConfig(
                str(tmp_path / "out"), max_steps=2, logging_steps=1, per_device_train_batch_size=4, num_generations=4,
                max_completion_length=6, entropy_coef=1.0, report_to="none", use_cpu=True, bf16=False,
                save_strategy="no", disable_tqdm=True, learning_rate=1e-2, dataloader_pin_memory=False,
            ),
            reward_funcs=lambda completions, **_: [1.0] * len(completions),
            train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(8)]),
            processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
            peft_config=LoraConfig(target_modules="all-linear", init_lora_weights=False),
        )  # fmt: skip
        if preset:
            celora.attach(trainer.model, preset)
        trainer.train()
        norms.append([row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row])
    assert min(norms[0]) > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [{}, {"neftune_noise_alpha": 5.0}], ids=["usual", "NEFTune"])
def test_plain_trainer_with_accumulation_trains_the_same(more: dict[str, Any], tmp_path: Path) -> None:
    """NEFTune's noise depends on the shape of the batch, so padding has to stay."""
    losses = []
    for preset in (None, "exact"):
        model = make_model(init_lora_weights=True)
        if preset:
            celora.attach(model, preset)
        rows = [{key: value[i % 3] for key, value in masked_batch(i // 3).items()} for i in range(24)]
        arguments = Arguments(
            str(tmp_path), max_steps=4, logging_steps=1, per_device_train_batch_size=3, gradient_accumulation_steps=2,
            report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
            dataloader_pin_memory=False, remove_unused_columns=False, **more,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
