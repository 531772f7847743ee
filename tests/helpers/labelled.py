"""Batches with some unlabelled tokens, and the loss and gradient of a model for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import celora
from small import make_batch
from tolerances import OF_GRADIENT


def masked_batch(seed: int = 0) -> dict[str, Tensor]:
    batch = make_batch(seed)
    batch["labels"][:, :5] = -100
    batch["labels"][1, 8:] = -100
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 8:] = 0
    return batch


def ragged(lengths: list[int], *, prompt: int = 2, left: bool = False) -> dict[str, Tensor]:
    """A padded batch. The first `prompt` tokens of each sequence have no labels."""
    width = max(lengths)
    tokens = torch.randint(3, 64, (len(lengths), width))
    place = torch.arange(width)[None]
    mask = torch.stack([place[0] >= width - n if left else place[0] < n for n in lengths])
    first = torch.tensor([width - n if left else 0 for n in lengths])[:, None]
    labels = torch.where(mask & (place >= first + prompt), tokens, -100)
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def compare(model: nn.Module, batch: dict[str, Any], *, calls: int = 2) -> None:
    """Check that loss and gradient equal the model's own for this batch, to float32 rounding."""
    celora.detach(model)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    expected = gradient(model)
    celora.attach(model, "exact")
    for _ in range(calls):  # the first call is also compared with the model's own logits
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        assert output.logits is None
        assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
        assert (gradient(model) - expected).norm() < OF_GRADIENT * expected.norm()
