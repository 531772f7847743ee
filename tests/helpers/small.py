"""A Llama small enough to train in milliseconds, its batches, and one configuration of each kind of estimator."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from celora import CELoraConfig

# One of each kind of estimator.
MEMBERS = {
    "int8": CELoraConfig(estimator="int8", refresh_every=3),
    "int8, no copy": CELoraConfig(estimator="int8", weight_copy=False, refresh_every=3),
    "tokens by energy": CELoraConfig(estimator="tokens", keep_ratio=0.95, rank=0, selection="energy", refresh_every=3),
    "int8 both ways": CELoraConfig(
        estimator="tokens",
        keep_ratio=0.95,
        rank=0,
        selection="energy",
        precision="int8",
        forward="int8",
        refresh_every=3,
    ),
    "int8 x tokens": CELoraConfig(
        estimator="tokens", keep_ratio=0.95, rank=0, selection="energy", precision="int8", refresh_every=3
    ),
    "tokens and a gradient factor": CELoraConfig(
        estimator="tokens", keep_ratio=0.5, rank=4, factor="gradient", refresh_every=3
    ),
    "sampled tokens": CELoraConfig(estimator="tokens", keep_ratio=0.8, rank=0, selection="sampled", refresh_every=3),
    "int8 x columns": CELoraConfig(keep_ratio=0.5, rank=4, precision="int8", refresh_every=3),
    "columns by energy": CELoraConfig(keep_ratio=0.9, rank=4, selection="energy", refresh_every=3),
    "sampled columns": CELoraConfig(keep_ratio=0.8, rank=4, selection="sampled", refresh_every=3),
    "controlled": CELoraConfig(
        estimator="tokens", keep_ratio=0.5, rank=0, selection="energy", target_error=0.1, refresh_every=3
    ),
    "spread": CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=3, spread=True),
}


def written_whole(file: Path) -> list[tuple[str, int]]:
    """The disk operations that write a file so that it is whole or absent whenever the power fails."""
    number = file.stat().st_ino
    return [("fsync", number), ("replace", number), ("fsync", file.parent.stat().st_ino)]


def made_once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Make each model once, and from then on a copy in a fifth of the time. It leaves the same random state behind."""
    made: dict[str, tuple[bytes, torch.Tensor]] = {}

    @functools.wraps(make)
    def copied(*args: Any, **given: Any) -> Any:
        asked = repr((args, sorted(given.items())))
        if asked not in made:
            made[asked] = pickle.dumps(make(*args, **given)), torch.get_rng_state()
        model, state = made[asked]
        torch.set_rng_state(state)
        return pickle.loads(model)

    return copied


@made_once
def make_base(
    *, seed: int = 0, layers: int = 2, base_bias: bool = False, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """A small Llama. The same seed gives the same weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        attention_bias=base_bias,
        mlp_bias=base_bias,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


@made_once
def make_model(
    *, seed: int = 0, base_bias: bool = False, dtype: torch.dtype = torch.float32, layers: int = 2, **lora: Any
) -> PeftModel:
    """The same with LoRA on all linear layers."""
    lora = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False, **lora}
    return get_peft_model(make_base(seed=seed, base_bias=base_bias, dtype=dtype, layers=layers), LoraConfig(**lora))


def mixed_model() -> Any:
    """A small Llama with LoHa around LoRA on each up_proj, both active."""
    model = get_peft_model(make_base(), LoraConfig(r=8, target_modules=["up_proj"]), mixed=True)
    model.add_adapter("second", LoHaConfig(r=4, target_modules=["up_proj"]))
    model.set_adapter(["default", "second"])
    return model


def outlier(model: PeftModel, size: float) -> nn.Module:
    """A block whose MLP gets one feature that is this many times as large as the others, with small weights on it."""
    block = model.base_model.model.model.layers[1]
    with torch.no_grad():
        block.post_attention_layernorm.weight[3] = size
        for part in (block.mlp.gate_proj, block.mlp.up_proj):
            part.base_layer.weight[:, 3] /= size
            for matrix in part.lora_A.values():
                matrix.weight[:, 3] = 0
    return block


def head_outlier(model: PeftModel, size: float) -> None:
    """Give the head one input that is this many times as large as the others, with small weights on it."""
    causal = model.base_model.model
    with torch.no_grad():
        causal.model.norm.weight[3] = size
        causal.lm_head.weight[:, 3] /= size


def make_batch(seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens.clone()}


def masked_batch(seed: int) -> dict[str, torch.Tensor]:
    """The same, with labels on the last tokens only, as in instruction tuning."""
    batch = make_batch(seed)
    batch["labels"][:, :7] = -100
    return batch


def train(
    model: PeftModel,
    steps: int,
    *,
    first: int = 0,
    accumulate: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    between: Callable[[], object] = lambda: None,
) -> torch.optim.Optimizer:
    """A bare PyTorch loop over deterministic batches, as a user would write it."""
    model.train()
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(first, first + steps):
        for micro in range(accumulate):
            model(**make_batch(1000 * step + micro)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        between()
    return optimizer


def flat_gradient(model: PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradient of all trainable parameters as one vector, in float64."""
    model.zero_grad()
    model(**batch).loss.backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).double()
    model.zero_grad()
    return flat


def adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
