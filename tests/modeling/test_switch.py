"""A copied or separated part of an attached model is exact."""

from __future__ import annotations

import gc

import torch

import celora
from celora import CELoraConfig
from small import make_model, train

HALF = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=3)


def test_layers_left_by_merge_and_unload_are_exact() -> None:
    model = make_model()
    celora.attach(model, HALF)
    train(model, 2)
    merged = model.merge_and_unload()
    del model
    gc.collect()
    out = merged(inputs_embeds=torch.randn(1, 4, 48, requires_grad=True))
    nodes, seen = [out.logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [n for n, _ in node.next_functions]
    assert not any("Graft" in type(node).__name__ for node in seen)
