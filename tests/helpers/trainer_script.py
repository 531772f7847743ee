"""A script that knows nothing of celora: `trainer_script.py FOLDER` trains a tiny model and saves what it learnt."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        use_cache=False,
    )
    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(config), lora)
    tokens = torch.randint(0, 61, (24, 64), generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder), max_steps=4, logging_steps=1, per_device_train_batch_size=2, learning_rate=1.0, optim="sgd",
            seed=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        (folder / "result.json").write_text(json.dumps({"losses": losses, "hooks left": hooks}))
        model.save_pretrained(folder)
