"""A copied or separated part of an attached model is exact."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model

import celora
from celora import CELoraConfig
from small import make_batch, make_model, train

HALF = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=3)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_adapters_of_a_base_that_was_unloaded_are_plain(how: str, copied: bool) -> None:
    """Also while somebody keeps the unloaded model, as a Trainer does."""
    batch, first = make_batch(1), make_model()
    celora.attach(first, HALF)
    first = copy.deepcopy(first) if copied else first
    train(first, 2)
    base = getattr(first, how)()
    plain = copy.deepcopy(base)
    celora.detach(plain)
    again, expected = (get_peft_model(each, LoraConfig(target_modules="all-linear")) for each in (base, plain))
    expected.load_state_dict(again.state_dict())
    for model in (again, expected):
        output = model(**batch)
        output.loss.backward()
        assert output.logits is not None
    gradients = [{name: p.grad for name, p in each.named_parameters() if p.requires_grad} for each in (again, expected)]
    assert all(gradient.equal(gradients[1][name]) for name, gradient in gradients[0].items())


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
