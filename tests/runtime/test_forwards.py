"""Which forwards in 8 bits go back to their layer's own, in one process and in several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

import celora
from celora import CELoraConfig
from celora.runtime.attachment import require
from machine import refuses
from small import make_model, train

BOTH = CELoraConfig(estimator="int8", forward="int8", refresh_every=3, fused=True)
pytestmark = pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")


def outlier(model: PeftModel) -> nn.Module:
    """A layer with one input feature a thousand times as large as the others, and little weight on it."""
    block = model.base_model.model.model.layers[1]
    with torch.no_grad():
        block.post_attention_layernorm.weight[3] = 1e4
        for part in (block.mlp.gate_proj, block.mlp.up_proj):
            part.base_layer.weight[:, 3] *= 1e-4
            for matrix in part.lora_A.values():
                matrix.weight[:, 3] = 0
    return block


@pytest.mark.fault(
    "numbers",
    "a layer whose 8-bit forward loses too much, as with outlying features",
    sees="one warning with the layer's name and the error",
    kept="the layer's own forward from then on, also after a resume",
)
def test_a_layer_that_loses_too_much_goes_back(tmp_path: Path) -> None:
    model = make_model()
    outlier(model)
    celora.attach(model, BOTH)
    with pytest.warns(UserWarning, match="from step 1 on, the forward of .*gate_proj.* is exact: in 8 bits") as said:
        train(model, 7)
    assert sum("is exact: in 8 bits" in str(of.message) for of in said) == 1
    forwards = require(model).forwards
    names = {name for name in forwards if name.endswith(("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"))}
    assert names <= forwards.made_exact
    layer = model.get_submodule(sorted(names)[0]).base_layer
    x = torch.randn(3, 48)
    assert layer(x).equal(nn.functional.linear(x, layer.weight, layer.bias))
    celora.save_state(model, tmp_path)
    errors = dict(forwards.errors)
    celora.attach(model, "off")
    celora.attach(model, BOTH)
    assert not require(model).forwards.made_exact
    celora.load_state(model, tmp_path)
    assert require(model).forwards.made_exact == forwards.made_exact
    assert require(model).forwards.errors == errors


def test_processes_agree_on_who_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them has seen a large error: all compute that layer exactly."""
    model = make_model()
    celora.attach(model, BOTH)
    train(model, 1)
    forwards = require(model).forwards
    name = next(iter(forwards))
    monkeypatch.setattr("celora.runtime.forwards.in_company", lambda: True)
    told_by_another = [[200_000], *([-1] for _ in range(13))]
    monkeypatch.setattr("celora.runtime.forwards.largest_of_all", lambda told, device: told_by_another)
    with pytest.warns(UserWarning, match="was off by 20%, and less than 10% is accepted"):
        forwards.end_refresh(1, torch.device("cpu"))
    assert forwards.made_exact == {name}
