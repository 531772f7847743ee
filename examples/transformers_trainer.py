"""Transformers' own Trainer, and one line for celora.

python examples/transformers_trainer.py [MODEL]

Without MODEL it takes celora's demo model, which needs `pip install '.[app]'`.
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import celora
from celora.studies.assets import demo_model


def main(name: str, steps: int = 20) -> list[float]:
    """Teach the model to add, save the adapter in `adapter`, and return the losses."""
    tokenizer = AutoTokenizer.from_pretrained(name)

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt, answer = tokenizer(row["prompt"]).input_ids, tokenizer(row["answer"]).input_ids
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}  # learn the answer only

    sums = [(a, b) for a in range(20) for b in range(20)]
    rows = Dataset.from_list([{"prompt": f"{a} + {b} =", "answer": f" {a + b}"} for a, b in sums])
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(name), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    )
    trainer = Trainer(
        model=model,
        train_dataset=rows.map(encode, remove_columns=rows.column_names),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        args=TrainingArguments(
            output_dir="out",
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        callbacks=[celora.Callback()],  # optional
    )
    print(celora.attach(trainer.model, "exact"))  # the one line; by now the model is where it will train
    trainer.train()
    model.save_pretrained("adapter")  # plain PEFT
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(demo_model()))
