"""Nothing but PyTorch and PEFT, and one line for celora: it counts the optimizer's steps by itself.

python examples/bare_loop.py [MODEL]

Without MODEL it takes celora's demo model, which needs `pip install '.[app]'`.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import celora
from celora.studies.assets import demo_model


def main(name: str, steps: int = 20) -> list[float]:
    """Teach the model to add, save the adapter in `adapter`, and return the losses."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(name), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    )
    print(celora.attach(model, "exact"))  # the one line

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    model.train()
    for _ in range(steps):
        pairs = torch.randint(20, (8, 2), generator=generator).tolist()
        batch = tokenizer([f"{a} + {b} = {a + b}" for a, b in pairs], return_tensors="pt", padding=True)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    celora.detach(model)  # optional: the model is an ordinary PEFT model again
    model.save_pretrained("adapter")  # plain PEFT
    return losses


if __name__ == "__main__":
    print(main(sys.argv[1] if len(sys.argv) > 1 else str(demo_model())))
