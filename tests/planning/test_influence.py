"""Measures how much of one layer's error arrives in the LoRA gradient."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from celora.planning import planner
from patching import patch_all


def test_every_layer_is_disturbed_before_it_is_said_to_have_no_influence(
    model: PeftModel, batches: list[dict[str, torch.Tensor]], free_estimates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few tokens carry the last layers' gradients.

    Native products round the number of kept tokens up, so they keep all.
    """
    for batch in batches:
        batch["labels"][:, :-1] = -100
    patch_all(monkeypatch, "celora.planning.influence:_DEPTHS", 20)
    (plan,) = planner.make_plans(model, batches, [0.9])
    influence = {layer.name.rpartition("model.layers.")[2]: layer.influence for layer in plan.layers}
    assert influence["1.mlp.down_proj"] > 0
    assert influence["1.mlp.up_proj"] > 0
    # The same holds when layers are probed in groups.
    patch_all(monkeypatch, "celora.planning.influence:_FEW_LAYERS", 0)
    (grouped,) = planner.make_plans(model, batches, [0.9])
    assert min(layer.influence for layer in grouped.layers) > 0
