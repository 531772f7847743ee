"""The report of `attach`."""

from __future__ import annotations

import pytest

import celora
from celora import CELoraConfig
from small import make_model


def test_report_says_what_and_why() -> None:
    model = make_model(target_modules=["q_proj", "v_proj", "up_proj", "embed_tokens"])
    model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    report = celora.attach(model, CELoraConfig(keep_ratio=0.25, rank=2, overrides={"v_proj": {"estimator": "dense"}}))
    prefix = "base_model.model.model"
    assert set(report.estimated) == {
        f"{prefix}.layers.0.self_attn.q_proj",
        f"{prefix}.layers.0.mlp.up_proj",
        f"{prefix}.layers.1.mlp.up_proj",
    }
    assert set(report.dense) == {f"{prefix}.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    assert report.skipped == {
        f"{prefix}.embed_tokens": "Embedding is not a linear layer",
        f"{prefix}.layers.1.self_attn.q_proj": "its weight is trained",
    }
    layer = report.estimated[f"{prefix}.layers.0.mlp.up_proj"]
    assert (layer.out_features, layer.in_features, layer.keep_ratio, layer.rank) == (80, 48, 0.25, 2)
    assert layer.cost == pytest.approx(0.25 + 2 * 128 / (80 * 48))
    table = str(report)
    assert "up_proj" in table
    assert "(its weight is trained)" in table
    assert "3 of 7 frozen layers estimated" in table
