"""The head is planned like a layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from peft import PeftModel

import celora
from celora.planning import planner
from celora.settings.presets import PRESETS


@pytest.mark.parametrize("fidelity", [0.9, 1.0])
def test_the_head_is_planned_too(
    model: PeftModel, batches: Any, free_estimates: None, wide_head: None, fidelity: float
) -> None:
    plan = celora.make_plan(model, batches, fidelity)
    head = plan.head
    assert head is not None
    assert (head.out_features, head.in_features) == tuple(model.get_output_embeddings().weight.shape)
    errors = [candidate.relative_error for candidate in head.candidates]
    assert errors[0] == 0 < errors[1] < errors[-1]
    assert [candidate.time_ms for candidate in head.candidates] == [10, 9, 7, 5, 3]
    celora.attach(model, plan)
    kept = plan.config().head_keep_ratio
    assert (kept == 1) if fidelity == 1 else (kept < 1)
    assert celora.audit(model, batches[2]).cosine >= fidelity - 1e-6
    # The audit includes what the head's estimate loses.
    celora.attach(model, dataclasses.replace(PRESETS["exact"], head_keep_ratio=0.01))
    assert celora.audit(model, batches[2]).cosine < 1 - 1e-6


def test_a_head_that_is_not_ours_is_not_planned(
    model: PeftModel, batches: Any, free_estimates: None, wide_head: None
) -> None:
    # celora does not know what this hook does
    hook = model.base_model.model.lm_head.register_forward_hook(lambda *_: None)
    assert celora.make_plan(model, batches).head is None
    hook.remove()
    assert planner.make_plans(model, batches, [0.9], head=False)[0].head is None
    loss = celora.make_plan(model, [{"input_ids": b["input_ids"]} for b in batches], loss=_own_loss).head
    assert loss is None


def _own_loss(model: Any, batch: Any) -> torch.Tensor:
    return model(**batch).logits.float().square().mean()
