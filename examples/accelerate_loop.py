"""A training loop of your own with Accelerate, gradient accumulation included, and one line for celora.

accelerate launch examples/accelerate_loop.py [MODEL]

Without MODEL it takes celora's demo model, which needs `pip install '.[app]'`.
"""

import itertools
import sys

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import celora
from celora.studies.assets import demo_model


def main(name: str, steps: int = 20) -> list[float]:
    """Teach the model to add, save the adapter in `adapter`, and return the losses."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = []
    for a, b in itertools.product(range(20), repeat=2):
        prompt, answer = tokenizer(f"{a} + {b} =").input_ids, tokenizer(f" {a + b}").input_ids
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(name), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    plain = accelerator.unwrap_model(model)
    accelerator.print(celora.attach(plain, "exact"))  # the one line; it says what it does

    model.train()
    losses = []
    for batch in itertools.islice(itertools.cycle(loader), 2 * steps):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    if accelerator.is_main_process:
        plain.save_pretrained("adapter")  # plain PEFT
    return losses


if __name__ == "__main__":
    print(main(sys.argv[1] if len(sys.argv) > 1 else str(demo_model())))
